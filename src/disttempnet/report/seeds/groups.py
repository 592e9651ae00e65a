"""Runs that differ only in their seed are one group; a group's metric is a mean with the spread over its seeds.
Keys that the result does not depend on (data.workers, …) do not tell runs apart.

The marking rule: the highest mean of a column is the best. Another one is within reach where it lies no further from
the best than one standard deviation, the larger of the two groups'. Nothing else is claimed.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, NamedTuple

import numpy as np

from disttempnet.config import defaults, flat
from disttempnet.errors import UserError, unknown_name
from disttempnet.evaluation.results.averages import average_title, counted_tags
from disttempnet.evaluation.scores import metric_title, tasks_of
from disttempnet.evaluation.tasks import task_title
from disttempnet.report.compact import Result
from disttempnet.training.checkpoint import NOT_PART_OF_THE_RESULT

AVERAGES = "averages"  # takes the place of a task; its metrics are the tags that averages are taken over
THIRDS = ("acc1_head", "acc1_middle", "acc1_tail")
MAIN_METRICS = ("acc1", "mean_recall", *THIRDS)
ROUNDING = 1e-12
MARK_RULE = "best in bold; † within one standard deviation of it (the larger of the two groups')"


class Column(NamedTuple):
    """A metric of a task; of `AVERAGES` a group of tasks."""

    task: str
    metric: str

    @property
    def head(self) -> str:
        """What stands below the task's title."""
        if self.task != AVERAGES:
            return metric_title(self.metric)
        return average_title(self.metric, sum(self.metric in tags for tags in counted_tags().values()))

    @property
    def title(self) -> str:
        return self.head if self.task == AVERAGES else f"{task_title(self.task)}: {self.head}"


class Cell(NamedTuple):
    """A metric of a group: shares in [0, 1]. `std` is the sample's (n − 1), None for one seed.

    `mark` is "best", "near" (within one standard deviation of the best) or "".
    """

    mean: float
    std: float | None
    n: int
    mark: str = ""


class Published(NamedTuple):
    """A published row: shares in [0, 1] by column, and the notes that it needs. Its runs are counted as 0: unknown."""

    title: str
    notes: tuple[str, ...]
    values: Mapping[Column, Cell]


@dataclass(frozen=True)
class Group:
    """Runs of one config over several seeds.

    Attributes:
        title: the objective, and what tells it from other groups of the same objective.
        line: the title without the batch size.
        results: by seed.
    """

    title: str
    line: str
    results: tuple[Result, ...]

    @property
    def batch(self) -> int:
        return int(self.results[0].config["data"]["global_batch"])

    @property
    def seeds(self) -> list[int]:
        return [result.seed for result in self.results]

    def cell(self, column: Column) -> Cell | None:
        """The final value of a metric over the seeds that measured it; None where none did."""
        values = [r.final[column.task].metrics.get(column.metric) for r in self.results if column.task in r.final]
        return cell_of([value for value in values if value is not None])


@dataclass(frozen=True)
class Comparison:
    """Groups × columns: `cells[g][c]`, None where a group lacks the metric; `chance[c]`.

    `digits` behind the point of a percentage; `published` rows stand below the groups and are never marked.
    """

    groups: tuple[Group, ...]
    columns: tuple[Column, ...]
    cells: tuple[tuple[Cell | None, ...], ...]
    chance: tuple[float | None, ...]
    unfinished: tuple[str, ...]
    digits: int = 1
    published: tuple[Published, ...] = ()

    @property
    def heads(self) -> list[tuple[str, int]]:
        """(title, columns) of each run of columns of one task."""
        spans = [(task, len(list(columns))) for task, columns in groupby(self.columns, lambda column: column.task)]
        return [("" if task == AVERAGES else task_title(task), span) for task, span in spans]

    @property
    def has_heads(self) -> bool:
        return any(title for title, _ in self.heads)

    @property
    def rows(self) -> list[tuple[Group, tuple[Cell | None, ...]]]:
        return list(zip(self.groups, self.cells, strict=True))

    @property
    def by_column(self) -> list[tuple[Column, list[Cell | None]]]:
        return [(column, [cells[c] for cells in self.cells]) for c, column in enumerate(self.columns)]

    @property
    def has_chance(self) -> bool:
        return any(value is not None for value in self.chance)

    @property
    def notes(self) -> list[str]:
        """Those of the published rows, each once."""
        return list(dict.fromkeys(note for row in self.published for note in row.notes))


def cell_of(values: Sequence[float]) -> Cell | None:
    """Mean and sample standard deviation of one value a seed."""
    if not values:
        return None
    std = float(np.std(values, ddof=1)) if len(values) > 1 else None
    return Cell(float(np.mean(values)), std, len(values))


