"""The report over evaluations on many tasks, in every format."""

from __future__ import annotations

from collections.abc import Sequence

from disttempnet.evaluation.tasks import task_title
from disttempnet.report.evaluations import plots
from disttempnet.report.evaluations.compare import (
    DIGITS,
    Difference,
    EvaluatedModel,
    compare_columns,
    headline_tables,
    known_columns,
    model_names,
    partial_mean,
    score_differences,
    sections,
    warnings,
)
from disttempnet.report.page import UNKNOWN, open_template
from disttempnet.report.runs.plots import RUN_COLOURS
from disttempnet.report.seeds.comparison import GroupComparison
from disttempnet.report.seeds.groups import AVERAGES, Cell, Column, SeedGroup
from disttempnet.report.seeds.intervals import CONFIDENCE
from disttempnet.report.seeds.tables import (
    DifferenceText,
    cell_text,
    csv_table,
    difference_row,
    difference_text,
    latex_table,
    legend,
    markdown_difference,
    markdown_score,
    markdown_table,
    pipes,
    published_cells,
)
from disttempnet.sanitize import markdown_cell

MOST_CHARTED = len(RUN_COLOURS)  # groups in the chart of tasks: a colour each
Differences = list[tuple[SeedGroup, SeedGroup, list[Difference]]]
DIFFERENCE_RULE = (
    f"percentage points, paired by seed, with the {100 * CONFIDENCE:g} % confidence interval (Student's t), bold where "
    "it excludes zero; no interval where fewer than two seeds are shared"
)


def evaluation_report(
    every: Sequence[EvaluatedModel], ending: str, metrics: Sequence[str] = (), baseline: str = ""
) -> str:
    """Return the text of the report.

    Args:
        ending: .html, .md, .tex or .csv; .csv is one table of all averages and tasks.
        metrics: `TASK/METRIC` or `averages/TAG`: only these columns, in one table.
        baseline: the run or model that the others are compared with; empty = the first one.
    """
    if ending == ".csv":
        return csv_table(compare_columns(every, metrics or known_columns(every), baseline))
    tables = [("Results", compare_columns(every, metrics, baseline))] if metrics else headline_tables(every, baseline)
    if ending == ".tex":
        return "\n".join(f"% {heading}\n{latex_table(table)}" for heading, table in tables)
    columns = [column for column in known_columns(every) if column.task != AVERAGES]
    tasks = compare_columns(every, columns, baseline) if columns and not metrics else None
    return _page(every, tables, tasks) if ending == ".html" else _markdown(every, tables, tasks)


def _differences(every: Sequence[EvaluatedModel], tasks: GroupComparison) -> Differences:
    """Return the differences of every other group to its baseline."""
    pairs = zip(tasks.baselines, tasks.groups, strict=True)
    columns = known_columns(every)
    return [(base, other, score_differences(base, other, columns)) for base, other in pairs if base is not None]


def _markdown(
    every: Sequence[EvaluatedModel], tables: Sequence[tuple[str, GroupComparison]], tasks: GroupComparison | None
) -> str:
    parts = [f"## {heading}\n\n{markdown_table(table)}" for heading, table in tables]
    if tasks is not None:
        # every task: a column for each group
        head = ["task", "metric", *(markdown_cell(group.title) for group in tasks.groups)]
        rows = []
        for column, cells in tasks.by_column:
            of_groups = zip(tasks.groups, cells, strict=True)
            scores = [markdown_score(cell, len(group.results), DIGITS) for group, cell in of_groups]
            rows.append([markdown_cell(task_title(column.task)), markdown_cell(column.head), *scores])
        parts.append(f"## Tasks\n\n{pipes(head, rows, texts=2)}\n{legend(tasks)}\n")

        # differences of every other group to the baseline
        for base, other, found in _differences(every, tasks):
            head = ["", markdown_cell(base.title), markdown_cell(other.title), "difference"]
            rows = []
            for one in found:
                first, second, change = _difference_words(one, base, other)
                rows.append([markdown_cell(one.column.title), first, second, markdown_difference(change)])
            heading = f"{markdown_cell(other.title)} − {markdown_cell(base.title)}"
            parts.append(f"## {heading}\n\n{pipes(head, rows)}\n{DIFFERENCE_RULE}\n")
    lines = warnings(every)
    if lines:
        parts.append("## What to know\n\n" + "".join(f"- {markdown_cell(line)}\n" for line in lines))
    return "\n".join(parts)


