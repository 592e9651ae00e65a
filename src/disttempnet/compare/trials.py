"""Tuning of a comparison: each run's settings are tried on a seed of their own, and the best by one metric is chosen.

All values of a run's tuned keys are tried with each other. Where the best lies at the edge of a key's values, the next
value beyond is tried, the others left at the best, until the best lies inside or `widen` values were added.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

from disttempnet.compare.grid import TUNING, Grid, GridCell
from disttempnet.config import Config
from disttempnet.errors import UserError
from disttempnet.io.files import read_json_lines
from disttempnet.training.run_info import read_facts
from disttempnet.training.run_log import LOGS

Setting = tuple[Any, ...]  # a value for each tuned key
_DIGITS = 3  # of a value beyond the edge


@dataclass(frozen=True)
class CellTuning:
    """The trials of a cell.

    Attributes:
        scores: setting → the metric at the end of its run, of the finished ones.
        waiting: settings to try next; empty where the choice is made.
    """

    cell: GridCell
    scores: Mapping[Setting, float]
    waiting: tuple[Setting, ...]

    @property
    def best(self) -> Setting:
        """The setting with the highest score; the first tried one among equals."""
        return max(self.scores, key=lambda setting: self.scores[setting])

    @property
    def at_edge(self) -> list[str]:
        """The keys whose best value has tried values on one side only."""
        return [key for number, key in enumerate(self.cell.tuned) if _edge(self, number) is not None]

    def record(self, metric: str, seed: int) -> dict[str, Any]:
        """Return the tuning as plain values, a line of tuning.jsonl."""
        return {
            "name": self.cell.name,
            "run": self.cell.run,
            "varied": dict(self.cell.varied),
            "metric": metric,
            "seed": seed,
            "trials": [
                {"setting": dict(zip(self.cell.tuned, setting, strict=True)), "score": score}
                for setting, score in self.scores.items()
            ],
            "chosen": dict(zip(self.cell.tuned, self.best, strict=True)),
            "at_edge": self.at_edge,
        }


def tuning_of(grid: Grid) -> list[CellTuning]:
    """Return the tuning of each tuned cell, as far as its trials in `out`/tuning are finished."""
    return [_tuning(grid, cell) for cell in grid.cells if cell.tuned]


def missing_trials(grid: Grid, tunings: Sequence[CellTuning]) -> list[Config]:
    """Return the runs that the choices wait for."""
    return [_trial(grid, tuning.cell, setting) for tuning in tunings for setting in tuning.waiting]


def chosen_settings(tunings: Sequence[CellTuning]) -> dict[str, Setting]:
    """Return the chosen setting of each cell that waits for no trial."""
    return {tuning.cell.name: tuning.best for tuning in tunings if not tuning.waiting}


def write_tuning(grid: Grid, tunings: Sequence[CellTuning]) -> str:
    """Return the text of tuning.jsonl: a line for each cell whose setting is chosen."""
    assert grid.tune is not None
    done = [tuning for tuning in tunings if not tuning.waiting]
    return "".join(json.dumps(tuning.record(grid.tune.metric, grid.tune.seed)) + "\n" for tuning in done)


def _trial(grid: Grid, cell: GridCell, setting: Setting) -> Config:
    """Return the run of a setting. It evaluates the metric's task alone: the others are asked once, at the end."""
    assert grid.tune is not None
    config = cell.config(str(grid.out / TUNING), grid.tune.seed, setting, trial=True)
    task = grid.tune.metric.rpartition("/")[0]
    tasks = tuple(name for name in config.eval.tasks if name == task)
    return config.model_copy(update={"eval": config.eval.model_copy(update={"tasks": tasks})})


def _tuning(grid: Grid, cell: GridCell) -> CellTuning:
    assert grid.tune is not None
    scores: dict[Setting, float] = {}
    wanted = list(product(*cell.tuned.values()))
    while True:
        # the scores of what is wanted; the choice waits for those without one
        for setting in wanted:
            if (score := _score(_trial(grid, cell, setting), grid.tune.metric)) is not None:
                scores[setting] = score
        tuning = CellTuning(cell, scores, tuple(setting for setting in wanted if setting not in scores))
        if tuning.waiting:
            return tuning

        # the next values beyond an edge that holds the best
        wanted = list(_beyond(tuning, grid.tune.widen))
        if not wanted:
            return tuning


def _score(config: Config, metric: str) -> float | None:
    """Return the metric of a finished trial; None for another one."""
    if "finished" not in read_facts(config.folder):
        return None
    path = config.folder / "eval.jsonl"
    lines = [line for _, line in read_json_lines(path, LOGS[path.name])]
    task, _, name = metric.rpartition("/")
    found = lines[-1]["results"].get(task, {}) if lines else {}
    if name not in found:
        known = ", ".join(found) or "none"
        raise UserError(f"{path}: tune.metric: task '{task}' has no metric '{name}'; it has {known}")
    return float(found[name])


def _edge(tuning: CellTuning, number: int) -> int | None:
    """Return −1 or 1 where the best is the lowest or highest tried value of a numeric key, else None.

    Tried are the values beside which all other keys are at their best.
    """
    best = tuning.best
    line = _line(tuning, number)
    if len(line) < 2:
        return None
    return -1 if best[number] == line[0] else 1 if best[number] == line[-1] else None


def _line(tuning: CellTuning, number: int) -> list[float]:
    """Return the tried values of a numeric key in order, all other keys at their best."""
    best = tuning.best
    values = [s[number] for s in tuning.scores if s[:number] + s[number + 1 :] == best[:number] + best[number + 1 :]]
    numeric = all(isinstance(value, (int, float)) and not isinstance(value, bool) and value > 0 for value in values)
    return sorted(values) if numeric else []


def _beyond(tuning: CellTuning, widen: int) -> Iterator[Setting]:
    """Yield the settings beyond the edges that hold the best, at the ratio of the two values before."""
    best = tuning.best
    for number, values in enumerate(tuning.cell.tuned.values()):
        if (edge := _edge(tuning, number)) is None:
            continue
        line = _line(tuning, number)
        first, second = (line[0], line[1]) if edge < 0 else (line[-1], line[-2])
        added = sum(value not in values for value in line)
        value = float(f"{first * first / second:.{_DIGITS}g}")
        if isinstance(first, int) and isinstance(second, int):
            value = round(value)
        if (
            added < widen
            and value not in line
            and value > 0
            and _allowed(tuning.cell, (*best[:number], value, *best[number + 1 :]))
        ):
            yield (*best[:number], value, *best[number + 1 :])


def _allowed(cell: GridCell, setting: Setting) -> bool:
    """Return true if a config may have this setting."""
    from disttempnet.training.model import resolved

    try:
        resolved(cell.config("runs", 0, setting))
    except UserError:
        return False
    return True