def compare_groups(results: Sequence[Result], metrics: Sequence[str] = ()) -> Comparison:
    """Group finished runs by their configs and compare the groups.

    Args:
        results: runs in any order; the groups come in the order of their first run.
        metrics: `TASK/METRIC` to show; empty = every task's main metrics.

    Raises:
        UserError: no finished run, an unknown metric, or one seed twice in a group.
    """
    finished = [result for result in results if result.finished]
    if not finished:
        raise UserError("none of the runs is finished: there is nothing to compare yet")
    groups = _grouped(finished)
    columns = _columns(finished, metrics)
    marked = [mark([group.cell(column) for group in groups]) for column in columns]
    chance = tuple(
        next((r.final[c.task].chance.get(c.metric) for r in finished if c.task in r.final), None) for c in columns
    )
    cells = tuple(tuple(column[g] for column in marked) for g in range(len(groups)))
    unfinished = tuple(result.name for result in results if not result.finished)
    return Comparison(tuple(groups), columns, cells, chance, unfinished)


def mark(cells: Sequence[Cell | None]) -> list[Cell | None]:
    """The cells of one column, the best one and those within one standard deviation of it marked."""
    known = [cell for cell in cells if cell is not None]
    if len(known) < 2:
        return list(cells)
    best = max(known, key=lambda cell: cell.mean)

    def marked(cell: Cell | None) -> Cell | None:
        if cell is None or cell.mean >= best.mean - ROUNDING:  # equal ones are all the best
            return cell and cell._replace(mark="best")
        reach = max(best.std or 0.0, cell.std or 0.0)
        return cell._replace(mark="near" if best.mean - cell.mean <= reach + ROUNDING else "")

    return [marked(cell) for cell in cells]


def families(groups: Sequence[Group]) -> list[list[Group]]:
    """Groups that differ in the global batch only, by batch; families of one are left out."""
    found: dict[str, list[Group]] = {}
    for group in groups:
        found.setdefault(_key(group.results[0].config, without_batch=True), []).append(group)
    return [sorted(family, key=lambda g: g.batch) for family in found.values() if len(family) > 1]


def by_config(results: Sequence[Result]) -> list[list[Result]]:
    """Runs of one config together, in the order of the first of each."""
    members: dict[str, list[Result]] = {}
    for result in results:
        members.setdefault(_key(result.config), []).append(result)
    return list(members.values())


def _grouped(results: Sequence[Result]) -> list[Group]:
    members = by_config(results)
    for same in members:
        seed, times = Counter(result.seed for result in same).most_common(1)[0]
        if times > 1:
            names = sorted({result.name for result in same if result.seed == seed})
            raise UserError(f"seed {seed} of {', '.join(names)} was given {times} times; give each run once")
    ordered = [tuple(sorted(same, key=lambda r: r.seed)) for same in members]
    titles = _titles([same[0] for same in ordered])
    return [Group(title, line, same) for (title, line), same in zip(titles, ordered, strict=True)]


def _titles(firsts: Sequence[Result]) -> list[tuple[str, str]]:
    """(title, title without the batch size) a group: the objective, its run's name where needed, what varies."""
    stems = [re.split(r"--(?!\d)", result.name.partition("--seed-")[0]) for result in firsts]  # but bias--0.1: −0.1
    objectives = [result.objective for result in firsts]
    names: dict[str, set[str]] = {}
    for objective, stem in zip(objectives, stems, strict=True):
        names.setdefault(objective, set()).add(stem[0])
    titles = []
    for objective, (name, *varied) in zip(objectives, stems, strict=True):
        own = [f"{objective} ({name})" if len(names[objective]) > 1 else objective]
        words = [(part, part.replace("-", " ", 1).replace("global_batch", "batch")) for part in varied]
        line = ", ".join(own + [text for part, text in words if not part.startswith("global_batch-")])
        titles.append((", ".join(own + [text for _, text in words]), line))
    counts = Counter(title for title, _ in titles)  # one name, two configs: the full names tell at least the folders
    return [
        (f"{title} [{result.config['out']}/{result.name}]" if counts[title] > 1 else title, line)
        for (title, line), result in zip(titles, firsts, strict=True)
    ]


def _key(config: dict[str, Any], without_batch: bool = False) -> str:
    """What the result depends on but for the seed, as text; keys that an old config lacks have their defaults."""
    left_out = {*NOT_PART_OF_THE_RESULT, "train.seed"} | ({"data.global_batch"} if without_batch else set())
    table = defaults() | flat(config)
    return json.dumps({key: value for key, value in table.items() if key not in left_out}, sort_keys=True)


def _columns(results: Sequence[Result], metrics: Sequence[str]) -> tuple[Column, ...]:
    final = [result.final for result in results]
    known = [
        Column(task, metric)
        for task in tasks_of(final)
        for metric in dict.fromkeys(m for scores in final if task in scores for m in scores[task].metrics)
    ]
    if not metrics:
        return tuple(sorted((c for c in known if c.metric in MAIN_METRICS), key=lambda c: _place(c, known)))
    by_name = {f"{column.task}/{column.metric}": column for column in known}
    for metric in metrics:
        if metric not in by_name:
            raise UserError(unknown_name("metric", metric, by_name))
    return tuple(by_name[metric] for metric in metrics)


def _place(column: Column, known: Sequence[Column]) -> tuple[int, int]:
    """Tasks in their order, metrics in the order of MAIN_METRICS."""
    tasks = list(dict.fromkeys(c.task for c in known))
    return tasks.index(column.task), MAIN_METRICS.index(column.metric)
