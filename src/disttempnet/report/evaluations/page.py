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
    score_differences,
    sections,
    warnings,
)
from disttempnet.report.page import UNKNOWN, open_template
from disttempnet.report.runs.plots import RUN_COLOURS
from disttempnet.report.seeds.groups import AVERAGES, GroupComparison, SeedGroup
from disttempnet.report.seeds.tables import (
    cell_text,
    csv_table,
    latex_table,
    legend,
    markdown_score,
    markdown_table,
    pipes,
    published_cells,
)
from disttempnet.sanitize import markdown_cell

MOST_CHARTED = len(RUN_COLOURS)  # groups in the chart of tasks: a colour each
Differences = list[tuple[SeedGroup, SeedGroup, list[Difference]]]


def evaluation_report(every: Sequence[EvaluatedModel], ending: str, metrics: Sequence[str] = ()) -> str:
    """Return the text of the report.

    Args:
        ending: .html, .md, .tex or .csv; .csv is one table of all averages and tasks.
        metrics: `TASK/METRIC` or `averages/TAG`: only these columns, in one table.
    """
    if ending == ".csv":
        return csv_table(compare_columns(every, metrics or known_columns(every)))
    tables = [("Results", compare_columns(every, metrics))] if metrics else headline_tables(every)
    if ending == ".tex":
        return "\n".join(f"% {heading}\n{latex_table(table)}" for heading, table in tables)
    columns = [column for column in known_columns(every) if column.task != AVERAGES]
    tasks = compare_columns(every, columns) if columns and not metrics else None
    return _page(every, tables, tasks) if ending == ".html" else _markdown(every, tables, tasks)


def _differences(every: Sequence[EvaluatedModel], tasks: GroupComparison) -> Differences:
    """Return the differences of every other group to the first."""
    base, *others = tasks.groups
    return [(base, other, score_differences(base, other, known_columns(every))) for other in others]


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

        # differences of every other group to the first
        for base, other, found in _differences(every, tasks):
            head = ["", markdown_cell(base.title), markdown_cell(other.title), "difference"]
            rows = []
            for one in found:
                first, second, change = _difference_words(one, base, other)
                rows.append([markdown_cell(one.column.title), first, second, f"**{change}**" if one.clear else change])
            heading = f"{markdown_cell(other.title)} − {markdown_cell(base.title)}"
            parts.append(f"## {heading}\n\n{pipes(head, rows)}\npercentage points; {_rule()}\n")
    lines = warnings(every)
    if lines:
        parts.append("## What to know\n\n" + "".join(f"- {markdown_cell(line)}\n" for line in lines))
    return "\n".join(parts)


def _rule() -> str:
    return "bold: more than the larger standard deviation of the two; unmarked where one of them has one seed"


def _difference_words(one: Difference, base: SeedGroup, other: SeedGroup) -> tuple[str, str, str]:
    """Return base, other and the signed difference as text."""
    sign = "−" if one.mean < 0 else "+"
    spread = f" ({100 * one.std:.{DIGITS}f})" if one.std is not None else ""
    return (
        cell_text(one.base, len(base.results), DIGITS),
        cell_text(one.other, len(other.results), DIGITS),
        f"{sign}{abs(100 * one.mean):.{DIGITS}f}{spread}",
    )


def _page(
    every: Sequence[EvaluatedModel], tables: Sequence[tuple[str, GroupComparison]], tasks: GroupComparison | None
) -> str:
    groups = (tasks or (tables[0][1] if tables else compare_columns(every, ()))).groups
    shown = groups[:MOST_CHARTED]
    parts = sections(tasks.columns) if tasks else []
    return open_template("evaluation.html").render(
        title="Zero-shot evaluation" + (f" of {groups[0].title}" if len(groups) == 1 else ""),
        groups=groups,
        tables=tables,
        tasks=tasks,
        warnings=warnings(every),
        legend=legend,
        cell=cell_text,
        published_cells=published_cells,
        not_shown=[group.title for group in groups[MOST_CHARTED:]],
        chart_of_tasks=plots.task_chart(shown, parts) if tasks else "",
        differences=[_difference_part(*pair) for pair in (_differences(every, tasks) if tasks else []) if pair[2]],
        provenance=_evaluation_rows(every),
    )


def _difference_part(
    base: SeedGroup, other: SeedGroup, found: list[Difference]
) -> tuple[str, str, str, list[tuple[Difference, tuple[str, str, str]]]]:
    rows = [(one, _difference_words(one, base, other)) for one in found]
    return base.title, other.title, plots.difference_chart(found), rows


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
