"""Compact results: one JSON line a run, a few kilobytes, with everything that a comparison needs.

Results of long runs are kept as such a file; all tables can be made from it again. Configs stay plain tables here, so
that an old file never fails a stricter config schema.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np

from disttempnet.config import public_table
from disttempnet.errors import UserError
from disttempnet.evaluation.scores import Scores, from_record, to_record
from disttempnet.io.files import read_json_lines, read_regular
from disttempnet.report.bins import binned, evenly_spread
from disttempnet.report.read import Evaluation, RunRecord, Temperatures, read_run
from disttempnet.sanitize import one_line

TUNING_FILE = "tuning.jsonl"  # of a comparison
COMPACT_FORMAT = 1  # of a line; other formats are refused
CURVE_POINTS = 32  # of the τ trajectory
ERROR_PREFIX = "normaliser_error/"  # in metrics.jsonl
KEPT_FACTS = (
    "objective", "versions", "git", "device", "world_size", "index_digest", "num_samples", "parameters", "started",
    "finished",
)  # fmt: skip


@dataclass(frozen=True)
class Tuned:
    """Settings that `compare` chose by trials.

    Attributes:
        chosen: config key → value.
        metric, seed: what the trials were compared by.
        trials: their number.
        at_edge: keys whose chosen value is the lowest or highest that was tried.
    """

    chosen: dict[str, Any]
    metric: str
    seed: int
    trials: int
    at_edge: list[str]


@dataclass(frozen=True)
class CompactResult:
    """The result of a run, for comparisons.

    Attributes:
        config: the resolved config as a plain table.
        facts: keys of run.json about the run and its software.
        seconds: from the first start to the end, pauses included; None for an unfinished run.
        evaluations: in order of steps.
        tau: side → mean, min, max, std of the final τ over the pairs of the first task; empty where unknown.
        tau_curve: "epoch", "mean", "min", "max" of the image side's τ in the training batches: lists of equal length.
        tau_by_frequency: final τ against the training frequency of a pair's concept: "frequency" (median of the bin),
            "image", "text" (median τ of the bin), of equal length; "spearman" of [image, text] over the pairs. Empty
            where all τ are equal or frequencies are unknown.
        tuned: how `compare` chose settings by trials; None where it chose none.
        tau_started: whether a temperature network that waits for its pairs started; None where there is no such one.
        normaliser_error: name → last measured value (losses/normaliser_error.py); empty where it was not measured.
    """

    name: str
    config: dict[str, Any]
    facts: dict[str, Any]
    seconds: float | None
    evaluations: tuple[Evaluation, ...]
    tau: dict[str, list[float]]
    tau_curve: dict[str, list[float]]
    tau_by_frequency: dict[str, list[float]]
    tuned: Tuned | None = None
    tau_started: bool | None = None
    normaliser_error: dict[str, float] = field(default_factory=dict)

    @property
    def seed(self) -> int:
        return int(self.config["train"]["seed"])

    @property
    def objective(self) -> str:
        """The display name of the objective."""
        return one_line(str(self.facts["objective"]["title"]))

    @property
    def finished(self) -> bool:
        return "finished" in self.facts

    @property
    def final(self) -> dict[str, Scores]:
        return self.evaluations[-1].scores if self.evaluations else {}


def read_results(paths: Sequence[Path]) -> list[CompactResult]:
    """Read results from run folders, folders of run folders, and compact files, in any mixture.

    Raises:
        UserError: any other path, or a damaged file.
    """
    results: list[CompactResult] = []
    for path in paths:
        if path.suffix == ".jsonl":
            results += _read_compact(path)
        elif path.is_dir() and not (path / "config.toml").is_file():
            folders = sorted(folder.parent for folder in path.glob("*/run.json"))
            if not folders:
                raise UserError(f"{path}: neither a run folder (it has no config.toml) nor a folder of run folders")
            results += [compact(read_run(folder)) for folder in folders]
        else:
            results.append(compact(read_run(path)))
    return results


def compact(run: RunRecord) -> CompactResult:
    """Return the compact result of a run folder."""
    # facts and duration
    facts = {key: run.facts[key] for key in KEPT_FACTS if key in run.facts}
    seconds = None
    if run.finished and "started" in facts:
        begun, ended = (datetime.fromisoformat(facts[key]) for key in ("started", "finished"))
        seconds = (ended - begun).total_seconds()
    # final τ: mean, min, max, std of each side
    tau = {}
    if run.temperatures:
        last = run.temperatures[-1]
        for side, values in (("image", last.image), ("text", last.text)):
            tau[side] = [float(f(values.astype(float))) for f in (np.mean, np.min, np.max, np.std)]
    # τ over the epochs, at most CURVE_POINTS of them
    curve = {}
    epochs, mean = run.series("tau/image_mean")
    low, high = run.series("tau/image_min")[1], run.series("tau/image_max")[1]
    if len(epochs):
        shown = evenly_spread(len(epochs), CURVE_POINTS)
        has_range = len(low) == len(mean) == len(high)
        parts = (epochs, mean, low if has_range else mean, high if has_range else mean)
        curve = {
            key: values[shown].tolist() for key, values in zip(("epoch", "mean", "min", "max"), parts, strict=True)
        }
    by_frequency = _by_frequency(run.temperatures[-1]) if run.temperatures else {}
    tuned = _tuned(run.folder.parent / TUNING_FILE, run.config.name)

    # config without credentials and local paths
    table = public_table(run.config)
    table["out"] = Path(table["out"]).name
    _, waits = run.series("tau_started")
    started = bool(waits[-1]) if len(waits) else None
    return CompactResult(
        run.config.name,
        table,
        facts,
        seconds,
        run.evaluations,
        tau,
        curve,
        by_frequency,
        tuned,
        started,
        _normaliser_error(run),
    )


def _normaliser_error(run: RunRecord) -> dict[str, float]:
    """Return the last error of the run's normalisers, by its name without the prefix."""
    names = {name for line in run.steps for name in line if name.startswith(ERROR_PREFIX)}
    return {name.removeprefix(ERROR_PREFIX): float(run.series(name)[1][-1]) for name in sorted(names)}


