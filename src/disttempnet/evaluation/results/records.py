"""One record a finished task, and eval_results.jsonl: a line a record, in the form that DataComp's scripts read.

Form of a line: {"key": "vtab/dtd", "dataset": "Describable Textures", "metrics": {"acc1": …, "main_metric": …}, …}; the
keys after `metrics` are new here. Other programs do not read `complete`, so the main metric of an
incomplete task is null in the file, and their averages skip it. Its value still stands under its own name.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from disttempnet.errors import UserError
from disttempnet.io.files import locked, read_regular, write_atomically

RESULTS_FILE = "eval_results.jsonl"
PROBE_FILE = "probe_results.jsonl"  # beside it: linear probes, whose metrics begin with
PROBE_PREFIX = "probe_"
MAIN = "main_metric"


@dataclass(frozen=True)
class TaskRecord:
    """Result of a task.

    Attributes:
        key: name of the task, `vtab/dtd`.
        dataset: its display name, `Describable Textures`, which other programs know it by.
        metrics: shares in [0, 1] by name, `main_metric` among them; None where a metric is not defined.
        main_metric_name: which of them the main metric is; empty for a task without one.
        standard_errors: over the draw of images, by name of the metric; not of every metric.
        samples: how many were seen.
        expected: how many the task has; None where that is unknown.
        corrupt: names of samples that could not be read.
        seconds: how long the task took.
        complete: whether all of it was seen, and no error ended it.
        error: one line; empty where nothing went wrong.
        notes: for the reader of the number, such as another number of tars than their list says.
    """

    key: str
    dataset: str
    metrics: Mapping[str, float | None] = field(default_factory=dict)
    main_metric_name: str = ""
    samples: int = 0
    expected: int | None = None
    corrupt: tuple[str, ...] = ()
    seconds: float = 0.0
    complete: bool = True
    error: str = ""
    notes: tuple[str, ...] = ()
    standard_errors: Mapping[str, float] = field(default_factory=dict)

    @property
    def value(self) -> float | None:
        """Main metric; None where the task has none or failed."""
        value = self.metrics.get(MAIN)
        return None if value is None or math.isnan(value) else value

    @property
    def failed(self) -> bool:
        """True where an error ended the task before it had any numbers."""
        return bool(self.error) and all(value is None for value in self.metrics.values())

    @property
    def whole(self) -> bool:
        """True where all of the task was seen, and nothing went wrong."""
        return self.complete and not self.error

    @property
    def counts(self) -> bool:
        """True where the task may be in an average."""
        return self.whole and self.value is not None


def read_records(path: Path) -> dict[str, TaskRecord]:
    """Read the records of a file by key, the last of each; a file that does not exist has none.

    Files of DataComp's own evaluator are read too. A last line that a killed process left half-written is ignored.

    Raises:
        UserError: the file cannot be read, or a line is not a record.
    """
    try:
        lines = read_regular(path).decode("utf-8").splitlines() if path.exists() else []
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read: {error}") from None
    records: dict[str, TaskRecord] = {}
    for number, line in enumerate(lines, 1):
        try:
            parsed = json.loads(line)
        except (ValueError, RecursionError):
            if number == len(lines):
                break
            raise UserError(f"{path}: line {number} is not JSON") from None
        try:
            record = _from_line(parsed)
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError):
            raise UserError(f"{path}: line {number} is not the result of a task") from None
        records.pop(record.key, None)  # what was run again stands where it was run
        records[record.key] = record
    return records


def append_record(path: Path, record: TaskRecord) -> None:
    """Add a record to the file, in place of an earlier one of the same task.

    Several processes may do so at once, as jobs do that take a part of the tasks each.

    Raises:
        UserError: the file is damaged, or cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with locked(path.with_name(f".{path.name}.lock")):
            records = read_records(path)
            records.pop(record.key, None)
            write_records(path, [*records.values(), record])
    except OSError as error:
        raise UserError(f"{path}: cannot be written: {error.strerror or error}") from None


def write_records(path: Path, records: Iterable[TaskRecord]) -> None:
    """Write the file; its folder is made.

    The write is atomic: a reader, or a kill at any moment, finds the old or the new file.
    """
    lines = [json.dumps(_to_line(record), ensure_ascii=False, allow_nan=False) for record in records]
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, "".join(f"{line}\n" for line in lines))


def _to_line(record: TaskRecord) -> dict[str, Any]:
    metrics = {name: None if value is None or math.isnan(value) else value for name, value in record.metrics.items()}
    return {
        "key": record.key,
        "dataset": record.dataset,
        "metrics": {**metrics, MAIN: record.value if record.counts else None},
        "main_metric_name": record.main_metric_name,
        "samples": record.samples,
        "expected": record.expected,
        "corrupt": list(record.corrupt),
        "seconds": round(record.seconds, 3),
        "complete": record.complete,
        "error": record.error,
        "notes": list(record.notes),
        "standard_errors": dict(record.standard_errors),
    }


def _from_line(line: dict[str, Any]) -> TaskRecord:
    metrics = {str(name): _number(value) for name, value in line["metrics"].items()}
    main = str(line.get("main_metric_name", ""))
    metrics[MAIN] = metrics.get(main) if main in metrics else metrics[MAIN]
    expected = line.get("expected")
    return TaskRecord(
        key=_text(line["key"]),
        dataset=_text(line["dataset"]),
        metrics=metrics,
        main_metric_name=main,
        samples=int(line.get("samples", 0)),
        expected=None if expected is None else int(expected),
        corrupt=tuple(map(str, line.get("corrupt", ()))),
        seconds=float(line.get("seconds", 0.0)),
        complete=bool(line.get("complete", True)),
        error=str(line.get("error", "")),
        notes=tuple(map(str, line.get("notes", ()))),
        standard_errors={str(name): float(error) for name, error in line.get("standard_errors", {}).items()},
    )


def _number(value: object) -> float | None:
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return None
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError
    return float(value)


def _text(value: object) -> str:
    if not isinstance(value, str) or not value:
        raise ValueError
    return value
