"""Samples that cannot be used: named, counted by reason, listed in a file."""

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
BAD_SAMPLE = (UnreadableCaption, UnreadableImage)  # what may be wrong with one, where its shard is sound


class Fault(NamedTuple):
    """A sample, or a shard as a whole (`sample` is None), and what is wrong with it."""

    sample: int | None
    name: str
    reason: str


def fault_of(source: Source, sample: int, error: Exception) -> Fault:
    """A sample that could not be read, for what was raised."""
    return Fault(sample, _name(source, sample), str(error))


def known_faults(source: Source, first: int, end: int) -> Iterator[Fault]:
    """The samples of [first, end) that the source itself leaves out."""
    for sample in range(first, end):
        if source.status_of(sample) != OK:
            yield Fault(sample, _name(source, sample), source.reason(sample))


def _name(source: Source, sample: int) -> str:
    try:
        return source.name(sample)
    except UserError:
        return f"sample {sample}"


def fault_table(faults: Iterable[Fault]) -> Table:
    """Reasons with counts and the first names, the most frequent first; numbers in a reason do not part it."""
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
    """A line of JSON a fault, in a file that is replaced atomically. Raises OSError."""
    with atomic(path) as temporary, temporary.open("w", encoding="utf-8") as file:
        for fault in faults:
            line = {"id": fault.sample, "name": fault.name, "reason": fault.reason}
            file.write(json.dumps(line, ensure_ascii=False) + "\n")


def read_faults(path: Path) -> Iterator[Fault]:
    """What `write_faults` wrote."""
    with path.open(encoding="utf-8") as file:
        for line in file:
            fault = json.loads(line)
            yield Fault(fault["id"], fault["name"], fault["reason"])
