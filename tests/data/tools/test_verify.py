"""Every kind of damage is found and named, and nothing else is."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from disttempnet.cli.main import main
from disttempnet.config import SourceConfig
from disttempnet.data import open_index
from disttempnet.data.shards import scan as scan_module
from disttempnet.data.shards.build import ScanSettings, build_shard_index
from disttempnet.data.shards.names import resolve_shards
from disttempnet.data.tools.verify import verify
from tests.data.conftest import png, sample, write_shard

Write = Callable[..., Path]


def found(folder: Path, workers: int = 1, count: int = 0) -> list[tuple[int | None, str, str]]:
    checked = verify(SourceConfig(path=str(folder)), workers, count, progress=False)
    return [tuple(fault) for fault in checked.faults]


@pytest.mark.parametrize("workers", [1, 2])
def test_names_broken_samples(shards: Write, workers: int) -> None:
    cut = png(7, size=(90, 90))
    changes = {
        2: {**sample(2), "png": b"<html>404</html>"},
        3: {**sample(3), "txt": b" "},
        5: {"txt": b"no picture"},
        7: {**sample(7), "png": cut[: len(cut) // 2]},
    }
    folder = shards(4, 5, 3, changes=changes)
    faults = found(folder, workers)
    assert [fault[:2] for fault in faults] == [
        (2, "00000.tar:000000002"),
        (3, "00000.tar:000000003"),
        (5, "00001.tar:000000005"),
        (7, "00001.tar:000000007"),
    ]
    assert [fault[2] for fault in faults][:3] == ["cannot identify image", "empty caption", "no image"]
    assert "image" in faults[3][2]


def test_names_shards_that_differ_from_the_index(shards: Write) -> None:
    folder = shards(2, 2, 2, 2)
    open_index(str(folder), progress=False)
    assert found(folder) == []
    write_shard(folder / "00000.tar", {f"{n}": sample(n) for n in range(9)})
    write_shard(folder / "00009.tar", {"new": sample(9)})
    data = bytearray((folder / "00001.tar").read_bytes())
    data[600] ^= 1
    (folder / "00001.tar").write_bytes(data)
    gone = folder / "00002.tar"
    gone.unlink()
    size = (folder / "00000.tar").stat().st_size
    assert found(folder) == [
        (None, "00009.tar", "shard is not in the index"),
        (None, "00000.tar", f"shard has {size:,} bytes, 10,240 when it was indexed"),
        (None, "00001.tar", "the content of the shard has changed since it was indexed"),
        (None, "00002.tar", f"shard is gone: {gone}: cannot be read: No such file or directory; restore the shard"),
    ]


def test_names_with_dots_that_were_lost_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the index, and where an earlier version made it, by another look at the shard."""
    write_shard(tmp_path / "0.tar", {"a": sample(0), "c": {"v1.png": png(3)}})
    assert found(tmp_path) == [
        (None, "0.tar", "1 files with several dots in their names belong to no sample: c.v1.png")
    ]
    write_shard(tmp_path / "0.tar", {"a": sample(0), "mr. b": sample(1), "mr. c": sample(2)})
    path = tmp_path / "all.index"
    path.unlink()
    with monkeypatch.context() as earlier:
        earlier.setattr(scan_module, "_add_dotted", lambda *_: None)
        earlier.setattr(scan_module.ShardScan, "about_ungrouped", None)
        assert len(open_index(str(tmp_path), progress=False)) == 1
    assert len(open_index(str(tmp_path), progress=False)) == 1, "what it has is as valid as before"
    what = f"3 samples are in it, 1 in its index, which an earlier version made: delete {path} to index again"
    assert found(tmp_path) == [(None, "0.tar", what)]


def test_names_shards_that_were_cut_off(shards: Write) -> None:
    folder = shards(3, 3)
    with (folder / "00001.tar").open("r+b") as file:
        file.truncate(6 * 512)
    faults = found(folder)
    assert faults[0][:2] == (None, "00001.tar")
    assert "shard ends at byte 3,072" in faults[0][2]
    assert all(fault[1].startswith("00001.tar") for fault in faults)


def test_checksums_find_what_a_fingerprint_cannot(tmp_path: Path) -> None:
    big = {f"{n:09d}": {**sample(n), "cls": bytes(50_000)} for n in range(6)}
    path = write_shard(tmp_path / "0.tar", big)
    shards = resolve_shards(str(tmp_path))
    build_shard_index(shards, tmp_path / "all.index", ScanSettings(checksum=True, progress=False))
    assert found(tmp_path) == []
    with path.open("r+b") as file:
        file.seek(path.stat().st_size // 2)
        file.write(b"?")
    assert found(tmp_path) == [(None, "0.tar", "the checksum of the shard has changed since it was indexed")]
    assert found(tmp_path, count=3) == [], "a quick look does not read whole shards"


def test_a_quick_look_reads_so_many(shards: Write) -> None:
    folder = shards(6, 6, changes={n: {**sample(n), "png": b"?"} for n in range(12)})
    config = SourceConfig(path=str(folder))
    first = verify(config, 1, count=5, seed=1, progress=False)
    other = verify(config, 1, count=5, seed=2, progress=False)
    assert first.samples == len(first.faults) == 5
    assert first.faults != other.faults
    assert verify(config, 1, count=99, progress=False).samples == 12


def test_the_command_tells_by_table_file_and_exit_code(
    shards: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = shards(3, 3, changes={1: {**sample(1), "png": b"?"}, 4: {**sample(4), "png": b"?"}})
    listing = tmp_path / "broken.jsonl"
    assert main(["data", "verify", str(folder), "--workers", "1", "--out", str(listing)]) == 1
    said = capsys.readouterr().out
    assert "6 samples read, 2 samples broken" in said
    row = next(line for line in said.splitlines() if "cannot identify image" in line)
    assert " 2 " in row
    assert "00000.tar:000000001, 00001.tar:000000004" in row
    lines = [json.loads(line) for line in listing.read_text(encoding="utf-8").splitlines()]
    assert [line["id"] for line in lines] == [1, 4]
    assert main(["data", "verify", "embedded:emoji/val", "--sample", "20", "--workers", "1"]) == 0
    assert "20 samples read, 0 samples broken" in capsys.readouterr().out
    assert main(["data", "verify", str(tmp_path / "nowhere")]) == 2
    assert "no such folder" in capsys.readouterr().err


def test_listings_are_verified_too(tmp_path: Path) -> None:
    for number in range(3):
        (tmp_path / f"{number}.png").write_bytes(png(number))
    rows = [{"image": f"{number}.png", "caption": f"caption {number}"} for number in range(5)]
    listing = tmp_path / "list.json"
    listing.write_text(json.dumps(rows), encoding="utf-8")
    faults = found(listing)
    assert [fault[0] for fault in faults] == [3, 4]
    assert all("No such file" in fault[2] for fault in faults)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--sample", "-5"], "--sample: must be a whole number from 0 to 1,000,000,000,000 (got -5)"),
        (["--seed", "-1"], "--seed: must be a whole number from 0"),
    ],
)
def test_negative_numbers_are_refused(
    shards: Write, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["data", "verify", str(shards(2)), *arguments]) == 2
    assert message in capsys.readouterr().err
