"""The embedded shards are the provided ones, byte for byte, however many processes make them at once."""

import hashlib
import importlib.util
import multiprocessing
import tarfile
import zipfile
from multiprocessing.synchronize import Barrier
from pathlib import Path

import pytest

from disttempnet.data import embedded_shards
from disttempnet.data.builtin.emoji import DEMO_FOLDER
from disttempnet.errors import UserError

# sha256 of the shard files in order of name, recorded from the shards that the zip was packed from
DIGESTS = {
    "emoji/train": "4868b3d40ecfcb73accc801d6a3473ff9ff5e6e1181aa47794653f0ece95dc30",
    "emoji/val": "226b80498c9fa8c39629914fc7ff378271a1809bca11e4463f87ca5fcf661293",
    "emoji/val_concepts": "d42924c17ccd81941b06c9a94daf095c62497f4b8cae0568b8cbb815d3ec8cc3",
}
SAMPLES = {"emoji/train": 5453, "emoji/val": 1172, "emoji/val_concepts": 332}


@pytest.mark.parametrize("name", DIGESTS)
def test_shards_are_the_provided_ones(name: str) -> None:
    folder = embedded_shards(name)
    digest, members = hashlib.sha256(), 0
    for path in sorted(folder.glob("*.tar")):
        digest.update(path.name.encode() + path.read_bytes())
        with tarfile.open(path) as shard:
            members += len(shard.getnames())
    assert members == 3 * SAMPLES[name]
    assert digest.hexdigest() == DIGESTS[name]


def test_the_second_call_makes_nothing_new() -> None:
    first = embedded_shards("emoji/val_concepts")
    times = [path.stat().st_mtime_ns for path in first.glob("*.tar")]
    assert embedded_shards("emoji/val_concepts") == first
    assert [path.stat().st_mtime_ns for path in first.glob("*.tar")] == times


@pytest.mark.parametrize("name", ["emoji/trian", "emoji", "emojis/train", "", "../demo/emoji/train"])
def test_unknown_names_say_what_is_known(name: str) -> None:
    with pytest.raises(UserError, match=r"unknown embedded data set .*emoji/train, emoji/val, emoji/val_concepts"):
        embedded_shards(name)


def test_a_cache_that_cannot_be_written_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("not a folder")
    monkeypatch.setenv("DISTTEMPNET_CACHE", str(tmp_path / "file"))
    with pytest.raises(UserError, match=r"file.*DISTTEMPNET_CACHE"):
        embedded_shards("emoji/val")


def test_a_lost_cached_shard_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DISTTEMPNET_CACHE", str(tmp_path))
    (embedded_shards("emoji/val") / "00001.tar").unlink()
    with pytest.raises(UserError, match=r"00001\.tar: cached shard is gone; delete .*val to make it again"):
        embedded_shards("emoji/val")


def _make(barrier: Barrier, answers: multiprocessing.Queue) -> None:
    barrier.wait()
    folder = embedded_shards("emoji/val_concepts")
    answers.put((str(folder), hashlib.sha256((folder / "00000.tar").read_bytes()).hexdigest()))


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_processes_that_race_see_one_whole_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = hashlib.sha256((embedded_shards("emoji/val_concepts") / "00000.tar").read_bytes()).hexdigest()
    monkeypatch.setenv("DISTTEMPNET_CACHE", str(tmp_path))
    context = multiprocessing.get_context("fork")
    barrier, answers = context.Barrier(4), context.Queue()
    processes = [context.Process(target=_make, args=(barrier, answers)) for _ in range(4)]
    for process in processes:
        process.start()
    results = {answers.get(timeout=300) for _ in processes}
    for process in processes:
        process.join(20)
    assert [process.exitcode for process in processes] == [0] * 4
    assert {digest for _, digest in results} == {expected}
    (folder,) = {folder for folder, _ in results}
    assert [path.name for path in Path(folder).parent.iterdir()] == ["val_concepts"]  # no temporary folder is left


def test_the_packer_makes_the_shipped_zip_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tool = Path(__file__).parents[3] / "tools" / "pack_emoji.py"
    spec = importlib.util.spec_from_file_location("pack_emoji", tool)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    source = embedded_shards("emoji/train").parent
    for split in ("val", "val_concepts"):
        embedded_shards(f"emoji/{split}")
    monkeypatch.setattr("sys.argv", ["pack_emoji.py", str(source), str(tmp_path / "emoji.zip")])
    module.main()
    made, shipped = (_entries(folder / "emoji.zip") for folder in (tmp_path, DEMO_FOLDER))
    assert made == shipped


def _entries(path: Path) -> list[tuple[str, object, int, bytes]]:
    """What a zip holds; not its own bytes, which the version of the compressor decides."""
    with zipfile.ZipFile(path) as archive:
        return [
            (entry.filename, entry.date_time, entry.compress_type, archive.read(entry)) for entry in archive.infolist()
        ]
