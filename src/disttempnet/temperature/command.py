"""`disttempnet temperature`: a run and a data set → a table of τ, and a page about it."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from disttempnet import distributed
from disttempnet.errors import UserError
from disttempnet.io.files import refuse_unwritable
from disttempnet.report.items import CaptionFile, ImageFolder, Items, Pairs, shard_pairs, training_pairs
from disttempnet.temperature.analysis import correlation_lines
from disttempnet.temperature.measure import measure_temperatures, refuse_without_temperatures
from disttempnet.temperature.page import write_page
from disttempnet.temperature.statistics import TemperatureStatistics
from disttempnet.temperature.table import check_table, columns_of, open_table
from disttempnet.terminal import console
from disttempnet.training.checkpoint import Run, load_run
from disttempnet.training.run_folder import list_checkpoints

PLAIN_LINE_SECONDS = 15.0  # between lines where the output is no terminal
SKIPPED_SHOWN = 20  # unreadable images that are named


class TemperatureSource(NamedTuple):
    """Which data set: at most one of these; none means the run's own training data."""

    shards: str = ""
    images: str = ""
    captions: str = ""


def write_temperatures(
    target: str,
    source: TemperatureSource,
    out: Path,
    *,
    columns: Sequence[str] = ("label",),
    gallery: Path | None = None,
    frequency_by: str = "label",
    batch: int = 256,
) -> int:
    """Write a row an item to `out`, and the page to `gallery`; returns the number of rows.

    Args:
        target: a run folder (its last checkpoint) or a checkpoint folder.
        columns: facts of the samples' .json that become columns.
        frequency_by: the fact whose frequency the page compares with τ.
        batch: images or captions embedded at once.

    Raises:
        UserError: no run, no τ, no data, or a table or page that cannot be written.
    """
    check_table(out, columns)
    for path in (out, gallery):
        if path is not None:
            refuse_unwritable(path)
    with distributed.session() as device:
        checkpoints = list_checkpoints(Path(target))
        run = load_run(checkpoints[-1] if checkpoints else target)
        run.towers.module.to(device)
        run.loss.to(device)
        refuse_without_temperatures(run, training=not any(source) or bool(source.shards))
        items = _open(run, source)
        refuse_without_temperatures(run, training=isinstance(items, Pairs) and items.training)
        statistics, rows, skipped = TemperatureStatistics(items, frequency_by) if gallery else None, 0, list[str]()
        main = distributed.is_main()
        with open_table(out, columns) if main else nullcontext() as table, _progress(len(items), main) as advance:
            for chunk in measure_temperatures(run, items, device=device, batch=batch):
                if table is not None:
                    table.write(columns_of(chunk, columns))
                if statistics is not None and main:
                    statistics.add(chunk)
                rows += len(chunk.items)
                skipped += chunk.skipped
                advance(chunk.read)
            if not rows:
                raise UserError(f"{items.about}: none of its {len(items)} images can be decoded")
        if main:
            _name_skipped(skipped)
            if statistics is not None and gallery is not None:
                write_page(run, statistics, gallery)
                for line in correlation_lines(statistics):
                    console(stderr=True).print(line, soft_wrap=True)
    return rows


def _open(run: Run, source: TemperatureSource) -> Items:
    if source.images:
        return ImageFolder(source.images)
    if source.captions:
        return CaptionFile(source.captions)
    return shard_pairs(run, source.shards) if source.shards else training_pairs(run)


class _Advance:
    """Counts items; shows them on a bar, or as a line from time to time where there is no terminal."""

    def __init__(self, total: int, console: Console, bar: Progress) -> None:
        self.total, self.console, self.bar = total, console, bar
        self.task = bar.add_task("temperatures", total=total, rate="")
        self.done, self.begun = 0, time.monotonic()
        self.told = self.begun

    def __call__(self, items: int) -> None:
        self.done += items
        now = time.monotonic()
        rate = self.done / max(now - self.begun, 1e-9)
        self.bar.update(self.task, completed=self.done, rate=f"{rate:,.0f}/s")
        if not self.console.is_terminal and now - self.told > PLAIN_LINE_SECONDS:
            self.told = now
            eta = timedelta(seconds=round((self.total - self.done) / rate))
            self.console.print(f"temperatures  {self.done:,}/{self.total:,}  {rate:,.0f}/s  ETA {eta}")


@contextmanager
def _progress(total: int, active: bool) -> Iterator[_Advance]:
    shown = console(stderr=True, quiet=not active)
    words = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]}"),
    )
    hidden = not active or not shown.is_terminal
    with Progress(*words, TextColumn("ETA"), TimeRemainingColumn(), console=shown, disable=hidden) as bar:
        yield _Advance(total, shown, bar)


def _name_skipped(skipped: Sequence[str]) -> None:
    if skipped:
        shown, more = ", ".join(skipped[:SKIPPED_SHOWN]), ", …" if len(skipped) > SKIPPED_SHOWN else ""
        console(stderr=True).print(f"left out {len(skipped):,} unreadable images: {shown}{more}", soft_wrap=True)
