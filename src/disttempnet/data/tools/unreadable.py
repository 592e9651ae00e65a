"""Broken samples and shards: a table by reason, and a list in a file."""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from rich.table import Table

from disttempnet.data.images import UnreadableImage
from disttempnet.data.source import OK, Source, UnreadableCaption
from disttempnet.errors import UserError
from disttempnet.io.files import atomic

NAMES_PER_REASON = 3  # names that a table shows for each reason
BAD_SAMPLE = (UnreadableCaption, UnreadableImage)  # errors of a sample whose shard is intact


class Fault(NamedTuple):
    """Broken sample, or broken shard (`sample` is None), with the reason."""

    sample: int | None
    name: str
    reason: str


def fault_of(source: Source, sample: int, error: Exception) -> Fault:
    """Return the fault of a sample that raised an error."""
    return Fault(sample, _name(source, sample), str(error))


def known_faults(source: Source, first: int, end: int) -> Iterator[Fault]:
    """Yield the samples of [first, end) that the source itself leaves out."""
    for sample in range(first, end):
        if source.status_of(sample) != OK:
            yield Fault(sample, _name(source, sample), source.reason(sample))


def _name(source: Source, sample: int) -> str:
    try:
        return source.name(sample)
    except UserError:
        return f"sample {sample}"


def fault_table(faults: Iterable[Fault]) -> Table:
    """Return reasons with counts and first names, most frequent first; reasons that differ in numbers are one."""
    groups: dict[str, list[Fault]] = defaultdict(list)
    for fault in faults:
        groups[re.sub(r"\d[\d,.]*", "…", fault.reason)].append(fault)
    table = Table()
    table.add_column("reason", overflow="fold")
    table.add_column("count", justify="right")
    table.add_column("for example", overflow="fold")
    for _, group in sorted(groups.items(), key=lambda item: -len(item[1])):
        names = ", ".join(fault.name for fault in group[:NAMES_PER_REASON])
        if len(group) > NAMES_PER_REASON:
            names += ", …"
        table.add_row(group[0].reason, f"{len(group):,}", names)
    return table


def write_faults(faults: Iterable[Fault], path: Path) -> None:
    """Write a JSON line per fault; the file is replaced atomically. Raises OSError."""
    with atomic(path) as temporary, temporary.open("w", encoding="utf-8") as file:
        for fault in faults:
            line = {"id": fault.sample, "name": fault.name, "reason": fault.reason}
            file.write(json.dumps(line, ensure_ascii=False) + "\n")


def read_faults(path: Path) -> Iterator[Fault]:
    """Read a file of `write_faults`."""
    with path.open(encoding="utf-8") as file:
        for line in file:
            fault = json.loads(line)
            yield Fault(fault["id"], fault["name"], fault["reason"])
