"""The store of local shards: a changed shard is refused, few files are open, nothing irregular is opened."""

import os
import pickle
import resource
from pathlib import Path

import pytest

from disttempnet.data import (
    open_index,
)
from disttempnet.data.shards import index as index_module
from disttempnet.errors import UserError
from disttempnet.io import machine
from tests.data.shards.refusals import Write, refusal, replace_same_size


def test_a_shard_that_changes_while_it_is_read(shards: Write) -> None:
    folder = shards(3, 2)
    index = open_index(str(folder), progress=False)
    assert index.captions(4) == ("caption 4",)
    os.truncate(folder / "00001.tar", 1000)
    with pytest.raises(UserError, match=r"00001\.tar: ends inside sample 4: .*restore the shard"):
        index.image_bytes(4)
    (folder / "00000.tar").unlink()
    with pytest.raises(UserError, match=r"00000\.tar: cannot be read: No such file"):
        index.image_bytes(0)


@pytest.mark.parametrize("by", ["rewriting", "renaming", "cutting"])
def test_a_shard_that_is_replaced_after_the_start_is_refused(shards: Write, by: str) -> None:
    folder = replace_same_size(shards(3, 2))
    index = open_index(str(folder), progress=False)
    assert index.captions(2) == ("caption 1",)
    index.close()
    if by == "renaming":
        os.replace(folder / "00000.tar", folder / "00001.tar")
    elif by == "rewriting":
        (folder / "00001.tar").write_bytes((folder / "00000.tar").read_bytes())
    else:
        os.truncate(folder / "00001.tar", 512)
    what = "it has 512 bytes, not 10,240" if by == "cutting" else "its content differs"
    for reader in (index, pickle.loads(pickle.dumps(index))):
        with pytest.raises(UserError, match=rf"00001\.tar: this shard has changed since it was indexed: {what}\. Res"):
            reader.captions(2)


def test_many_shards_need_few_open_files(shards: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("disttempnet.data.shards.store.LocalStore.open_files", 3)
    index = open_index(str(shards(*[1] * 8)), progress=False)
    for _ in range(2):
        assert [index.captions(n)[0] for n in range(8)] == [f"caption {n}" for n in range(8)]
        assert len(index._files) == 3
    for number in (-1, 8):
        with pytest.raises(IndexError):
            index.captions(number)[0]


def test_shards_that_are_no_regular_files_are_not_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "0.tar")
    assert f"{tmp_path}/0.tar: cannot be read: not a regular file; restore the shard" in refusal(tmp_path)
    (tmp_path / "0.tar").unlink()
    (tmp_path / "0.tar").symlink_to("/dev/zero")
    assert "0.tar: cannot be read: not a regular file" in refusal(tmp_path)


def test_a_low_limit_of_open_files_is_named(shards: Write) -> None:
    folder = shards(*[1] * 40)
    index = open_index(str(folder), progress=False)
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    used = len(os.listdir("/proc/self/fd"))
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (used + 4, limits[1]))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(machine, "open_files", lambda: used + 4)  # which would raise it again
            patch.setattr(index_module, "open_files", lambda: 1000)
            with pytest.raises(UserError, match=rf"too many open files: this process may open {used + 4}; raise"):
                [index.captions(n) for n in range(40)]
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    index.close()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(index_module, "open_files", lambda: 64)
        few = open_index(str(folder), progress=False)
        assert [few.captions(n)[0] for n in range(40)] == [f"caption {n}" for n in range(40)]
    assert len(few._files) == 16, "a quarter of what is allowed"
