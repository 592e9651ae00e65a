"""The page over groups of seeds."""

from __future__ import annotations

from collections.abc import Sequence

from disttempnet.evaluation.tasks import task_title
from disttempnet.report.compact import CompactResult
from disttempnet.report.page import UNKNOWN, differing_keys, open_template, provenance_rows
from disttempnet.report.seeds import plots
from disttempnet.report.seeds.comparison import GroupComparison
from disttempnet.report.seeds.groups import HEAD_TO_TAIL, Column, SeedGroup, batch_label, families
from disttempnet.report.seeds.normaliser_table import normaliser_table
from disttempnet.report.seeds.tables import cell_text, difference_row, difference_text, legend, published_cells
from disttempnet.report.seeds.tau_tables import correlations, final_tau, groups_with_tau
from disttempnet.report.seeds.tuned_table import tuned_table

MOST_NAMED = 4  # groups on one side in a sentence


def comparison_page(comparison: GroupComparison) -> str:
    """Return the HTML page about groups of seeds: tables, learning curves, batch size, head to tail, τ."""
    groups = comparison.groups
    headlines = _headlines(comparison)
    with_tau = [group for group in groups if any(result.tau_curve for result in group.results)]
    with_frequency = groups_with_tau(comparison)
    same_batch = families(groups)
    return open_template("seeds.html").render(
        title=_title(groups),
        verdict=_verdict(comparison),
        groups=groups,
        table=comparison,
        results=_task_tables(comparison, [c for c in comparison.columns if c.metric not in HEAD_TO_TAIL]),
        unfinished=comparison.unfinished,
        legend=legend,
        published_cells=published_cells,
        cell=cell_text,
        difference_row=difference_row,
        learning=[
            (column.title, plots.learning_chart([plots.learning_series(g, column) for g in groups], chance))
            for column, chance in headlines
        ],
        batches=[
            (column.title, plots.batch_chart([plots.batch_series(f, column) for f in same_batch], chance))
            for column, chance in headlines
            if same_batch
        ],
        batch_label=batch_label(same_batch),
        parts=[
            (heading, part, plots.parts_chart(part))
            for heading, part, _ in _task_tables(
                comparison, [c for c in comparison.columns if c.metric in HEAD_TO_TAIL]
            )
        ],
        tau=plots.tau_chart(with_tau) if with_tau else "",
        frequency=plots.frequency_chart(with_frequency) if with_frequency else "",
        frequency_rows=[(group.title, *correlations(group)) for group in with_frequency],
        noted_tables=[
            (place, heading, table, mono)
            for place, heading, table, mono in (
                ("tuning", "Settings", tuned_table(comparison), True),  # columns are config keys
                ("normalisers", "Normalisers", normaliser_table(comparison), False),
            )
            if table
        ],
        tau_rows=[(group.title, *final_tau(group)) for group in groups],
        differences=differing_keys([g.results[0].config for g in groups], ("name", "out", "train.seed")),
        provenance=_provenance([result for group in groups for result in group.results]),
    )


def _task_tables(comparison: GroupComparison, columns: Sequence[Column]) -> list[tuple[str, GroupComparison, str]]:
    """Return (title of the task, table, chart of its differences) for each task of these columns."""
    tables = []
    for task in dict.fromkeys(column.task for column in columns):
        part = comparison.only([column for column in columns if column.task == task])
        tables.append((task_title(task), part, plots.difference_panels(part) if part.intervals else ""))
    return tables


def _verdict(comparison: GroupComparison) -> list[str]:
    """Return a sentence for the headline metric of each task: the groups whose interval excludes zero."""
    if len(comparison.groups) == 1 or not comparison.columns:
        return []
    if not comparison.intervals:
        return ["No two seeds are shared: differences have no interval, and nothing is claimed."]
    sentences = []
    for column, _ in _headlines(comparison):
        part = comparison.only([column])
        found = [
            (one, f"{group.title} ({difference_text(one, one.n, part.digits)})")
            for group, (one,) in zip(part.groups, part.differences, strict=True)
            if one is not None and one.interval is not None
        ]
        sides = [
            (side, _named([words for one, words in found if one.sign == sign]))
            for side, sign in (("ahead of", 1), ("behind", -1))
        ]
        words = "; ".join(f"{side} {part.baseline_title}: {named}" for side, named in sides if named)
        none = f"none of {len(found)} differences to {part.baseline_title} excludes zero"
        sentences.append(f"{task_title(column.task)}, {column.head}: {words or none}.")
    return sentences


def _named(groups: Sequence[str]) -> str:
    more = len(groups) - MOST_NAMED
    return ", ".join(groups[:MOST_NAMED]) + (f" and {more} more" if more > 0 else "")


def _headlines(comparison: GroupComparison) -> list[tuple[Column, float | None]]:
    """Return the first column of each task, with chance."""
    found: dict[str, tuple[Column, float | None]] = {}
    for column, chance in zip(comparison.columns, comparison.chance, strict=True):
        found.setdefault(column.task, (column, chance))
    return list(found.values())


def _title(groups: Sequence[SeedGroup]) -> str:
    seeds = sorted({len(group.results) for group in groups})
    number = str(seeds[0]) if len(seeds) == 1 else f"{seeds[0]} to {seeds[-1]}"
    what = groups[0].title if len(groups) == 1 else f"{len(groups)} configurations"
    return f"{what}, {number} seed{'s' if seeds != [1] else ''} each"


def _provenance(results: Sequence[CompactResult]) -> list[tuple[str, str]]:
    """Return how the runs were made as (name, value); several values where runs differ."""
    seconds = [result.seconds for result in results if result.seconds is not None]
    rows: dict[str, list[str]] = {
        "runs": [str(len(results))],
        "seeds": [str(seed) for seed in sorted({result.seed for result in results})],
        "training data": [str(result.config["data"]["train"]) for result in results],
        "towers": [str(result.config["model"]["name"]) for result in results],
        "run time in total": [f"{sum(seconds) / 60:.1f} min, pauses included" if seconds else UNKNOWN],
    }
    rows |= provenance_rows([result.facts for result in results])
    return [(name, ", ".join(dict.fromkeys(values))) for name, values in rows.items()]
