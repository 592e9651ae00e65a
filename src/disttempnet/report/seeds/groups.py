"""Groups of runs that differ only in the seed, with mean and standard deviation of every metric.

Keys that do not affect the result (data.workers, …) do not separate groups.

The marking rule: the highest mean of a column is the best. Another mean is marked as near if it lies within one
standard deviation of the best, the larger of the two groups'.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import NamedTuple

import numpy as np

from disttempnet.config import defaults, flat
from disttempnet.config.identity import NO_EFFECT_ON_RESULT
from disttempnet.errors import UserError, unknown_name
from disttempnet.evaluation.results.averages import average_title, counted_tags
from disttempnet.evaluation.scores import metric_title, tasks_of
from disttempnet.evaluation.tasks import task_title
from disttempnet.losses import with_later_arguments
from disttempnet.report.compact import CompactResult

AVERAGES = "averages"  # stands for a task; its metrics are the tags of averages
HEAD_TO_TAIL = ("acc1_head", "acc1_middle", "acc1_tail")
MAIN_METRICS = ("acc1", "mean_recall", *HEAD_TO_TAIL)
ROUNDING = 1e-12
MARK_RULE = "best in bold; † within one standard deviation of it (the larger of the two groups')"


class Column(NamedTuple):
    """A column of a table: a metric of a task, or an average over tasks (`AVERAGES`)."""

    task: str
    metric: str

    @property
    def head(self) -> str:
        """The heading below the title of the task."""
        if self.task != AVERAGES:
            return metric_title(self.metric)
        return average_title(self.metric, sum(self.metric in tags for tags in counted_tags().values()))

    @property
    def title(self) -> str:
        return self.head if self.task == AVERAGES else f"{task_title(self.task)}: {self.head}"


class Cell(NamedTuple):
    """A metric of a group, as shares in [0, 1].

    Attributes:
        std: sample standard deviation (n − 1); None for one seed.
        n: number of seeds.
        mark: "best", "near" (within one standard deviation of the best) or "".
    """

    mean: float
    std: float | None
    n: int
    mark: str = ""


class Published(NamedTuple):
    """A published row: shares in [0, 1] by column, and its notes. The number of its runs is unknown, given as 0."""

    title: str
    notes: tuple[str, ...]
    values: Mapping[Column, Cell]


@dataclass(frozen=True)
class SeedGroup:
    """Runs of one config over several seeds.

    Attributes:
        title: the objective, and what distinguishes it from other groups of that objective.
        line: the title without the batch size.
        results: in order of seeds.
    """

    title: str
    line: str
    results: tuple[CompactResult, ...]

    @property
    def batch(self) -> int:
        return int(self.results[0].config["data"]["global_batch"])

    @property
    def seeds(self) -> list[int]:
        return [result.seed for result in self.results]

    def cell(self, column: Column) -> Cell | None:
        """Return the final metric over the seeds that measured it; None where none did."""
        values = [r.final[column.task].metrics.get(column.metric) for r in self.results if column.task in r.final]
        return cell_of([value for value in values if value is not None])


@dataclass(frozen=True)
class GroupComparison:
    """A table of groups × columns.

    Attributes:
        cells: `cells[g][c]`, None where a group lacks the metric.
        chance: of each column.
        unfinished: names of runs that were left out.
        digits: decimals of a percentage.
        published: rows below the groups, never marked.
    """

    groups: tuple[SeedGroup, ...]
    columns: tuple[Column, ...]
    cells: tuple[tuple[Cell | None, ...], ...]
    chance: tuple[float | None, ...]
    unfinished: tuple[str, ...]
    digits: int = 1
    published: tuple[Published, ...] = ()

    @property
    def heads(self) -> list[tuple[str, int]]:
        """Titles of tasks, each with its number of adjacent columns."""
        spans = [(task, len(list(columns))) for task, columns in groupby(self.columns, lambda column: column.task)]
        return [("" if task == AVERAGES else task_title(task), span) for task, span in spans]

    @property
    def has_heads(self) -> bool:
        return any(title for title, _ in self.heads)

    @property
    def rows(self) -> list[tuple[SeedGroup, tuple[Cell | None, ...]]]:
        return list(zip(self.groups, self.cells, strict=True))

    @property
    def by_column(self) -> list[tuple[Column, list[Cell | None]]]:
        return [(column, [cells[c] for cells in self.cells]) for c, column in enumerate(self.columns)]

    @property
    def has_chance(self) -> bool:
        return any(value is not None for value in self.chance)

    @property
    def notes(self) -> list[str]:
        """Notes of the published rows, each once."""
        return list(dict.fromkeys(note for row in self.published for note in row.notes))


def cell_of(values: Sequence[float]) -> Cell | None:
    """Return mean and sample standard deviation of a value for each seed."""
    if not values:
        return None
    std = float(np.std(values, ddof=1)) if len(values) > 1 else None
    return Cell(float(np.mean(values)), std, len(values))


def compare_groups(results: Sequence[CompactResult], metrics: Sequence[str] = ()) -> GroupComparison:
    """Group finished runs by config and compare the groups.

    Args:
        results: runs in any order; groups are in the order of their first run.
        metrics: `TASK/METRIC` to show; empty = the main metrics of every task.

    Raises:
        UserError: no finished run, an unknown metric, or one seed twice in a group.
    """
    finished = [result for result in results if result.finished]
    if not finished:
        raise UserError("none of the runs is finished: there is nothing to compare yet")
    # groups × columns, each column marked
    groups = _grouped(finished)
    columns = _columns(finished, metrics)
    marked = [mark([group.cell(column) for group in groups]) for column in columns]
    chance = tuple(
        next((r.final[c.task].chance.get(c.metric) for r in finished if c.task in r.final), None) for c in columns
    )
    cells = tuple(tuple(column[g] for column in marked) for g in range(len(groups)))
    unfinished = tuple(result.name for result in results if not result.finished)
    return GroupComparison(tuple(groups), columns, cells, chance, unfinished)


def mark(cells: Sequence[Cell | None]) -> list[Cell | None]:
    """Return the cells of a column with the best one and those near it marked."""
    known = [cell for cell in cells if cell is not None]
    if len(known) < 2:
        return list(cells)
    best = max(known, key=lambda cell: cell.mean)

    def marked(cell: Cell | None) -> Cell | None:
        if cell is None or cell.mean >= best.mean - ROUNDING:  # ties are all the best
            return cell and cell._replace(mark="best")
        reach = max(best.std or 0.0, cell.std or 0.0)
        return cell._replace(mark="near" if best.mean - cell.mean <= reach + ROUNDING else "")

    return [marked(cell) for cell in cells]


def families(groups: Sequence[SeedGroup]) -> list[list[SeedGroup]]:
    """Return families of two or more groups that differ only in the global batch, in order of batch."""
    found: dict[str, list[SeedGroup]] = {}
    for group in groups:
        found.setdefault(_key(group.results[0], without_batch=True), []).append(group)
    return [sorted(family, key=lambda g: g.batch) for family in found.values() if len(family) > 1]


def by_config(results: Sequence[CompactResult]) -> list[list[CompactResult]]:
    """Return runs grouped by config, in the order of the first run of each."""
    members: dict[str, list[CompactResult]] = {}
    for result in results:
        members.setdefault(_key(result), []).append(result)
    return list(members.values())


def _grouped(results: Sequence[CompactResult]) -> list[SeedGroup]:
    members = by_config(results)
    for same in members:
        seed, times = Counter(result.seed for result in same).most_common(1)[0]
        if times > 1:
            names = sorted({result.name for result in same if result.seed == seed})
            raise UserError(f"seed {seed} of {', '.join(names)} was given {times} times; give each run once")
    ordered = [tuple(sorted(same, key=lambda r: r.seed)) for same in members]
    titles = _titles([same[0] for same in ordered])
    return [SeedGroup(title, line, same) for (title, line), same in zip(titles, ordered, strict=True)]


def _titles(firsts: Sequence[CompactResult]) -> list[tuple[str, str]]:
    """Return (title, title without the batch size) of each group: objective, run name where needed, varied keys."""
    # names without the seed, split at `--`; not in bias--0.1, which means −0.1
    stems = [re.split(r"--(?!\d)", result.name.partition("--seed-")[0]) for result in firsts]
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
    counts = Counter(title for title, _ in titles)  # one name, two configs: add the folder
    return [
        (f"{title} [{result.config['out']}/{result.name}]" if counts[title] > 1 else title, line)
        for (title, line), result in zip(titles, firsts, strict=True)
    ]


def _key(result: CompactResult, without_batch: bool = False) -> str:
    """Return the keys that affect the result, except the seed, as text.

    Keys that an old config lacks are defaults; arguments of its objective are as it was trained. Tuned keys count as
    tuned, whatever was chosen.
    """
    config = result.config
    left_out = {*NO_EFFECT_ON_RESULT, "train.seed", *result.tuned} | ({"data.global_batch"} if without_batch else set())
    arguments = dict(config.get("loss", {}))  # an evaluation may know nothing of the training
    objective = arguments.pop("name", "")
    if objective:
        # an old ρ followed the batch: one for the family
        batch = 2 if without_batch else config["data"]["global_batch"]
        arguments = with_later_arguments(objective, arguments, batch)
    if arguments.get("tau_gradient") == "batch":
        left_out.add("loss.tau_gradient_limit")  # it bounds a part that only `fcco` adds
    table = defaults() | flat({**config, "loss": {"name": objective, **arguments}} if objective else config)
    kept = {key: value for key, value in table.items() if key not in left_out}
    return json.dumps([kept, sorted(result.tuned)], sort_keys=True)


def _columns(results: Sequence[CompactResult], metrics: Sequence[str]) -> tuple[Column, ...]:
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
    """Return the sort key of a column: its task in order of appearance, then its place in MAIN_METRICS."""
    tasks = list(dict.fromkeys(c.task for c in known))
    return tasks.index(column.task), MAIN_METRICS.index(column.metric)
