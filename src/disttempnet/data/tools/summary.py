"""Summary of an index in tables: totals, statistics of images and captions, samples left out and why."""

from __future__ import annotations

from rich.console import Group, RenderableType
from rich.table import Table

from disttempnet.data.headers import IMAGE_FORMATS
from disttempnet.data.listings.open import Listing
from disttempnet.data.shards.index import Shard, ShardIndex
from disttempnet.data.shards.scan import Tally, merge_tally

MEASURES = ("image bytes", "image width", "image height", "captions a sample", "caption characters")


def index_summary(index: ShardIndex) -> RenderableType:
    """Return tables for a terminal."""
    tally: Tally = {}
    for shard in index.shards:
        merge_tally(tally, shard.tally)
    tables: list[RenderableType] = [_totals(index, tally), _measures(tally), *_left_out(index.left_out())]
    if notes := [(shard.name, note) for shard in index.shards for note in _notes(shard)]:
        table = Table("shard", "problem", title="shards", title_justify="left")
        for name, note in notes:
            table.add_row(name, note)
        tables.append(table)
    return Group(*tables)


def listing_summary(listing: Listing) -> RenderableType:
    """Return tables for a terminal."""
    table = Table(title=str(listing.path), title_justify="left", show_header=False)
    table.add_row(
        "rows" if listing.columns.numbers is None else "samples",
        f"{len(listing):,}, of which {len(listing.usable):,} usable",
    )
    for note in listing.notes():
        table.add_row("read", note)
    table.add_row("index", f"{listing.path.stat().st_size / 1e6:,.1f} MB, digest {listing.digest[:12]}")
    return Group(table, *_left_out(listing.left_out()))


def _left_out(reasons: list[tuple[str, int, list[str]]]) -> list[RenderableType]:
    """Return a table of (reason, samples, first names) if there are any."""
    if not reasons:
        return []
    table = Table("left out", "samples", "for example", title="unreadable samples", title_justify="left")
    table.columns[1].justify = "right"
    for reason, samples, names in reasons:
        table.add_row(reason, f"{samples:,}", ", ".join(names) + (", …" if samples > len(names) else ""))
    return [table]


def _notes(shard: Shard) -> list[str]:
    """Return the damage of a shard, a line each."""
    empty = "" if shard.samples else "has no samples"
    return [note for note in (shard.note or empty, shard.ungrouped) if note]


def _totals(index: ShardIndex, tally: Tally) -> Table:
    usable, hashed = int(index.usable_counts.sum()), sum(1 for shard in index.shards if shard.checksum)
    images = sum(tally[name][0] for name in IMAGE_FORMATS if name in tally)
    formats = ", ".join(f"{name} {tally[name][0] / images:.4%}" for name in IMAGE_FORMATS if name in tally)
    table = Table(title=f"{index.path!s}", title_justify="left", show_header=False)
    table.add_row("shards", f"{len(index.shards):,}, {sum(shard.size for shard in index.shards) / 1e9:,.2f} GB")
    table.add_row("samples", f"{len(index):,}, of which {usable:,} usable")
    table.add_row("images", formats or "not measured: indexed by an earlier version")
    table.add_row("captions", f"key '{index.caption_key}' of .json" if index.caption_key else ".txt")
    table.add_row("checksums", f"of {hashed:,} shards" if hashed else "none (--checksum)")
    table.add_row("index", f"{index.path.stat().st_size / 1e6:,.1f} MB, digest {index.digest[:12]}")
    return table


def _measures(tally: Tally) -> Table:
    table = Table("measure", "count", "mean", "lowest", "highest")
    for column in table.columns[1:]:
        column.justify = "right"
    for name in MEASURES:
        if name in tally:
            count, total, low, high = tally[name]
            table.add_row(name, f"{count:,}", f"{total / count:,.1f}", f"{low:,}", f"{high:,}")
    return table
