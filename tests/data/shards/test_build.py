"""Indexes are made whole or not at all, go on where the last attempt ended, and grow without moving ids."""

import errno
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from safetensors.numpy import load_file

from disttempnet.cli.main import main
from disttempnet.config import SourceConfig
from disttempnet.data import ShardIndex, open_index
from disttempnet.data.shards import build as building
from disttempnet.data.shards.open import update_index
from disttempnet.errors import UserError
from disttempnet.io import progress as meter
from disttempnet.io.jobs import run_jobs
from tests.data.conftest import png, sample, write_shard
from tests.data.pictures import noise_image
from tests.data.shards.conftest import Write, files
from tests.full_disk import small_files


def update(folder: Path, workers: int = 1, checksum: bool = False) -> tuple[ShardIndex, str]:
    return update_index(SourceConfig(path=str(folder)), workers, checksum, progress=False)


def test_the_file_is_safetensors(shards: Write) -> None:
    index = open_index(str(shards(3, 2)), progress=False)
    columns = load_file(index.path)
    assert sorted(columns) == ["spans", "start", "status"]
    for name, column in columns.items():
        assert column.tolist() == getattr(index, name).tolist()
        assert column.dtype == getattr(index, name).dtype


def test_processes_change_nothing(shards: Write) -> None:
    folder = shards(3, 2, 0, 4, 1)
    alone = update(folder)[0].path.read_bytes()
    (folder / "all.index").unlink()
    assert update(folder, workers=2)[0].path.read_bytes() == alone
    assert files(folder) == ["all.index"]


def test_new_shards_get_the_ids_after_the_others(shards: Write, scanned: list[str]) -> None:
    folder = shards(3, 2)
    before, news = update(folder)
    assert news == "indexed for the first time"
    assert update(folder)[1] == "the same samples as before"
    assert scanned == ["00000.tar", "00001.tar"]
    write_shard(folder / "000005.tar", {"new": sample(70)})  # sorted, it would be the second
    with pytest.raises(UserError, match=r"000005\.tar: this shard was not there .* or index again: disttempnet data"):
        open_index(str(folder), progress=False)
    index, news = update(folder)
    assert news == "1 shards new: ids 0 to 4 stay, new ids follow"
    assert scanned[2:] == ["000005.tar"]
    assert [index.captions(n)[0] for n in range(6)] == [*(f"caption {n}" for n in range(5)), "caption 70"]
    assert open_index(str(folder), progress=False).digest == index.digest != before.digest
    assert index.start[:5].tolist() == before.start.tolist()


def test_a_pattern_that_grows_scans_what_is_new(shards: Write, scanned: list[str]) -> None:
    folder = shards(3, 2, 4, 1)
    before = open_index(f"{folder}/{{00000..00001}}.tar", progress=False)
    open_index(f"{folder}/{{00002..00002}}.tar", progress=False)
    (folder / "a listing.index").write_bytes(b"of another kind" * 9)
    assert scanned == ["00000.tar", "00001.tar", "00002.tar"]
    index = open_index(f"{folder}/{{00000..00003}}.tar", progress=False)
    assert scanned[3:] == ["00003.tar"]
    assert [index.captions(n)[0] for n in range(10)] == [f"caption {n}" for n in range(10)]
    assert index.path != before.path
    again = index.path.read_bytes()
    for path in folder.glob("*.index"):
        path.unlink()
    assert open_index(f"{folder}/{{00000..00003}}.tar", progress=False).path.read_bytes() == again


