"""Results of one or several runs as a terminal table."""

from __future__ import annotations

from collections.abc import Mapping

from rich.table import Table
from rich.text import Text

from disttempnet.evaluation.readers import task_title
from disttempnet.evaluation.scores import BETTER_RULE, Scores, compare, metric_title, percent, tasks_of


def results_table(results_by_run: Mapping[str, Mapping[str, Scores]]) -> Table:
    """Every metric of every task in per cent, chance beside it, the runs as columns.

    Args:
        results_by_run: name of the run → name of the task → its scores.
    """
    runs = list(results_by_run.values())
    table = Table(caption=_caption(results_by_run), caption_justify="left")
    table.add_column("per cent")
    table.add_column("chance", justify="right", style="dim")
    for run in results_by_run:
        table.add_column(Text(run), justify="right")
    for task in tasks_of(runs):
        samples = max(results[task].samples for results in runs if task in results)
        table.add_section()
        table.add_row(Text(f"{task_title(task)} ({samples:,} images)", style="italic"))
        for row in compare(runs, task):
            styles = ["bold" if i == row.best else "" for i in range(len(runs))]
            values = [Text(percent(value), style) for value, style in zip(row.values, styles, strict=True)]
            table.add_row(Text("  " + metric_title(row.metric)), percent(row.chance), *values)
    return table


def _caption(results_by_run: Mapping[str, Mapping[str, Scores]]) -> str | None:
    lines = [f"bold: {BETTER_RULE}"] if len(results_by_run) > 1 else []
    runs = list(results_by_run.values())
    for task in tasks_of(runs):
        keys = sorted({key for results in runs if task in results for key in results[task].corrupt})
        if keys:
            named = ", ".join(keys[:5]) + (", …" if len(keys) > 5 else "")
            lines.append(f"incomplete: {task_title(task)} lacks {len(keys)} unreadable images: {named}")
    return "\n".join(lines) or None
