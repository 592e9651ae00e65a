"""The journal of a scan: damaged records are scanned again, and one process holds it at a time."""

import hashlib
import json
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from disttempnet.data import open_index
from disttempnet.data.shards import build as building
from disttempnet.data.shards.build import ScanSettings
from disttempnet.data.shards.journal import Journal
from disttempnet.data.shards.store import LocalStore
from tests.data.conftest import sample, write_shard
from tests.data.shards.conftest import Write, files

QUIET = ScanSettings(workers=1, progress=False)


@pytest.mark.parametrize("damage", ["cut", "flip", "tail", "other key", "changed shard"])
def test_a_damaged_journal_is_scanned_again(shards: Write, scanned: list[str], damage: str) -> None:
    folder = shards(3, 2, 4)
    wanted = open_index(str(folder), progress=False).path.read_bytes()
    path = folder / "all.index"
    path.unlink()
    journal, store = Journal(path, "texts" if damage == "other key" else ""), LocalStore(folder)
    for name in ("00000.tar", "00001.tar"):
        journal.append(*building._scan_one(store, name, store.state(name), QUIET))  # type: ignore[misc]
    journal.close()
    data = bytearray(journal.path.read_bytes())
    again = ["00001.tar", "00002.tar"]
    if damage == "cut":
        del data[-5:]
    elif damage == "flip":
        data[-5] ^= 1
    elif damage == "tail":
        data += (1 << 40).to_bytes(8, "little") + b"x" * 30
        again = ["00002.tar"]
    elif damage == "other key":
        again = ["00000.tar", *again]
    else:
        write_shard(folder / "00000.tar", {f"{n:09d}": sample(n + 1) for n in range(3)})
        again = ["00000.tar", "00002.tar"]
    journal.path.write_bytes(data)
    scanned.clear()
    index = open_index(str(folder), progress=False)
    assert scanned == again
    assert (index.path.read_bytes() == wanted) == (damage != "changed shard")
    assert files(folder) == ["all.index"]


def journal_of(folder: Path, *names: str) -> Journal:
    """A journal in which these shards are scanned."""
    journal, store = Journal(folder / "all.index", ""), LocalStore(folder)
    for name in names:
        journal.append(*building._scan_one(store, name, store.state(name), QUIET))  # type: ignore[misc]
    return journal


@pytest.mark.parametrize("change", [{"field of later": 1}, {"samples": 7}])
def test_records_of_another_version_are_scanned_again(shards: Write, scanned: list[str], change: dict) -> None:
    folder = shards(3, 2, 4)
    journal = journal_of(folder, "00000.tar", "00001.tar")
    journal.close()
    data = journal.path.read_bytes()
    second = 24 + int.from_bytes(data[:8], "little")  # a record is size, digest of 16 bytes, payload
    payload = data[second + 24 :]
    end = 8 + int.from_bytes(payload[:8], "little")
    head = json.loads(payload[8:end])
    head["shard"] |= change
    text = json.dumps(head).encode()
    payload = len(text).to_bytes(8, "little") + text + payload[end:]
    digest = hashlib.blake2b(payload, digest_size=16).digest()
    journal.path.write_bytes(data[:second] + len(payload).to_bytes(8, "little") + digest + payload)
    scanned.clear()
    index = open_index(str(folder), progress=False)
    assert scanned == ["00001.tar", "00002.tar"]
    assert [index.captions(n)[0] for n in range(9)] == [f"caption {n}" for n in range(9)]


def test_who_waited_for_a_journal_that_is_gone_makes_a_new_one(shards: Write) -> None:
    folder = shards(3, 2)
    first = journal_of(folder, "00000.tar")
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(journal_of, folder, "00001.tar")
        time.sleep(0.3)  # enough for it to ask for the lock; were it later, it would find no journal
        first.remove()
        first.close()
        second = waiting.result()
    second.close()
    third = Journal(folder / "all.index", "")
    assert list(third.shards) == ["00001.tar"]
    third.close()


def test_a_journal_takes_no_other_away(shards: Write) -> None:
    folder = shards(3, 2)
    empty = journal_of(folder)
    empty.path.unlink()
    other = journal_of(folder, "00000.tar")
    empty.close()
    assert other.path.is_file()
    other.close()


def test_who_comes_second_waits_and_scans_nothing(shards: Write, scanned: list[str]) -> None:
    folder = shards(*[20] * 6)
    with ThreadPoolExecutor(4) as pool:
        indexes = list(pool.map(lambda _: open_index(str(folder), progress=False), range(4)))
    assert len({index.digest for index in indexes}) == 1
    assert sorted(scanned) == [f"{n:05d}.tar" for n in range(6)]
    assert files(folder) == ["all.index"]