def test_only_sound_and_fitting_indexes_of_others_are_used(shards: Write, scanned: list[str]) -> None:
    folder = shards(3, 2, 4, changes={3: {**sample(3), "json": b'{"texts": "another"}'}})
    first = open_index(f"{folder}/{{00000..00000}}.tar", progress=False).path
    open_index(f"{folder}/{{00001..00001}}.tar", progress=False, caption_key="texts")
    open_index(f"{folder}/{{00002..00002}}.tar", progress=False)
    data = bytearray(first.read_bytes())
    data[-1] ^= 1  # the status of the last sample
    first.write_bytes(data)
    write_shard(folder / "00002.tar", {f"{n:09d}": sample(n + 1) for n in range(5, 9)})  # of the same size
    scanned.clear()
    index = open_index(str(folder), progress=False)
    assert scanned == ["00000.tar", "00001.tar", "00002.tar"]
    numbers = [*range(5), *range(6, 10)]
    assert [index.captions(n)[0] for n in range(9)] == [f"caption {n}" for n in numbers]


def test_changed_and_lost_shards(shards: Write, scanned: list[str]) -> None:
    folder = shards(3, 2, 1)
    update(folder)
    write_shard(folder / "00000.tar", {"x": sample(9)})
    (folder / "00001.tar").unlink()
    index, news = update(folder)
    assert news == "1 shards gone, 1 shards changed: ids change"
    assert scanned[3:] == ["00000.tar"]
    assert [index.captions(n)[0] for n in range(2)] == ["caption 9", "caption 5"]
    assert len(open_index(str(folder), progress=False)) == 2


def test_checksums_find_what_fingerprints_do_not(tmp_path: Path) -> None:
    big = os.urandom(200_000)
    write_shard(tmp_path / "0.tar", {"a": {"jpg": big, "txt": b"a"}})
    write_shard(tmp_path / "1.tar", {"b": sample(1)})
    plain = update(tmp_path)[0]
    index, news = update(tmp_path, checksum=True)
    assert news == "the same samples as before; checksums compared and equal: 0"
    assert index.digest == plain.digest  # checkpoints of before still fit
    wanted = subprocess.run(["sha256sum", tmp_path / "0.tar"], capture_output=True, text=True, check=True).stdout
    assert index.shards[0].checksum == wanted.split()[0]
    assert update(tmp_path, checksum=True)[1].endswith("compared and equal: 2")
    assert update(tmp_path)[0].shards[0].checksum  # stays known
    data = bytearray((tmp_path / "0.tar").read_bytes())
    data[100_000] ^= 1  # neither in the first nor in the last 64 KiB
    (tmp_path / "0.tar").write_bytes(data)
    assert open_index(str(tmp_path), progress=False).digest == index.digest
    with pytest.raises(UserError, match=r"0\.tar: its checksum is not the one in the index: restore the shard"):
        update(tmp_path, checksum=True)
    data[100_000] ^= 1
    (tmp_path / "0.tar").write_bytes(data)
    assert update(tmp_path, checksum=True)[1].endswith("compared and equal: 2")
    assert files(tmp_path) == ["all.index"]


def test_all_shards_that_are_no_tars_are_counted_and_the_others_kept(shards: Write, scanned: list[str]) -> None:
    folder = shards(2, 2, 2, 2)
    good = {n: (folder / f"0000{n}.tar").read_bytes() for n in (0, 2)}
    for n in good:
        (folder / f"0000{n}.tar").write_bytes(b"<html>" * 99)
    with pytest.raises(UserError, match=r"00000\.tar: not a readable .* \(and 1 more shards cannot be read\)$"):
        open_index(str(folder), progress=False)
    assert files(folder) == ["all.index.partial"]
    for n, data in good.items():
        (folder / f"0000{n}.tar").write_bytes(data)
    scanned.clear()
    index = open_index(str(folder), progress=False)
    assert scanned == ["00000.tar", "00002.tar"]
    assert [index.captions(n)[0] for n in range(8)] == [f"caption {n}" for n in range(8)]
    assert files(folder) == ["all.index"]


