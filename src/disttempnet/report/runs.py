"""Reads run folders: config, facts, logged steps, evaluations, temperatures. Nothing here needs the model."""

from __future__ import annotations

import json
import zipfile
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from disttempnet.config import Config, load_config
from disttempnet.errors import UserError
from disttempnet.evaluation.scores import Scores, from_record


class Evaluation(NamedTuple):
    """Scores by task after `step` steps, `epoch` epochs."""

    step: int
    epoch: float
    scores: dict[str, Scores]


class Temperatures(NamedTuple):
    """τ of every pair of the first evaluation task after `epoch` epochs: float [n] for each side.

    Of training samples where only those have a τ. frequency: [n], training samples of the pair's concept; None where
    that is unknown.
    """

    epoch: float
    image: np.ndarray
    text: np.ndarray
    frequency: np.ndarray | None = None


@dataclass(frozen=True)
class RunRecord:
    """What a run folder says.

    Attributes:
        facts: run.json.
        steps: lines of metrics.jsonl, by step.
        evaluations, temperatures: by step; empty where the run has not come so far.
    """

    folder: Path
    config: Config
    facts: dict[str, Any]
    steps: tuple[dict[str, Any], ...]
    evaluations: tuple[Evaluation, ...]
    temperatures: tuple[Temperatures, ...]

    @property
    def title(self) -> str:
        """The objective's written name."""
        return str(self.facts["objective"]["title"])

    @property
    def has_own_temperatures(self) -> bool:
        """Whether τ differs between pairs."""
        return any(np.ptp(side) > 1e-6 for snapshot in self.temperatures for side in (snapshot.image, snapshot.text))

    @property
    def finished(self) -> bool:
        return "finished" in self.facts

    @property
    def final(self) -> dict[str, Scores]:
        """The last evaluation by task; empty before the first."""
        return self.evaluations[-1].scores if self.evaluations else {}

    def series(self, key: str) -> tuple[np.ndarray, np.ndarray]:
        """(epochs, values) of the steps that logged `key`."""
        points = [(line["epoch"], line[key]) for line in self.steps if line.get(key) is not None]
        table = np.array(points, dtype=float).reshape(-1, 2)
        return table[:, 0], table[:, 1]


def read_run(folder: Path) -> RunRecord:
    """Read a run folder, finished or not.

    Raises:
        UserError: the folder is no run, or one of its files is damaged (a half-written last line is not).
    """
    for name in ("config.toml", "run.json"):
        if not (folder / name).is_file():
            raise UserError(f"{folder}: not a run folder (it has no {name})")
    try:
        facts = json.loads((folder / "run.json").read_text(encoding="utf-8"))
        facts["objective"]["title"]
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{folder / 'run.json'}: damaged, not a run's facts") from None
    evaluations = tuple(
        Evaluation(line["step"], line["epoch"], from_record(line)) for line in _lines(folder / "eval.jsonl")
    )
    return RunRecord(
        folder=folder,
        config=load_config(folder / "config.toml"),
        facts=facts,
        steps=tuple(_lines(folder / "metrics.jsonl")),
        evaluations=evaluations,
        temperatures=tuple(_temperatures(folder, evaluations)),
    )


def distinct_titles(runs: Sequence[RunRecord]) -> list[str]:
    """A title for each run; the run's own name is added where objectives repeat."""
    counts = Counter(run.title for run in runs)
    names = Counter((run.title, run.config.name) for run in runs)

    def title(run: RunRecord) -> str:
        if counts[run.title] == 1:
            return run.title
        own = run.config.name if names[run.title, run.config.name] == 1 else str(run.folder)
        return f"{run.title} ({own})"

    return [title(run) for run in runs]


def _lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a JSON-lines file; a last line that a running or killed process left half-written is dropped."""
    if not path.is_file():
        return []
    lines = path.read_text(encoding="utf-8").splitlines()
    parsed = []
    for number, line in enumerate(lines, 1):
        try:
            parsed.append(json.loads(line))
        except ValueError:
            if number < len(lines):
                raise UserError(f"{path}: line {number} is not JSON") from None
    return parsed


def _temperatures(folder: Path, evaluations: Sequence[Evaluation]) -> Iterator[Temperatures]:
    """The snapshots beside the evaluations; those that an interrupted run left past its last one do not count."""
    for evaluation in evaluations:
        path = folder / "temperatures" / f"step-{evaluation.step:08d}.npz"
        if not path.is_file():
            continue
        try:
            with np.load(path, allow_pickle=False) as arrays:
                frequency = arrays.get("frequency")
                yield Temperatures(evaluation.epoch, arrays["image"], arrays["text"], frequency)
        except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
            raise UserError(f"{path}: not a file of temperatures: {error}") from None
