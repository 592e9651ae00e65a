"""Compact results: what a comparison needs of a run, one JSON line a run, a few kilobytes each.

Runs too long to repeat are kept as such a file, with seeds and versions, and the tables are made from it again.
Configs stay plain tables here: a file written years ago must not fail a stricter config.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np

from disttempnet.config import public_table
from disttempnet.errors import UserError
from disttempnet.evaluation.scores import Scores, from_record, to_record
from disttempnet.io.files import read_regular
from disttempnet.report.binning import binned, evenly_spread
from disttempnet.report.read import Evaluation, RunRecord, Temperatures, read_run
from disttempnet.sanitize import one_line

FORMAT = 1
CURVE_POINTS = 32  # of the τ trajectory
KEPT_FACTS = (
    "objective", "versions", "git", "device", "world_size", "index_digest", "num_samples", "parameters", "started",
    "finished",
)  # fmt: skip


@dataclass(frozen=True)
class Result:
    """What is compared of a run.

    Attributes:
        config: the resolved config as a plain table.
        facts: those of run.json that say what was run, with what.
        seconds: from the first start to the end, pauses included; None where it has not ended.
        evaluations: by step.
        tau: side → mean, min, max, std of τ over the pairs of the first task at the end; empty where unknown.
        tau_curve: "epoch", "mean", "min", "max" of the image side's τ in the training batches, equally long lists.
        tau_by_frequency: final τ against how often a pair's concept was trained on: "frequency" (median of the bin),
            "image", "text" (median τ of the bin), equally long, and "spearman" of [image, text] over the pairs;
            empty where τ is alike for all or frequencies are unknown.
    """

    name: str
    config: dict[str, Any]
    facts: dict[str, Any]
    seconds: float | None
    evaluations: tuple[Evaluation, ...]
    tau: dict[str, list[float]]
    tau_curve: dict[str, list[float]]
    tau_by_frequency: dict[str, list[float]]

    @property
    def seed(self) -> int:
        return int(self.config["train"]["seed"])

    @property
    def objective(self) -> str:
        """The objective's written name."""
        return one_line(str(self.facts["objective"]["title"]))

    @property
    def finished(self) -> bool:
        return "finished" in self.facts

    @property
    def final(self) -> dict[str, Scores]:
        return self.evaluations[-1].scores if self.evaluations else {}


def read_results(paths: Sequence[Path]) -> list[Result]:
    """Results from run folders, folders of run folders, and compact files, in any mixture.

    Raises:
        UserError: a path that is none of these, or a damaged file.
    """
    results: list[Result] = []
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


def compact(run: RunRecord) -> Result:
    """What is compared of a run folder."""
    facts = {key: run.facts[key] for key in KEPT_FACTS if key in run.facts}
    seconds = None
    if run.finished and "started" in facts:
        begun, ended = (datetime.fromisoformat(facts[key]) for key in ("started", "finished"))
        seconds = (ended - begun).total_seconds()
    tau = {}
    if run.temperatures:
        last = run.temperatures[-1]
        for side, values in (("image", last.image), ("text", last.text)):
            tau[side] = [float(f(values.astype(float))) for f in (np.mean, np.min, np.max, np.std)]
    curve = {}
    epochs, mean = run.series("tau/image_mean")
    low, high = run.series("tau/image_min")[1], run.series("tau/image_max")[1]
    if len(epochs):
        shown = evenly_spread(len(epochs), CURVE_POINTS)
        whole = len(low) == len(mean) == len(high)
        parts = (epochs, mean, low if whole else mean, high if whole else mean)
        curve = {
            key: values[shown].tolist() for key, values in zip(("epoch", "mean", "min", "max"), parts, strict=True)
        }
    by_frequency = _by_frequency(run.temperatures[-1]) if run.temperatures else {}
    table = public_table(run.config)
    table["out"] = Path(table["out"]).name  # where it lay on somebody's disk is nobody else's business
    return Result(run.config.name, table, facts, seconds, run.evaluations, tau, curve, by_frequency)


def _by_frequency(last: Temperatures) -> dict[str, list[float]]:
    sides = {"image": last.image, "text": last.text}
    bins = None if last.frequency is None else binned(last.frequency.astype(float), sides)
    if bins is None or last.frequency is None or None in bins.correlation.values():
        return {}
    places = range(len(bins.names))
    return {
        "frequency": [float(np.median(last.frequency[bins.of_item == place])) for place in places],
        **{side: bins.quartiles[side][1].tolist() for side in sides},
        "spearman": [float(value) for value in bins.correlation.values() if value is not None],
    }


def write_compact(results: Sequence[Result]) -> str:
    """The text of a compact file: one line a result, floats at 6 digits."""
    return "".join(json.dumps(_rounded(_to_line(result)), ensure_ascii=False) + "\n" for result in results)


def _to_line(result: Result) -> dict[str, Any]:
    final = to_record(result.final)
    return {
        "format": FORMAT,
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
    }


def _read_compact(path: Path) -> Iterator[Result]:
    try:
        lines = read_regular(path).decode("utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}") from None
    for number, line in enumerate(lines, 1):
        try:
            yield _from_line(json.loads(line))
        except (ValueError, KeyError, TypeError, AttributeError):
            raise UserError(f"{path}: line {number} is not a compact result") from None


def _from_line(line: dict[str, Any]) -> Result:
    if line["format"] != FORMAT:
        raise ValueError
    final = line["final"]
    evaluations = tuple(
        Evaluation(point["step"], point["epoch"], from_record({**final, "results": point["results"]}))
        for point in line["curve"]
    )
    result = Result(
        name=line["name"],
        config=line["config"],
        facts=line["facts"],
        seconds=line["seconds"],
        evaluations=evaluations,
        tau=line["tau"],
        tau_curve=line["tau_curve"],
        tau_by_frequency=line["tau_by_frequency"],
    )
    if result.seed != line["seed"] or not result.objective:
        raise ValueError
    return result


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, dict):
        return {key: _rounded(inner) if key != "config" else inner for key, inner in value.items()}
    return [_rounded(inner) for inner in value] if isinstance(value, list) else value