@pytest.mark.parametrize("size", [0, 700, 1500, 5000, 14_050])
def test_a_disk_that_fills_leaves_nothing_that_is_trusted(shards: Write, scanned: list[str], size: int) -> None:
    folder = shards(*[40] * 8)  # a record of the journal has 1.7 kB, the index 14.2 kB, all of the journal 13.9 kB
    with (
        small_files(size),
        pytest.raises(UserError, match=r"all\.index: the index cannot be written \(File too large\)"),
    ):
        open_index(str(folder), progress=False)
    assert files(folder) in ([], ["all.index.partial"])
    kept = len(scanned) - (size < 14_050)  # in the last case it is the index that does not fit
    scanned.clear()
    index = open_index(str(folder), progress=False)
    assert len(scanned) == 8 - kept
    assert [index.captions(n)[0] for n in range(320)] == [f"caption {n}" for n in range(320)]
    assert files(folder) == ["all.index"]


def test_a_disk_that_is_full_when_the_index_is_renamed(shards: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = shards(3, 2)

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(UserError, match=r"the index cannot be written \(No space left on device\); make room"):
            open_index(str(folder), progress=False)
    assert files(folder) == ["all.index.partial"]
    assert len(open_index(str(folder), progress=False)) == 5


COMMAND = [sys.executable, "-m", "disttempnet", "data", "index"]


@pytest.fixture
def slow(tmp_path: Path) -> dict[str, str]:
    """Environment in which scanning a shard takes a while, in every process."""
    (tmp_path / "slow").mkdir()
    (tmp_path / "slow" / "sitecustomize.py").write_text(
        "import tarfile, time\n"
        "frombuf = tarfile.TarInfo.frombuf.__func__\n"
        "def slowly(*arguments):\n"
        "    time.sleep(0.02)\n"
        "    return frombuf(*arguments)\n"
        "tarfile.TarInfo.frombuf = classmethod(slowly)\n"
    )
    paths = [str(tmp_path / "slow"), *(path for path in sys.path if path)]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}


def wait_for(journal: Path, size: int) -> None:
    limit = time.monotonic() + 300
    while not (journal.exists() and journal.stat().st_size > size):
        assert time.monotonic() < limit, "nothing is scanned"
        time.sleep(0.02)


def test_a_killed_scan_goes_on_where_it_was(shards: Write, slow: dict[str, str], scanned: list[str]) -> None:
    folder = shards(*[4] * 12)
    process = subprocess.Popen([*COMMAND, str(folder)], env=slow, stderr=subprocess.DEVNULL)
    wait_for(folder / "all.index.partial", 600)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    assert files(folder) == ["all.index.partial"]
    index = open_index(str(folder), progress=False)
    assert 1 <= len(scanned) <= 11
    resumed = index.path.read_bytes()
    index.path.unlink()
    assert open_index(str(folder), progress=False).path.read_bytes() == resumed


def children(process: int) -> list[int]:
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            except OSError:
                continue
            if parent == process:
                found += [int(entry.name), *children(int(entry.name))]
    return found


