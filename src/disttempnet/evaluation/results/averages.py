"""Averages over groups of tasks: plain means of main metrics, each with how many of its tasks it covers.

An average needs every task of its group, complete. A mean over fewer tasks is another quantity: it is called partial,
and every task that is left out is named with the reason.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from disttempnet.evaluation.results.records import TaskRecord
from disttempnet.evaluation.tasks import all_tasks, task_title

GROUPS = {
    "datacomp": "Average over {of}",
    "imagenet": "ImageNet & variants",
    "shifts": "ImageNet shifts",
    "vtab": "VTAB",
    "retrieval": "Retrieval",
}
NOT_RUN = "not run"
TASKS_SHOWN = 10  # most tasks that were not run, and most notes, that are named


@dataclass(frozen=True)
class Average:
    """The mean of a group's main metrics.

    Attributes:
        tag: of tasks.toml, which makes the group.
        mean: of the tasks that ran complete, a share in [0, 1]; None where none did.
        of: how many tasks the group has.
        left_out: task → why it is not in the mean.
    """

    tag: str
    mean: float | None
    of: int
    left_out: Mapping[str, str]

    @property
    def counted(self) -> int:
        return self.of - len(self.left_out)

    @property
    def complete(self) -> bool:
        return self.mean is not None and not self.left_out

    @property
    def coverage(self) -> str:
        return f"{self.counted}/{self.of}"

    @property
    def lacking(self) -> list[str]:
        """Return lines about tasks that are left out: one for each that went wrong, one for all that were not run."""
        titles = {key: task_title(key) for key in self.left_out}
        words = [f"{titles[key]} {reason}" for key, reason in self.left_out.items() if reason != NOT_RUN]
        absent = [titles[key] for key, reason in self.left_out.items() if reason == NOT_RUN]
        if absent:
            words.append(f"not run: {', '.join(absent) if len(absent) <= TASKS_SHOWN else f'{len(absent)} tasks'}")
        return words

    @property
    def group(self) -> str:
        """`VTAB`; of all tasks `Average over 38` where it is one, else `All tasks`."""
        return average_title(self.tag, self.of) if self.tag != "datacomp" or self.complete else "All tasks"

    @property
    def title(self) -> str:
        """The group; where the average is none, `VTAB: plain mean of 12/13, partial`."""
        return self.group if self.complete else f"{self.group}: plain mean of {self.coverage}, partial"


def average_title(tag: str, of: int) -> str:
    """Return the heading of a complete average over `of` tasks."""
    return GROUPS[tag].format(of=of)


def averages(records: Mapping[str, TaskRecord], tags: Mapping[str, Sequence[str]]) -> dict[str, Average]:
    """Return the averages by tag.

    Args:
        records: by key.
        tags: key → tags, of every task that has a main metric. A group without tasks is left out.
    """
    groups = {tag: [key for key, of_task in tags.items() if tag in of_task] for tag in GROUPS}
    return {tag: _average(tag, keys, records) for tag, keys in groups.items() if keys}


def why_not(record: TaskRecord | None) -> str:
    """Return the reason why a task with a main metric is in no average; empty where it may be."""
    if record is None:
        return NOT_RUN
    if record.failed:
        return f"failed: {record.error}"
    if not record.whole:
        return f"incomplete: {record.error or f'{record.samples:,} samples'}"
    return "" if record.counts else "its main metric is not defined"


def _average(tag: str, keys: Sequence[str], records: Mapping[str, TaskRecord]) -> Average:
    reasons = {key: why_not(records.get(key)) for key in keys}
    values = [records[key].value for key, reason in reasons.items() if not reason]
    known = [value for value in values if value is not None]
    mean = sum(known) / len(known) if known else None
    return Average(tag, mean, len(keys), {key: reason for key, reason in reasons.items() if reason})


def counted_tags() -> dict[str, tuple[str, ...]]:
    """Return key → tags of every task of tasks.toml that has a main metric: what averages are taken over."""
    return {name: task.tags for name, task in all_tasks().items() if task.main}
