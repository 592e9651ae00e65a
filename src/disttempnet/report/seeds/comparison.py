"""A table of groups × metrics: the best of every column, and differences to a baseline.

A difference is paired by seed. It needs the same training data and the same evaluation on both sides. Where a grid
varies keys, a group is compared with the baseline at its own values of these keys.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from math import isclose
from typing import NamedTuple

from disttempnet.errors import UserError, unknown_name
from disttempnet.evaluation.scores import tasks_of
from disttempnet.evaluation.tasks import task_title
from disttempnet.report.compact import CompactResult
from disttempnet.report.seeds.groups import AVERAGES, HEAD_TO_TAIL, Cell, Column, SeedGroup, group_by_seed
from disttempnet.report.seeds.intervals import CONFIDENCE, ROUNDING, PairedDifference, paired_difference

MAIN_METRICS = ("acc1", "mean_recall", *HEAD_TO_TAIL)


class Published(NamedTuple):
    """A published row: shares in [0, 1] by column, and its notes. The number of its runs is unknown, given as 0."""

    title: str
    notes: tuple[str, ...]
    values: Mapping[Column, Cell]


@dataclass(frozen=True)
class GroupComparison:
    """A table of groups × columns.

    Attributes:
        cells: `cells[g][c]`, None where a group lacks the metric.
        chance: of each column.
        unfinished: names of runs that were left out.
        baselines: the group that each group is compared with; None for a baseline, and where it has none.
        differences: `differences[g][c]`, to the baseline of group g; None without a shared seed.
        digits: decimals of a percentage.
        published: rows below the groups, never marked.
    """

    groups: tuple[SeedGroup, ...]
    columns: tuple[Column, ...]
    cells: tuple[tuple[Cell | None, ...], ...]
    chance: tuple[float | None, ...]
    unfinished: tuple[str, ...]
    baselines: tuple[SeedGroup | None, ...]
    differences: tuple[tuple[PairedDifference | None, ...], ...]
    digits: int = 1
    published: tuple[Published, ...] = ()

    def only(self, columns: Sequence[Column]) -> GroupComparison:
        """Return the same groups with only these of the columns."""
        kept = [c for c, column in enumerate(self.columns) if column in columns]
        return replace(
            self,
            columns=tuple(self.columns[c] for c in kept),
            cells=tuple(tuple(row[c] for c in kept) for row in self.cells),
            chance=tuple(self.chance[c] for c in kept),
            differences=tuple(tuple(row[c] for c in kept) for row in self.differences),
        )

    @property
    def heads(self) -> list[tuple[str, int]]:
        """Titles of tasks, each with its number of adjacent columns, differences included."""
        widths = zip(self.columns, self.with_difference, strict=True)
        spans = [
            (task, sum(1 + has for _, has in columns)) for task, columns in groupby(widths, lambda pair: pair[0].task)
        ]
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
    def intervals(self) -> list[PairedDifference]:
        """The differences that have a confidence interval."""
        return [one for row in self.differences for one in row if one is not None and one.interval is not None]

    def is_baseline(self, group: SeedGroup) -> bool:
        """Return whether other groups are compared with this one."""
        return any(base is group for base in self.baselines)

    @property
    def with_difference(self) -> list[bool]:
        """For each column whether any group has a difference with an interval, which stands beside it then."""
        has = [[one is not None and one.interval is not None for one in row] for row in self.differences]
        return [any(column) for column in zip(*has, strict=True)]

    @property
    def baseline_titles(self) -> list[str]:
        """Titles of the baselines, each once."""
        return list(dict.fromkeys(base.title for base in self.baselines if base is not None))

    @property
    def baseline_title(self) -> str:
        """The title of the baseline: without varied keys where there are several, empty where there is none."""
        titles = self.baseline_titles
        return titles[0] if len(titles) == 1 else next((base.run_title for base in self.baselines if base), "")

    @property
    def difference_head(self) -> str:
        """The heading of a column of differences."""
        return f"difference to {self.baseline_title}, {100 * CONFIDENCE:g} %"

    @property
    def has_chance(self) -> bool:
        return any(value is not None for value in self.chance)

    @property
    def notes(self) -> list[str]:
        """Notes of the published rows, each once."""
        return list(dict.fromkeys(note for row in self.published for note in row.notes))


def compare_groups(
    results: Sequence[CompactResult], metrics: Sequence[str] = (), baseline: str = ""
) -> GroupComparison:
    """Group finished runs by config and compare the groups.

    Args:
        results: runs in any order; groups are in the order of their first run.
        metrics: `TASK/METRIC` to show; empty = the main metrics of every task.
        baseline: the name of a run without its seed, or the title of a group, that the others are compared with;
            empty = the first one.

    Raises:
        UserError: no finished run, an unknown metric or baseline, or one seed twice in a group.
    """
    finished = [result for result in results if result.finished]
    if not finished:
        raise UserError("none of the runs is finished: there is nothing to compare yet")
    # groups × columns, the best of each column marked
    groups = group_by_seed(finished)
    columns = _columns(finished, metrics)
    marked = [mark([group.cell(column) for group in groups]) for column in columns]
    cells = tuple(tuple(column[g] for column in marked) for g in range(len(groups)))
    chance = tuple(
        next((r.final[c.task].chance.get(c.metric) for r in finished if c.task in r.final), None) for c in columns
    )
    # differences to the baseline
    baselines = _baselines(groups, baseline)
    differences = tuple(
        tuple(None if base is None else group_difference(group, base, column) for column in columns)
        for group, base in zip(groups, baselines, strict=True)
    )
    unfinished = tuple(result.name for result in results if not result.finished)
    return GroupComparison(tuple(groups), columns, cells, chance, unfinished, tuple(baselines), differences)


def mark(cells: Sequence[Cell | None]) -> list[Cell | None]:
    """Return the cells of a column with the best one marked; ties are all the best."""
    known = [cell.mean for cell in cells if cell is not None]
    if len(known) < 2:
        return list(cells)
    lead = max(known) - ROUNDING
    return [cell and (cell._replace(mark="best") if cell.mean >= lead else cell) for cell in cells]


def _baselines(groups: Sequence[SeedGroup], name: str) -> list[SeedGroup | None]:
    """Return the baseline of each group: the named run at the same varied keys; None for a baseline."""
    # one group by its title, or the groups of a run
    candidates = [group for group in groups if name in (group.title, "--".join((group.run, *group.varied)))]
    candidates = candidates or [group for group in groups if group.run == (name or groups[0].run)]
    if not candidates:
        raise UserError(unknown_name("baseline", name, dict.fromkeys(group.run for group in groups)))
    at_varied = {group.varied: group for group in candidates}
    if len(at_varied) < len(candidates):
        if name:
            titles = ", ".join(group.title for group in candidates)
            raise UserError(f"the baseline '{name}' is several groups; give the title of one: {titles}")
        candidates = [groups[0]]
    # of one candidate for all, or the one at the same varied keys
    alone = candidates[0] if len(candidates) == 1 else None
    return [None if group in candidates else alone or at_varied.get(group.varied) for group in groups]


def group_difference(group: SeedGroup, base: SeedGroup, column: Column) -> PairedDifference | None:
    """Return group − base in a metric, over the seeds that both have measured on the same data.

    Returns:
        None without such a seed.
    """
    of_group, of_base = ({result.seed: result for result in one.results} for one in (group, base))
    seeds = [seed for seed in of_group if seed in of_base and _compare_alike(of_group[seed], of_base[seed], column)]
    values, base_values = (
        {seed: of_seed[seed].final[column.task].metrics[column.metric] for seed in seeds}
        for of_seed in (of_group, of_base)
    )
    return paired_difference(values, base_values)


def _compare_alike(run: CompactResult, base: CompactResult, column: Column) -> bool:
    """Return whether two runs were trained on the same samples and evaluated in the same way."""
    # training data: by digest and number of samples where both know them, else by name
    known = [key for key in ("index_digest", "num_samples") if run.facts.get(key) and base.facts.get(key)]
    if any(run.facts[key] != base.facts[key] for key in known):
        return False
    if not known and run.config.get("data", {}).get("train") != base.config.get("data", {}).get("train"):
        return False
    # evaluation: images, queries and chance
    scores, others = run.final.get(column.task), base.final.get(column.task)
    if scores is None or others is None or not (column.metric in scores.metrics and column.metric in others.metrics):
        return False
    chances = [one.chance.get(column.metric, 0.0) for one in (scores, others)]
    return (
        scores.samples == others.samples
        and scores.trials.get(column.metric) == others.trials.get(column.metric)
        and isclose(*chances, rel_tol=1e-4)
    )


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
