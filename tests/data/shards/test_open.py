"""Opening an index: built once, checked at every start, the same on all ranks, and every difference named."""

import os
import pickle
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from disttempnet import distributed
from disttempnet.data import (
    open_index,
)
from disttempnet.data.shards import open as indexing
from disttempnet.distributed import collectives
from disttempnet.errors import UserError
from tests.data.conftest import sample, write_shard
from tests.data.shards.refusals import Write, refusal, replace_same_size
from tests.gloo import Pools


def _rename(folder: Path) -> None:
    (folder / "00001.tar").rename(folder / "00009.tar")


def _cut(folder: Path) -> None:
    os.truncate(folder / "00001.tar", 3000)


def _change(folder: Path) -> None:
    data = bytearray((folder / "00001.tar").read_bytes())
    data[600] ^= 1
    (folder / "00001.tar").write_bytes(data)


def _grow(folder: Path) -> None:
    with (folder / "00001.tar").open("ab") as file:
        file.write(bytes(512))


def _swap(folder: Path) -> None:
    first, second = ((folder / f"0000{n}.tar").read_bytes() for n in range(2))
    (folder / "00000.tar").write_bytes(second)
    (folder / "00001.tar").write_bytes(first)


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (_rename, r"00009\.tar: this shard was renamed: it was indexed as 00001\.tar\. Rename it back"),
        (lambda folder: (folder / "00001.tar").unlink(), r"00001\.tar: this shard is missing: .*2 samples, ids 3 to 4"),
        (_cut, r"00001\.tar: this shard was cut off: it has 3,000 bytes, indexed were 10,240 bytes and 2 samples"),
        (_change, r"00001\.tar: this shard has other content"),
        (_grow, r"00001\.tar: this shard was changed: it has 10,752 bytes"),
        (_swap, r"00000\.tar: this shard has other content"),
        (lambda folder: write_shard(folder / "00002.tar", {"x": sample(1)}), r"00002\.tar: this shard was not there"),
    ],
    ids=["renamed", "deleted", "cut", "changed", "grown", "swapped", "added"],
)
def test_shards_that_differ_from_the_index(shards: Write, fault: Callable[[Path], object], message: str) -> None:
    folder = shards(3, 2)
    if fault is _swap:
        folder = replace_same_size(folder)
    open_index(str(folder), progress=False)
    fault(folder)
    text = refusal(folder)
    assert re.search(message, text), text
    assert f"or index again: disttempnet data index {folder} (older" in text
    assert "older checkpoints will not fit" in text


@pytest.mark.parametrize("damage", ["flip", "cut", "empty", "other"])
def test_a_damaged_index_says_how_to_make_it_again(shards: Write, damage: str) -> None:
    folder = shards(3, 2)
    path = open_index(str(folder), progress=False).path
    data = bytearray(path.read_bytes())
    data[-10] ^= 1
    content = {"flip": bytes(data), "cut": bytes(data[:-20]), "empty": b"", "other": b'{"index": 1}' * 10}
    path.write_bytes(content[damage])
    assert "all.index: not a usable shard index" in refusal(folder)
    path.unlink()
    assert len(open_index(str(folder), progress=False)) == 5


def test_the_index_may_lie_elsewhere(shards: Write, tmp_path: Path) -> None:
    folder = shards(3, 2)
    path = tmp_path / "new" / "shards.index"
    assert open_index(str(folder), str(path), progress=False).path == path
    assert path.is_file()
    assert [entry.suffix for entry in folder.iterdir()] == [".tar", ".tar"]
    assert "is a folder; name a file" in refusal(folder, str(tmp_path))
    (tmp_path / "file").write_text("")
    message = refusal(folder, str(tmp_path / "file" / "index"))
    assert "the index cannot be written" in message
    assert "name another file" in message


def open_on_a_rank(spec: str) -> str:
    try:
        return open_index(spec, progress=False).digest
    except UserError as error:
        return str(error)


def test_ranks_agree(shards: Write, gloo: Pools) -> None:
    folder = shards(3, 2)
    answers = gloo(2, open_on_a_rank, str(folder))
    assert set(answers) == {open_index(str(folder), progress=False).digest}


def open_in_own_cache(spec: str, folder: Path) -> tuple[str, int, str, list[str]]:
    """As on a node whose cache is a disk of its own."""
    cache = folder / str(distributed.rank())
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DISTTEMPNET_CACHE", str(cache))
        patch.setattr(collectives, "BROADCAST_BYTES", 1000)  # bytes: several pieces
        index = open_index(spec, progress=False)
        there = sorted(path.name for path in index.path.parent.iterdir())
        return index.digest, index.path.stat().st_size, index.captions(4)[0], there


def test_nodes_without_a_common_disk_share_an_index(shards: Write, tmp_path: Path, gloo: Pools) -> None:
    folder = shards(*[9] * 4)
    spec = f"file://{folder}/{{00000..00003}}.tar"
    first, second = gloo(2, open_in_own_cache, spec, tmp_path)
    assert first[:3] == second[:3]
    assert first[0] == open_index(str(folder), progress=False).digest
    assert first[1] > 2000
    assert second[3] == ["00000..00003.index"], "shards are fetched when they are read"
    again = gloo(2, open_in_own_cache, spec, tmp_path)
    assert [answer[:3] for answer in again] == [first[:3]] * 2


def open_where_a_file_is(spec: str, folder: Path) -> str:
    """On the second rank the cache is no folder."""
    cache = folder / str(distributed.rank())
    if distributed.rank():
        cache.write_text("")
    try:
        return open_index(spec, cache=str(cache), progress=False).digest
    except UserError as error:
        return str(error)


def test_a_rank_that_cannot_keep_the_index_ends_all(shards: Write, tmp_path: Path, gloo: Pools) -> None:
    spec = f"file://{shards(3, 2)}/{{00000..00001}}.tar"
    first, second = gloo(2, open_where_a_file_is, spec, tmp_path)
    assert "/00000..00001.index: the index cannot be written (Not a directory)" in second
    assert first == f"rank 1: {second}"


def open_under_a_limit(spec: str) -> str:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(indexing, "WHILE_RANKS_WAIT", 15_000)
        return open_on_a_rank(spec)


def test_ranks_do_not_wait_for_a_long_first_scan(shards: Write, gloo: Pools) -> None:
    folder = shards(3, 2)  # of 10,240 bytes each
    first, second = gloo(2, open_under_a_limit, str(folder))
    assert first == (
        f"{folder}: 20.5 kB of shards are not indexed yet, which can take longer than the other ranks wait; "
        f"index them first: disttempnet data index {folder}"
    )
    assert second == f"rank 0: {first}"
    open_index(f"{folder}/{{00000..00000}}.tar", progress=False)
    digests = gloo(2, open_under_a_limit, str(folder))  # what is left to scan is little
    assert set(digests) == {open_index(str(folder), progress=False).digest}


def test_an_index_that_is_gone_says_so(shards: Write) -> None:
    index = open_index(str(shards(3, 2)), progress=False)
    copy = pickle.dumps(index)
    index.path.unlink()
    with pytest.raises(UserError, match=r"all\.index: this index is gone; start again to build it$"):
        pickle.loads(copy)


def test_what_one_rank_finds_wrong_all_ranks_raise(shards: Write, gloo: Pools) -> None:
    folder = shards(3, 2)
    (folder / "00001.tar").write_bytes(b"no tar" * 200)
    answers = gloo(2, open_on_a_rank, str(folder))
    assert "00001.tar: not a readable .tar shard" in answers[0]
    assert answers[1] == f"rank 0: {answers[0]}"