def _tuned(path: Path, name: str) -> Tuned | None:
    """Return how the settings of a run were chosen, from the tuning.jsonl of its comparison; None without one."""
    stem = name.partition("--seed-")[0]
    lines = [line for _, line in read_json_lines(path, _from_tuning) if line["name"] == stem]
    return _from_tuning(lines[0]) if lines else None


def _from_tuning(line: dict[str, Any]) -> Tuned:
    """Raise KeyError or TypeError for an object that is no line of tuning.jsonl."""
    return Tuned(dict(line["chosen"]), line["metric"], line["seed"], len(line["trials"]), list(line["at_edge"]))


def _by_frequency(last: Temperatures) -> dict[str, list[float]]:
    sides = {"image": last.image, "text": last.text}
    bins = None if last.frequency is None else binned(last.frequency.astype(float), sides)
    if bins is None or last.frequency is None or None in bins.correlation.values():
        return {}
    numbers = range(len(bins.names))
    return {
        "frequency": [float(np.median(last.frequency[bins.of_item == b])) for b in numbers],
        **{side: bins.quartiles[side][1].tolist() for side in sides},
        "spearman": [float(value) for value in bins.correlation.values() if value is not None],
    }


def write_compact(results: Sequence[CompactResult]) -> str:
    """Return the text of a compact file: one line a result, floats with 6 digits."""
    return "".join(json.dumps(_rounded(_to_line(result)), ensure_ascii=False) + "\n" for result in results)


def _to_line(result: CompactResult) -> dict[str, Any]:
    final = to_record(result.final)
    return {
        "format": COMPACT_FORMAT,
        "name": result.name,
        "seed": result.seed,
        "config": result.config,
        "facts": result.facts,
        "seconds": result.seconds,
        "final": final,
        "curve": [
            {"step": e.step, "epoch": e.epoch, "results": {task: s.metrics for task, s in e.scores.items()}}
            for e in result.evaluations
        ],
        "tau": result.tau,
        "tau_curve": result.tau_curve,
        "tau_by_frequency": result.tau_by_frequency,
        "tuned": result.tuned and asdict(result.tuned),
        "tau_started": result.tau_started,
        "normaliser_error": result.normaliser_error,
    }


def _read_compact(path: Path) -> Iterator[CompactResult]:
    try:
        lines = read_regular(path).decode("utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}") from None
    for number, line in enumerate(lines, 1):
        try:
            yield _from_line(json.loads(line))
        except (ValueError, KeyError, TypeError, AttributeError):
            raise UserError(f"{path}: line {number} is not a compact result") from None


def _from_line(line: dict[str, Any]) -> CompactResult:
    if line["format"] != COMPACT_FORMAT:
        raise ValueError
    final = line["final"]
    evaluations = tuple(
        Evaluation(point["step"], point["epoch"], from_record({**final, "results": point["results"]}))
        for point in line["curve"]
    )
    result = CompactResult(
        name=line["name"],
        config=line["config"],
        facts=line["facts"],
        seconds=line["seconds"],
        evaluations=evaluations,
        tau=line["tau"],
        tau_curve=line["tau_curve"],
        tau_by_frequency=line["tau_by_frequency"],
        tuned=Tuned(**line["tuned"]) if line.get("tuned") else None,  # older files lack these keys
        tau_started=line.get("tau_started"),
        normaliser_error=dict(line.get("normaliser_error", {})),
    )
    if result.seed != line["seed"] or not result.objective:
        raise ValueError
    return result


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, dict):
        return {key: _rounded(inner) if key not in ("config", "tuned") else inner for key, inner in value.items()}
    return [_rounded(inner) for inner in value] if isinstance(value, list) else value
