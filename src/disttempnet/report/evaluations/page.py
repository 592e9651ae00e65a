"""The report over evaluations on many tasks, in every format."""

from __future__ import annotations

from collections.abc import Sequence

from disttempnet.evaluation.tasks import task_title
from disttempnet.report.evaluations import plots
from disttempnet.report.evaluations.compare import (
    DIGITS,
    Difference,
    Evaluated,
    compare_columns,
    differences,
    headline_tables,
    known_columns,
    sections,
    warnings,
)
from disttempnet.report.runs.page import open_template
from disttempnet.report.runs.plots import RUN_COLOURS
from disttempnet.report.seeds.groups import AVERAGES, Comparison, Group
from disttempnet.report.seeds.tables import (
    cell_text,
    csv_table,
    latex_table,
    legend,
    markdown_cell,
    markdown_table,
    pipes,
    published_cells,
)
from disttempnet.sanitize import markdown_cell as escaped

SHOWN = len(RUN_COLOURS)  # groups that the chart of tasks can tell apart
Differences = list[tuple[Group, Group, list[Difference]]]


def evaluation_report(every: Sequence[Evaluated], ending: str, metrics: Sequence[str] = ()) -> str:
    """The text of the file.

    Args:
        ending: .html, .md, .tex or .csv; the last is one table of all averages and tasks.
        metrics: `TASK/METRIC` or `averages/TAG`: these columns alone, in one table.
    """
    if ending == ".csv":
        return csv_table(compare_columns(every, metrics or known_columns(every)))
    tables = [("Results", compare_columns(every, metrics))] if metrics else headline_tables(every)
    if ending == ".tex":
        return "\n".join(f"% {heading}\n{latex_table(table)}" for heading, table in tables)
    columns = [column for column in known_columns(every) if column.task != AVERAGES]
    tasks = compare_columns(every, columns) if columns and not metrics else None
    return _page(every, tables, tasks) if ending == ".html" else _markdown(every, tables, tasks)


def _differences(every: Sequence[Evaluated], tasks: Comparison) -> Differences:
    """Every other group against the first."""
    base, *others = tasks.groups
    return [(base, other, differences(base, other, known_columns(every))) for other in others]


def _markdown(every: Sequence[Evaluated], tables: Sequence[tuple[str, Comparison]], tasks: Comparison | None) -> str:
    parts = [f"## {heading}\n\n{markdown_table(table)}" for heading, table in tables]
    if tasks is not None:
        heads = ["task", "metric", *(escaped(group.title) for group in tasks.groups)]
        rows = [heads, ["---", "---", *("--:" for _ in tasks.groups)]]
        for column, cells in tasks.by_column:
            of_groups = zip(tasks.groups, cells, strict=True)
            words = [markdown_cell(cell, len(group.results), DIGITS) for group, cell in of_groups]
            rows.append([escaped(task_title(column.task)), escaped(column.head), *words])
        parts.append(f"## Tasks\n\n{pipes(rows)}\n{legend(tasks)}\n")
        for base, other, found in _differences(every, tasks):
            rows = [["", escaped(base.title), escaped(other.title), "difference"], ["---", "--:", "--:", "--:"]]
            for one in found:
                first, second, change = _difference_words(one, base, other)
                rows.append([escaped(one.column.title), first, second, f"**{change}**" if one.clear else change])
            heading = f"{escaped(other.title)} − {escaped(base.title)}"
            parts.append(f"## {heading}\n\n{pipes(rows)}\npoints of a percentage; {_rule()}\n")
    lines = warnings(every)
    if lines:
        parts.append("## What to know\n\n" + "".join(f"- {escaped(line)}\n" for line in lines))
    return "\n".join(parts)


def _rule() -> str:
    return "bold: more than the larger standard deviation of the two; unmarked where one of them has one seed"


def _difference_words(one: Difference, base: Group, other: Group) -> tuple[str, str, str]:
    """Base, other, and the difference with its sign."""
    sign = "−" if one.mean < 0 else "+"
    spread = f" ({100 * one.std:.{DIGITS}f})" if one.std is not None else ""
    return (
        cell_text(one.base, len(base.results), DIGITS),
        cell_text(one.other, len(other.results), DIGITS),
        f"{sign}{abs(100 * one.mean):.{DIGITS}f}{spread}",
    )


def _page(every: Sequence[Evaluated], tables: Sequence[tuple[str, Comparison]], tasks: Comparison | None) -> str:
    groups = (tasks or (tables[0][1] if tables else compare_columns(every, ()))).groups
    shown = groups[:SHOWN]
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
        not_shown=[group.title for group in groups[SHOWN:]],
        chart_of_tasks=plots.task_chart(shown, parts) if tasks else "",
        differences=[_difference_part(*pair) for pair in (_differences(every, tasks) if tasks else []) if pair[2]],
        provenance=_provenance(every),
    )


def _difference_part(
    base: Group, other: Group, found: list[Difference]
) -> tuple[str, str, str, list[tuple[Difference, tuple[str, str, str]]]]:
    rows = [(one, _difference_words(one, base, other)) for one in found]
    return base.title, other.title, plots.difference_chart(found), rows


def _provenance(every: Sequence[Evaluated]) -> list[list[str]]:
    """A row an evaluation: where it lies, model, weights' hash, precision, quirks, tasks, time, versions."""
    rows = []
    for one in every:
        subject = one.subject
        seconds = f"{one.result.seconds or 0:,.0f} s"
        counts = f"{sum(record.counts for record in one.records.values())} of {len(one.records)}"
        known = ["–"] * 5
        if subject is not None:
            versions = ", ".join(f"{name} {number}" for name, number in subject.versions.items())
            known = [subject.title, subject.checkpoint[:12], subject.precision, subject.compat, versions]
        model, checkpoint, precision, compat, versions = (word or "–" for word in known)
        rows.append([str(one.result.config["out"]), model, checkpoint, precision, compat, counts, seconds, versions])
    return rows
