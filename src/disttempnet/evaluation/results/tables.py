"""Results as terminal tables: several runs side by side, or one model's tasks with their averages; and the tasks."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from disttempnet.evaluation.datasets.open import HF_CACHE, download_folder, find_data, folder_names
from disttempnet.evaluation.datasets.retrieval import RAW_PROTOCOLS
from disttempnet.evaluation.results.averages import TASKS_SHOWN, averages, why_not
from disttempnet.evaluation.results.records import TaskRecord
from disttempnet.evaluation.scores import BETTER_RULE, Scores, compare, metric_title, percent, tasks_of
from disttempnet.evaluation.tasks import OWN_DATA, Task, task_title

LOOKED_FOR = 3  # missing tasks whose folders are named


def results_table(results_by_run: Mapping[str, Mapping[str, Scores]]) -> Table:
    """Return a table of every metric of every task in per cent, with chance and a column a run; of one run with errors.

    Args:
        results_by_run: name of the run → name of the task → its scores.
    """
    runs = list(results_by_run.values())
    table = Table(caption=_caption(results_by_run), caption_justify="left")
    table.add_column("per cent")
    table.add_column("chance", justify="right", style="dim")
    for run in results_by_run:
        table.add_column(Text(run), justify="right")
    if len(runs) == 1:
        table.add_column("± s.e.", justify="right", style="dim")
    for task in tasks_of(runs):
        samples = max(results[task].samples for results in runs if task in results)
        table.add_section()
        table.add_row(Text(f"{task_title(task)} ({samples:,} images)", style="italic"))
        for row in compare(runs, task):
            styles = ["bold" if i == row.best else "" for i in range(len(runs))]
            values = [Text(percent(value), style) for value, style in zip(row.values, styles, strict=True)]
            if len(runs) == 1:
                values.append(Text(percent(runs[0][task].errors.get(row.metric))))
            table.add_row(Text("  " + metric_title(row.metric)), percent(row.chance), *values)
    return table


def notes(records: Mapping[str, TaskRecord]) -> list[str]:
    """Return notes for the reader of the numbers: the first few, and how many more there are."""
    words = [f"{record.dataset}: {note}" for record in records.values() for note in record.notes]
    more = len(words) - TASKS_SHOWN
    return [*words[:TASKS_SHOWN], *([f"and {more} more notes in the lines of results"] if more > 0 else [])]


def _caption(results_by_run: Mapping[str, Mapping[str, Scores]]) -> str | None:
    lines = [f"bold: {BETTER_RULE}"] if len(results_by_run) > 1 else []
    runs = list(results_by_run.values())
    for task in tasks_of(runs):
        keys = sorted({key for results in runs if task in results for key in results[task].corrupt})
        if keys:
            named = ", ".join(keys[:5]) + (", …" if len(keys) > 5 else "")
            lines.append(f"incomplete: {task_title(task)}, {len(keys)} unreadable or missing: {named}")
        said = dict.fromkeys(note for results in runs if task in results for note in results[task].notes)
        lines += [f"{task_title(task)}: {note}" for note in said]
    return "\n".join(lines) or None


def records_table(title: str, records: Mapping[str, TaskRecord], tags: Mapping[str, Sequence[str]]) -> Table:
    """Return a table with a row a task: its main metric in per cent, samples, seconds, state; then the averages.

    Args:
        title: of the model.
        records: by key, in the order of the rows.
        tags: key → tags, of every task that has a main metric.
    """
    table = Table(
        title=Text(title, "bold"), title_justify="left", caption_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0)
    )
    for head in ("task", "metric", "%", "± s.e.", "n", "s", ""):
        number = head in ("%", "± s.e.", "n", "s")
        table.add_column(head, justify="right" if number else "left", no_wrap=True)
    # A row a task.
    for record in records.values():
        wrong = not record.whole or bool(record.key in tags and why_not(record))
        table.add_row(
            Text(record.dataset),
            Text(metric_title(record.main_metric_name) or "–", "dim"),
            Text(percent(record.value), "" if record.counts else "dim"),
            Text(percent(record.standard_errors.get(record.main_metric_name)), "dim"),
            f"{record.samples:,}",
            f"{record.seconds:,.1f}" if record.seconds < 100 else f"{record.seconds:,.0f}",
            Text("failed" if record.failed else "incomplete", "red") if wrong else Text("ok", "green"),
        )
    # A row an average that has any of its tasks; what lacks for the average over all is in the caption.
    table.add_section()
    every = averages(records, tags)
    for average in every.values():
        if not average.counted:
            continue
        style = "bold" if average.complete else "dim"
        what = "" if average.complete else "plain mean"
        words = (average.group, what, percent(average.mean))
        table.add_row(*(Text(word, style) for word in words), "", average.coverage, "", "" if not what else "partial")
    lines = notes(records)
    if "datacomp" in every:
        lines += [f"in no average: {words}" for words in every["datacomp"].lacking]
    table.caption = "\n".join(lines) or None
    return table


def probes_table(zero_shot: Mapping[str, TaskRecord], probes: Mapping[str, TaskRecord]) -> Table:
    """Return a table with a row a linear probe: its main metric in per cent beside the zero-shot one, and how it was
    made."""
    table = Table(title=Text("Linear probes", "bold"), title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for head in ("task", "metric", "zero-shot %", "probe %", "± s.e.", "n", ""):
        table.add_column(head, justify="right" if head in ("zero-shot %", "probe %", "± s.e.", "n") else "left")
    for key, record in probes.items():
        before = zero_shot[key].value if key in zero_shot else None
        how = record.error or (record.notes[0].removeprefix("linear probe: ") if record.notes else "")
        table.add_row(
            Text(record.dataset),
            Text(metric_title(record.main_metric_name).removeprefix("linear probe "), "dim"),
            percent(before),
            Text(percent(record.value), "" if record.counts else "dim"),
            Text(percent(record.standard_errors.get(record.main_metric_name)), "dim"),
            f"{record.samples:,}",
            Text(how, "dim" if record.whole else "red"),
        )
    return table


def tasks_list(tasks: Sequence[Task], root: Path | None) -> list[str]:
    """Return lines about tasks: size, main metric, folder below the data root, and how to get what is missing."""
    below = "below the data root" if root is not None else "data"
    rows = [("task", "samples", "main metric", below, "huggingface.co/datasets/")]
    missing = []
    for task in tasks:
        found = find_data(task, root) if root is not None and task.below_root else None
        ships = "(disttempnet data icons)" if task.is_built else "(ships with the package)"
        elsewhere = "(your own)" if task.name.startswith(OWN_DATA) else ships
        lacks = "–" if root is not None else ""  # without a root nothing was looked for
        where = found.name if found else lacks if task.below_root else elsewhere
        rows.append((task.name, f"{task.size:,}" if task.size else "", task.main or "–", where, task.source))
        missing += [task] if task.below_root and not found else []
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = [cell.ljust(width) for cell, width in zip(row, widths, strict=True)]
        cells[1] = row[1].rjust(widths[1])
        lines.append("  ".join(cells).rstrip())
    lines += _how_to_get(missing, root)
    if missing and root is None:
        lines.append("--data-root DIR shows which of them are there")
    if apart := [task.name for task in tasks if task.below_root and not task.main]:
        rest = sum(task.below_root for task in tasks) - len(apart)
        lines += ["", f"{rest} of these count in averages; {' and '.join(apart)} have no main metric, as in DataComp"]
    return lines


def _how_to_get(missing: Sequence[Task], root: Path | None) -> list[str]:
    lines = []
    if missing:
        folder = download_folder(missing[0], root or Path("ROOT"))
        command = ["hf", "download", "--repo-type", "dataset", missing[0].source, "--local-dir", str(folder)]
        lines = ["", f"get one, for example:  {shlex.join(command)}"]
        looked = [f"{task.name} in {' or '.join(folder_names(task))}" for task in missing[:LOOKED_FOR]]
        more = "; the others likewise, or --tasks NAME names them" if len(missing) > LOOKED_FOR else ""
        lines.append(f"looked for below {root or 'ROOT'}:  {'; '.join(looked)}{more}")
    if raw := [task for task in missing if task.protocols in RAW_PROTOCOLS]:
        names = ", ".join(task.display for task in raw)
        lines.append(f"then unzip the images in that folder: {names} (DataComp's {HF_CACHE} is not read)")
    return lines