def alive(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_as_many_processes_as_the_work_asks_for(
    shards: Write, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """One a GiB and at most one a core, unless --workers says otherwise; a line from time to time without terminal."""
    asked = []

    def note(job: Any, tasks: Any, workers: int) -> Any:
        asked.append(workers)
        return run_jobs(job, tasks, 1)

    folder = shards(1, 2)
    size = sum(path.stat().st_size for path in folder.iterdir())
    monkeypatch.setattr(building, "run_jobs", note)
    monkeypatch.setattr(building, "cores", lambda: 4)
    monkeypatch.setattr(meter, "PLAIN_LINE_SECONDS", 0.0)
    for a_process, workers in ((1 << 30, "0"), (size // 2, "0"), (size // 9, "0"), (1 << 30, "7")):
        monkeypatch.setattr(building, "BYTES_PER_PROCESS", a_process)
        assert main(["data", "index", str(folder), "--workers", workers]) == 0
        (folder / "all.index").unlink()
    assert asked == [1, 3, 4, 7]
    lines = capfd.readouterr().err.splitlines()
    assert re.fullmatch(r"indexing 2 shards  10\.2 kB/20\.5 kB  [\d.]+ .?B/s  ETA 0:00:\d\d", lines[0])


@pytest.mark.parametrize("victim", ["worker", "parent"])
def test_a_process_of_the_pool_is_killed(shards: Write, slow: dict[str, str], victim: str) -> None:
    folder = shards(*[4] * 12)
    command = [*COMMAND, str(folder), "--workers", "2"]
    with subprocess.Popen(command, env=slow, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        wait_for(folder / "all.index.partial", 0)
        family = children(process.pid)
        # the last to be started is a worker, not the fork server
        os.kill(max(family) if victim == "worker" else process.pid, signal.SIGKILL)
        error = process.stderr.read()
    if victim == "worker":
        assert process.returncode == 2
        assert re.search(
            r"all\.index: a worker process died while it worked on 000\d\d\.tar: SIGKILL \(out of memory\? use fewer "
            r"--workers\); scanned shards are kept; run the same command again to resume",
            error,
        )
        assert "Traceback" not in error
    else:
        assert process.returncode == -signal.SIGKILL
    limit = time.monotonic() + 300
    while any(alive(pid) for pid in family):
        assert time.monotonic() < limit, "a process stays behind"
        time.sleep(0.05)
    assert len(open_index(str(folder), progress=False)) == 48


@pytest.mark.parametrize("remote", [False, True])
def test_the_remedy_of_a_refusal_works(shards: Write, tmp_path: Path, remote: bool) -> None:
    """The command is typed as it is printed: for this caption key, index file and cache, and no other."""
    folder = shards(3, 2)
    write_shard(folder / "00000.tar", {"old": {"png": png(0), "json": b'{"texts": "zero"}'}})
    keys: dict[str, Any] = {"caption_key": "texts", "index_path": str(tmp_path / "my own.index")}
    if remote:
        keys = {"caption_key": "texts", "cache": str(tmp_path / "a cache"), "cache_gb": 2.5}
    spec = f"{'file://' if remote else ''}{folder}/{{00000..00001}}.tar"
    open_index(spec, progress=False, **keys)
    write_shard(folder / "00000.tar", {"new": {"png": png(7), "json": b'{"texts": "one"}'}})
    with pytest.raises(UserError, match="this shard has other content") as refusal:
        open_index(spec, progress=False, **keys)
    command = str(refusal.value).partition("index again: ")[2].partition(" (older")[0]
    before = sorted(tmp_path.rglob("*.index"))
    program, *arguments = shlex.split(command)
    assert program == "disttempnet"
    assert main(arguments) == 0
    assert open_index(spec, progress=False, **keys).captions(0) == ("one",)
    assert sorted(tmp_path.rglob("*.index")) == before


def test_the_command_says_what_it_found(shards: Write, capsys: pytest.CaptureFixture[str]) -> None:
    changes = {
        1: {"txt": b"no image"},
        2: {"png": png(2), "txt": b"\xff"},
        4: {"jpg": noise_image("JPEG", (30, 20)), "txt": "née".encode()},
    }
    folder = shards(3, 2, 2, changes=changes)
    os.truncate(folder / "00002.tar", 512 * 9 + 3)
    assert main(["data", "index", str(folder), "--workers", "1", "--index", str(folder / "x.index")]) == 0
    text = " ".join(capsys.readouterr().out.replace("│", " ").split())
    for line in (
        "shards 3, 0.00 GB",
        "samples 7, of which 4 usable",
        "images jpg 16.6667%, png 83.3333%",
        "image width 6 12.5 9 30",
        "caption characters 5 7.6 3 9",
        "no image 1 00000.tar:000000001",
        "caption is not UTF-8 1 00000.tar:000000002",
        "cut off by the end of the shard 1 00002.tar:000000006",
        "00002.tar cut off at byte 4,611, inside 000000006.txt",
        "indexed for the first time",
    ):
        assert line in text, text
    assert main(["data", "index", str(folder), str(folder), "--index", "y"]) == 2
    assert "--index names one index, but there are 2 data sets" in capsys.readouterr().err
