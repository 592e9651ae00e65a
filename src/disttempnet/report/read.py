"""Read run folders: config, run.json, logged steps, evaluations, temperatures. Needs no model."""

from __future__ import annotations

import zipfile
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from disttempnet.config import Config, load_config
from disttempnet.errors import UserError, notice, unknown_name
from disttempnet.evaluation.scores import Scores, from_record
from disttempnet.io.files import read_json_lines
from disttempnet.losses import OBJECTIVES
from disttempnet.sanitize import one_line
from disttempnet.training.run_info import read_facts
from disttempnet.training.run_log import LOGS


class Evaluation(NamedTuple):
    """Scores by task after `step` steps, `epoch` epochs."""

    step: int
    epoch: float
    scores: dict[str, Scores]


class Temperatures(NamedTuple):
    """τ of the n pairs of the first evaluation task after `epoch` epochs.

    Objectives whose τ belongs to training samples log those instead.

    Attributes:
        image, text: float [n].
        frequency: int [n], number of training samples of the pair's concept; None where unknown.
    """

    epoch: float
    image: np.ndarray
    text: np.ndarray
    frequency: np.ndarray | None = None


@dataclass(frozen=True)
class RunRecord:
    """The content of a run folder.

    Attributes:
        facts: run.json.
        steps: lines of metrics.jsonl, in order of steps.
        evaluations, temperatures: in order of steps; empty before the first.
    """

    folder: Path
    config: Config
    facts: dict[str, Any]
    steps: tuple[dict[str, Any], ...]
    evaluations: tuple[Evaluation, ...]
    temperatures: tuple[Temperatures, ...]

    @property
    def title(self) -> str:
        """The display name of the objective."""
        return one_line(str(self.facts["objective"]["title"]))

    @property
    def has_own_temperatures(self) -> bool:
        """True if τ differs between pairs."""
        return any(np.ptp(side) > 1e-6 for snapshot in self.temperatures for side in (snapshot.image, snapshot.text))

    @property
    def finished(self) -> bool:
        return "finished" in self.facts

    @property
    def final(self) -> dict[str, Scores]:
        """The last evaluation by task; empty before the first."""
        return self.evaluations[-1].scores if self.evaluations else {}

    def series(self, key: str) -> tuple[np.ndarray, np.ndarray]:
        """Return (epochs, values) of the steps that logged `key`."""
        points = [(line["epoch"], line[key]) for line in self.steps if line.get(key) is not None]
        table = np.array(points, dtype=float).reshape(-1, 2)
        return table[:, 0], table[:, 1]


def read_run(folder: Path) -> RunRecord:
    """Read a run folder, finished or not.

    Raises:
        UserError: no run folder, or a damaged config. Other damaged files are skipped with a notice.
    """
    for name in ("config.toml", "run.json"):
        if not (folder / name).is_file():
            raise UserError(f"{folder}: not a run folder (it has no {name})")
    config = load_config(folder / "config.toml", bounds=False)
    facts = read_facts(folder)
    if "objective" not in facts:  # run.json is damaged: the title comes from the config
        if config.loss.name not in OBJECTIVES:
            raise UserError(f"{folder / 'config.toml'}: {unknown_name('objective', config.loss.name, OBJECTIVES)}")
        objective = OBJECTIVES[config.loss.name]
        facts["objective"] = {"name": config.loss.name, "title": objective.title, "formula": objective.formula}
    evaluations = tuple(
        Evaluation(line["step"], line["epoch"], from_record(line)) for line in _lines(folder / "eval.jsonl")
    )
    return RunRecord(
        folder=folder,
        config=config,
        facts=facts,
        steps=tuple(_lines(folder / "metrics.jsonl")),
        evaluations=evaluations,
        temperatures=tuple(_temperatures(folder, evaluations)),
    )


def distinct_titles(runs: Sequence[RunRecord]) -> list[str]:
    """Return a title for each run, different from all others.

    Where objectives repeat, the run's name is added. Where names repeat too, it is the end of the run's path that no
    other of them has.
    """
    counts = Counter(run.title for run in runs)
    named = [run.title if counts[run.title] == 1 else f"{run.title} ({run.config.name})" for run in runs]
    same: dict[str, list[int]] = {}
    for place, title in enumerate(named):
        same.setdefault(title, []).append(place)
    for places in same.values():
        if len(places) > 1:
            ends = _distinct_ends([runs[place].folder for place in places])
            for place, end in zip(places, ends, strict=True):
                named[place] = f"{runs[place].title} ({end})"
    return named


def _distinct_ends(folders: Sequence[Path]) -> list[str]:
    """Return the last parts of each path, as few as tell all of them apart; equal paths are numbered."""
    parts = [folder.absolute().parts for folder in folders]
    longest = max(map(len, parts))
    ends = ["/".join(own).replace("//", "/") for own in parts]
    for length in range(1, longest):
        cut = ["/".join(own[-length:]) for own in parts]
        if len(set(cut)) == len(set(parts)):
            ends = cut
            break
    seen: Counter[str] = Counter()
    for place, end in enumerate(ends):
        seen[end] += 1
        ends[place] = f"{end}, again" if seen[end] == 2 else f"{end}, {seen[end]}" if seen[end] > 2 else end
    return ends


def _lines(path: Path) -> list[dict[str, Any]]:
    return [line for _, line in read_json_lines(path, LOGS[path.name])]


def _temperatures(folder: Path, evaluations: Sequence[Evaluation]) -> Iterator[Temperatures]:
    """Yield the snapshot of each evaluation. Snapshots past the last one are left over from an interruption."""
    for evaluation in evaluations:
        path = folder / "temperatures" / f"step-{evaluation.step:08d}.npz"
        if not path.is_file():
            continue
        try:
            with np.load(path, allow_pickle=False) as arrays:
                frequency = arrays.get("frequency")
                found = Temperatures(evaluation.epoch, arrays["image"], arrays["text"], frequency)
                if not all(side.ndim == 1 and side.dtype.kind == "f" and len(side) for side in found[1:3]):
                    raise ValueError("its arrays do not hold τ")
                yield found
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error) as error:
            notice(f"{path}: skipped: not a file of temperatures: {error}")