def _difference_words(one: Difference, base: SeedGroup, other: SeedGroup) -> tuple[str, str, DifferenceText]:
    """Return base, other and the signed difference as text."""
    ours, theirs = len(other.results), len(base.results)
    return (
        cell_text(one.base, theirs, DIGITS),
        cell_text(one.other, ours, DIGITS),
        DifferenceText(difference_text(one.paired, max(ours, theirs), DIGITS), one.paired.sign),
    )


def _page(
    every: Sequence[EvaluatedModel], tables: Sequence[tuple[str, GroupComparison]], tasks: GroupComparison | None
) -> str:
    groups = (tasks or (tables[0][1] if tables else compare_columns(every, ()))).groups
    shown = groups[:MOST_CHARTED]
    parts = sections(tasks.columns) if tasks else []
    found = _differences(every, tasks) if tasks else []
    return open_template("evaluation.html").render(
        title="Zero-shot evaluation" + (f" of {groups[0].title}" if len(groups) == 1 else ""),
        headline=_headline(every, tables),
        groups=groups,
        tables=tables,
        tasks=tasks,
        sections=[(heading, _task_rows(tasks, columns)) for heading, columns in parts] if tasks else [],
        warnings=warnings(every),
        legend=legend,
        cell=cell_text,
        published_cells=published_cells,
        difference_row=difference_row,
        not_shown=[group.title for group in groups[MOST_CHARTED:]],
        chart_of_tasks=plots.task_chart(shown, parts) if tasks else "",
        differences=[(base.title, other.title, plots.difference_chart(rows)) for base, other, rows in found if rows],
        provenance=_evaluation_rows(every),
    )


def _headline(every: Sequence[EvaluatedModel], tables: Sequence[tuple[str, GroupComparison]]) -> list[str]:
    """Return a sentence for each group: its first column, and the difference to the baseline; else what is partial."""
    sentences = []
    comparison = tables[0][1] if tables else None
    if comparison is not None and comparison.columns:
        first = comparison.only(comparison.columns[:1])
        for group, (cell,) in first.rows:
            if cell is not None:
                (difference,) = difference_row(first, group)
                change = f", {difference.text} to {first.baseline_title}" if difference.text[0] in "+−0" else ""
                score = cell_text(cell, len(group.results), DIGITS)
                sentences.append(f"{first.columns[0].title}: {group.title} {score}{change}.")
    for one, name in zip(every, model_names(every), strict=True):
        average = one.averages["datacomp"]
        if not average.complete:
            sentences.append(f"{name} is partial: {partial_mean(average)}.")
    return sentences[:MOST_CHARTED]


def _task_rows(
    tasks: GroupComparison, columns: Sequence[Column]
) -> list[tuple[Column, list[tuple[Cell | None, int, DifferenceText | None]]]]:
    """Return for each column the cell of each group, its number of seeds and, of no baseline, its difference."""
    part = tasks.only(columns)
    rows: dict[Column, list[tuple[Cell | None, int, DifferenceText | None]]] = {column: [] for column in part.columns}
    for (group, cells), base in zip(part.rows, part.baselines, strict=True):
        for column, cell, one in zip(part.columns, cells, difference_row(part, group), strict=True):
            rows[column].append((cell, len(group.results), None if base is None else one))
    return list(rows.items())


def _evaluation_rows(every: Sequence[EvaluatedModel]) -> list[list[str]]:
    """Return a row for each evaluation: folder, model, weights' hash, precision, quirks, tasks, time, versions."""
    rows = []
    for one in every:
        subject = one.subject
        seconds = f"{one.result.seconds or 0:,.0f} s"
        counts = f"{sum(record.counts for record in one.records.values())} of {len(one.records)}"
        known = [UNKNOWN] * 5
        if subject is not None:
            versions = ", ".join(f"{name} {number}" for name, number in subject.versions.items())
            known = [subject.title, subject.checkpoint[:12], subject.precision, subject.compat, versions]
        model, checkpoint, precision, compat, versions = (word or UNKNOWN for word in known)
        rows.append([str(one.result.config["out"]), model, checkpoint, precision, compat, counts, seconds, versions])
    return rows
