"""`disttempnet temperature`: a run and a data set → a table of τ, and a page about it."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import NamedTuple

from disttempnet import distributed
from disttempnet.errors import UserError
from disttempnet.io.files import refuse_unwritable
from disttempnet.io.progress import Meter
from disttempnet.report.items import CaptionFile, ImageFolder, Items, Pairs, shard_pairs, training_pairs
from disttempnet.temperature.analysis import correlation_lines
from disttempnet.temperature.measure import measure_temperatures, refuse_without_temperatures
from disttempnet.temperature.page import write_page
from disttempnet.temperature.statistics import TemperatureStatistics
from disttempnet.temperature.table import check_table, columns_of, open_table
from disttempnet.terminal import console
from disttempnet.training.checkpoint import Run, load_run
from disttempnet.training.run_folder import list_checkpoints

SKIPPED_SHOWN = 20  # unreadable images that are named


class TemperatureSource(NamedTuple):
    """Data set to measure on: at most one of these; none means the run's own training data."""

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
    """Write a row an item to `out`, and the page to `gallery`; return the number of rows.

    Args:
        target: a run folder (its last checkpoint) or a checkpoint folder.
        columns: facts of the samples' .json that become columns.
        frequency_by: the fact whose frequency the page compares with τ.
        batch: images or captions embedded at once.

    Raises:
        UserError: no run, no τ, no data, or a table or page that cannot be written.
    """
    # Whatever can fail is tried before the work.
    check_table(out, columns)
    for path in (out, gallery):
        if path is not None:
            refuse_unwritable(path)

    with distributed.session() as device:
        # The run and its items. Objectives with τ of training samples only fit no other items.
        checkpoints = list_checkpoints(Path(target))
        run = load_run(checkpoints[-1] if checkpoints else target)
        run.towers.module.to(device)
        run.loss.to(device)
        refuse_without_temperatures(run, training=not any(source) or bool(source.shards))
        items = _open(run, source)
        refuse_without_temperatures(run, training=isinstance(items, Pairs) and items.training)

        # Chunk by chunk into the table and the statistics: all ranks measure, rank 0 writes.
        main = distributed.is_main()
        statistics = TemperatureStatistics(items, frequency_by) if gallery else None
        rows, skipped = 0, list[str]()
        meter = Meter("temperatures", len(items), active=main)
        with open_table(out, columns) if main else nullcontext() as table, meter:
            for chunk in measure_temperatures(run, items, device=device, batch=batch):
                if table is not None:
                    table.write(columns_of(chunk, columns))
                if statistics is not None and main:
                    statistics.add(chunk)
                rows += len(chunk.items)
                skipped += chunk.skipped
                meter.advance(chunk.read)
            if not rows:
                raise UserError(f"{items.about}: none of its {len(items)} images can be decoded")

        # The page, and its correlations in the terminal.
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


def _name_skipped(skipped: Sequence[str]) -> None:
    if skipped:
        shown, more = ", ".join(skipped[:SKIPPED_SHOWN]), ", …" if len(skipped) > SKIPPED_SHOWN else ""
        console(stderr=True).print(f"left out {len(skipped):,} unreadable images: {shown}{more}", soft_wrap=True)
