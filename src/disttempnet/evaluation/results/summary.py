"""summary.json beside eval_results.jsonl: the model, how it was evaluated, and the averages.

The file is written from the records and can be written again from them at any time; nothing reads its averages back.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from disttempnet.errors import UserError
from disttempnet.evaluation.results.averages import averages, why_not
from disttempnet.evaluation.results.records import TaskRecord
from disttempnet.io.files import read_regular, write_atomically

SUMMARY_FILE = "summary.json"


@dataclass(frozen=True)
class Subject:
    """Model that was evaluated, and how.

    Attributes:
        model: name of the towers, `ViT-B-32`.
        pretrained: name of the weights: open_clip's tag, or `RUN @ step 100`.
        checkpoint: hash of the weights; empty where unknown.
        precision: `fp32`, `bf16` or `datacomp`.
        compat: older program whose quirks were kept; empty for none.
        versions: package → version.
        parameters: of both towers; 0 where unknown.
        run: of a run its `name`, `config` (resolved, a plain table), `objective` (as in run.json) and `step`; empty for
            other models. Runs whose configs differ in the seed alone are one group of a report.
        notes: on what was taken from the weights or done to them (`Towers.notes`).
    """

    model: str
    pretrained: str = ""
    checkpoint: str = ""
    precision: str = ""
    compat: str = ""
    versions: Mapping[str, str] = field(default_factory=dict)
    parameters: int = 0
    run: Mapping[str, Any] = field(default_factory=dict)
    notes: Sequence[str] = ()

    @property
    def title(self) -> str:
        return " ".join(filter(None, (self.model, self.pretrained)))


def write_summary(
    folder: Path, subject: Subject, records: Mapping[str, TaskRecord], tags: Mapping[str, Sequence[str]]
) -> Path:
    """Write FOLDER/summary.json.

    Args:
        records: by key, those of FOLDER/eval_results.jsonl.
        tags: key → tags, of every task that has a main metric.

    Raises:
        UserError: it cannot be written.
    """
    path = folder / SUMMARY_FILE
    incomplete = {key: why_not(r) for key, r in records.items() if not r.whole}
    table = {
        **asdict(subject),
        "averages": {
            tag: {
                "title": average.title,
                "mean": average.mean,
                "complete": average.complete,
                "coverage": average.coverage,
                "left_out": dict(average.left_out),
            }
            for tag, average in averages(records, tags).items()
        },
        "incomplete": incomplete,
        "seconds": round(sum(record.seconds for record in records.values()), 3),
    }
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(path, json.dumps(table, indent=2, ensure_ascii=False, allow_nan=False) + "\n")
    except OSError as error:
        raise UserError(f"{path}: cannot be written: {error.strerror or error}") from None
    return path


def read_subject(folder: Path) -> Subject | None:
    """Read the subject of FOLDER/summary.json; None where there is no such file.

    Raises:
        UserError: the file is damaged.
    """
    path = folder / SUMMARY_FILE
    if not path.is_file():
        return None
    try:
        table = json.loads(read_regular(path).decode("utf-8"))
        subject = Subject(**{f.name: table[f.name] for f in fields(Subject) if f.name in table})
        if not _has_right_types(subject):
            raise ValueError
    except (OSError, ValueError, TypeError, RecursionError):
        raise UserError(f"{path}: damaged, not the summary of an evaluation") from None
    return replace(subject, notes=tuple(subject.notes))


def _has_right_types(subject: Subject) -> bool:
    """Return whether attributes that were read from a file have the right types."""
    words = (subject.model, subject.pretrained, subject.checkpoint, subject.precision, subject.compat)
    return (
        all(isinstance(word, str) for word in words)
        and isinstance(subject.versions, dict)
        and isinstance(subject.parameters, int)
        and isinstance(subject.notes, list | tuple)
        and isinstance(subject.run, dict)
        and all(isinstance(subject.run.get(key) or {}, dict) for key in ("config", "objective"))
        and isinstance(subject.run.get("step", 0), int)
    )
