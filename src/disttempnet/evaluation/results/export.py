"""Results in the formats of other programs: CLIP_benchmark's JSON files, open_clip's CSV of results.

Tasks that failed or are incomplete are in neither: those formats cannot express it.
"""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from disttempnet.errors import UserError
from disttempnet.evaluation.results.averages import averages, why_not
from disttempnet.evaluation.results.records import MAIN, RESULTS_FILE, TaskRecord, read_records
from disttempnet.evaluation.results.summary import SUMMARY_FILE, Subject, read_subject
from disttempnet.sanitize import csv_cell

FIRST_TASK = "imagenet1k"  # of open_clip's CSV; the others stand in the order of tasks.toml
OPENCLIP_COLUMNS = ("name", "pretrained", "params (M)", "FLOPs (B)", "Average perf. on 38 datasets")


class ModelResults(NamedTuple):
    """A model's results: records by key."""

    subject: Subject
    records: Mapping[str, TaskRecord]


def read_model_results(folder: Path) -> ModelResults:
    """Read the results of a folder.

    Raises:
        UserError: it is not a folder of results, or one of its files is damaged.
    """
    subject, records = read_subject(folder), read_records(folder / RESULTS_FILE)
    if subject is None or not records:
        raise UserError(f"{folder}: no results of an evaluation (it needs {SUMMARY_FILE} and {RESULTS_FILE})")
    return ModelResults(subject, records)


def left_out(evaluated: ModelResults) -> list[str]:
    """Return a line for each task that no export holds."""
    return [f"{r.dataset} {why_not(r)}" for r in evaluated.records.values() if not r.whole]


def clip_benchmark_files(evaluated: ModelResults) -> dict[str, str]:
    """Return file name → text of one file a task, as `clip_benchmark build` collects them; shares in [0, 1]."""
    model, pretrained = evaluated.subject.model, evaluated.subject.pretrained
    files = {}
    for key, record in evaluated.records.items():
        if not record.whole:
            continue
        task = _kind(record)
        line = {
            "dataset": f"wds/{key}",
            "model": model,
            "pretrained": pretrained,
            "task": task,
            "metrics": {name: value for name, value in record.metrics.items() if name != MAIN},
            "language": "en",
        }
        name = re.sub(r"[^\w.@-]+", "_", f"{key}_{pretrained}_{model}_en_{task}")
        files[f"{name}.json"] = json.dumps(line, ensure_ascii=False, allow_nan=False) + "\n"
    return files


def openclip_csv(every: Sequence[ModelResults], tags: Mapping[str, Sequence[str]], titles: Mapping[str, str]) -> str:
    """Return the CSV of open_clip's docs/openclip_results.csv: a row a model, shares with four digits.

    Args:
        tags: key → tags, of every task that has a main metric.
        titles: key → display name.

    Cells of tasks that did not run complete are empty, and so is the average where any of them is. FLOPs are not
    counted here.
    """
    keys = [key for key, of_task in tags.items() if "datacomp" in of_task]
    keys.sort(key=lambda key: key != FIRST_TASK)
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow([*OPENCLIP_COLUMNS, *(titles[key] for key in keys)])
    for subject, records in every:
        average = averages(records, tags)["datacomp"]
        shown = {key: records[key].value if key not in average.left_out else None for key in keys}
        parameters = f"{subject.parameters / 1e6:.2f}" if subject.parameters else ""
        mean = _digits(average.mean if average.complete else None)
        cells = [_digits(value) for value in shown.values()]
        writer.writerow([csv_cell(subject.model), csv_cell(subject.pretrained), parameters, "", mean, *cells])
    return buffer.getvalue()


def _digits(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"


def _kind(record: TaskRecord) -> str:
    """Return CLIP_benchmark's name of a task's kind; WinoGAViL, which it lacks, keeps its own."""
    if any("retrieval_recall" in name for name in record.metrics):
        return "zeroshot_retrieval"
    return "winogavil" if any("jaccard" in name for name in record.metrics) else "zeroshot_classification"
