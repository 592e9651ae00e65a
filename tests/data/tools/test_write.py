"""Written shards: what webdataset reads back, the same bytes always, and whole files only, whatever happens."""

import io
import json
import multiprocessing
import signal
import subprocess
import sys
import tarfile
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest
from filelock import FileLock
from PIL import Image

from disttempnet.cli.main import main
from disttempnet.data import open_index
from disttempnet.data.tools.write import WriteSettings, write_shards
from disttempnet.errors import UserError
from disttempnet.io.files import WRITING
from tests.data.conftest import png, sample, write_shard
from tests.full_disk import small_files

Write = Callable[..., Path]
EMOJI = "embedded:emoji/val"  # 1,172 samples


def picture(format: str, size: tuple[int, int] = (60, 40), mode: str = "RGB") -> bytes:
    """Noise, as a file."""
    noise = np.random.default_rng(len(format)).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(noise).convert(mode).save(file, format)
    return file.getvalue()


def content(folder: Path) -> dict[str, bytes]:
    """What shards and list hold; the plan names where the input was."""
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.suffix in (".tar", ".jsonl")}


def members(path: Path) -> dict[str, bytes]:
    with tarfile.open(path) as shard:
        return {info.name: shard.extractfile(info).read() for info in shard}  # type: ignore[union-attr]


def command(source: str, out: Path, *more: str) -> subprocess.Popen[str]:
    code = "import sys; from disttempnet.cli.main import main; sys.exit(main())"
    arguments = ["data", "shard", source, "--out", str(out), "--samples-per-shard", "100", *more]
    return subprocess.Popen([sys.executable, "-c", code, *arguments], stderr=subprocess.PIPE, text=True)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The emoji in shards of 100, written in one go by this process."""
    folder = tmp_path_factory.mktemp("whole")
    written = write_shards(open_index(EMOJI, progress=False), folder, WriteSettings(100), workers=1, progress=False)
    assert (written.shards, written.samples, written.faults) == (12, 1172, [])
    return content(folder)


def test_webdataset_reads_what_the_source_holds(shards: Write, tmp_path: Path) -> None:
    from webdataset.tariterators import group_by_keys, tar_file_expander

    source = open_index(str(shards(4, 3)), progress=False)
    out = tmp_path / "out"
    write_shards(source, out, WriteSettings(samples_per_shard=3), workers=1, progress=False)
    with ExitStack() as files:  # WebDataset itself would leave them open
        streams = [files.enter_context((out / f"0000{n}.tar").open("rb")) for n in range(3)]
        found = list(group_by_keys(tar_file_expander({"url": file.name, "stream": file} for file in streams)))
    assert [entry["__key__"] for entry in found] == [f"{n:09d}" for n in range(7)]
    for number, entry in enumerate(found):
        assert entry["png"] == png(number)
        assert entry["txt"].decode() == f"caption {number}"
        shard = "00000.tar" if number < 4 else "00001.tar"
        expected = {"number": number, "source": f"{shard}:{number:09d}", "width": 9, "height": 7}
        assert json.loads(entry["json"]) == expected
    again = open_index(str(out), progress=False)
    assert [again.image_bytes(n) for n in range(7)] == [source.image_bytes(n) for n in range(7)]


def test_all_captions_as_lines(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = [[f"{n}: {word}" for word in ("one", "two", "three", "four", "five")] for n in range(3)]
    texts[1][3] = "over\ntwo  lines"
    texts[2] = ["alone"]
    for number in range(3):
        (tmp_path / f"{number}.png").write_bytes(png(number))
    listing = tmp_path / "flickr30k_test.json"
    listing.write_text(json.dumps([{"image": f"{n}.png", "caption": captions} for n, captions in enumerate(texts)]))
    arguments = ["data", "shard", str(listing), "--workers", "1", "--out", str(tmp_path / "out")]
    assert main([*arguments, "--captions", "lines"]) == 0
    told = capsys.readouterr().out
    assert 'caption_key="captions"' in told
    assert f"disttempnet evaluate RUN --tasks shards:{tmp_path / 'out'}\n" in told
    found = members(tmp_path / "out" / "00000.tar")
    assert found["000000000.txt"].decode().split("\n") == texts[0]
    assert found["000000001.txt"].decode().split("\n")[3:] == ["over two lines", "1: five"], "a line a caption"
    assert found["000000002.txt"] == b"alone"
    trained = open_index(str(tmp_path / "out"), caption_key="captions", progress=False)
    assert [list(trained.captions(n)) for n in range(3)] == texts
    assert main(arguments) == 2
    assert "its shards were made from captions lines, not first" in capsys.readouterr().err

    root, task = tmp_path / "root", "retrieval/flickr_1k_test_image_text_retrieval"
    there = ["--captions", "lines", "--samples-per-shard", "2", "--out", str(root / "wds_flickr30k_test" / "test")]
    assert main([*arguments[:5], *there]) == 0
    told = capsys.readouterr().out
    assert f"disttempnet evaluate RUN --data-root {root} --tasks {task}\n" in told
    assert f'"{task}" = 3 into {root / "sizes.toml"}' in told
    (root / "sizes.toml").write_text(f'"{task}" = 3\n')
    monkeypatch.setenv("DISTTEMPNET_CACHE", str(tmp_path / "cache"))
    evaluate = ["evaluate", "open_clip:demo-vit-32", "--data-root", str(root), "--out", str(tmp_path / "results")]
    assert main([*evaluate, "--tasks", task]) == 0
    (line,) = map(json.loads, (tmp_path / "results" / "eval_results.jsonl").read_text().splitlines())
    assert (line["samples"], line["complete"], line["error"], line["corrupt"]) == (3, True, "", [])
    assert line["metrics"]["image_retrieval_recall@5"] == 1.0
    assert not any("nshards" in note for note in line["notes"])


def test_workers_and_moment_change_nothing(whole: dict[str, bytes], tmp_path: Path) -> None:
    source = open_index(EMOJI, progress=False)
    write_shards(source, tmp_path / "two", WriteSettings(100), workers=2, progress=False)
    assert content(tmp_path / "two") == whole
    with tarfile.open(tmp_path / "two" / "00003.tar") as shard:
        assert {(info.mtime, info.uid, info.uname, info.gname) for info in shard} == {(0, 0, "", "")}


def test_resize_makes_images_smaller_only(tmp_path: Path) -> None:
    folder = tmp_path / "shards"
    folder.mkdir()
    smooth = io.BytesIO()
    Image.linear_gradient("L").resize((300, 200)).convert("RGB").save(smooth, "PNG")
    files = {
        "wide": ("jpg", picture("JPEG", (300, 200))),
        "tall": ("webp", picture("WEBP", (100, 900))),
        "small": ("jpg", picture("JPEG", (300, 64))),
        "grey": ("png", picture("PNG", (128, 128), "L")),
        "gif": ("png", picture("GIF", (40, 40))),
        "smooth": ("png", smooth.getvalue()),
    }
    write_shard(folder / "0.tar", {key: {kind: data, "txt": b"x"} for key, (kind, data) in files.items()})
    source = open_index(str(folder), progress=False)
    write_shards(source, tmp_path / "out", WriteSettings(resize=64, quality=90), workers=1, progress=False)
    found = members(tmp_path / "out" / "00000.tar")
    names = [f"00000000{n}" for n in range(6)]
    expected = [("jpg", (96, 64)), ("jpg", (64, 576)), ("jpg", (300, 64)), ("jpg", (64, 64)), ("png", (40, 40))]
    for name, (suffix, size) in zip(names, [*expected, ("jpg", (96, 64))], strict=True):
        image = Image.open(io.BytesIO(found[f"{name}.{suffix}"]))
        facts = json.loads(found[f"{name}.json"])
        assert image.size == size == (facts["width"], facts["height"])
    assert found["000000002.jpg"] == files["small"][1], "an image that is small enough is copied"
    assert json.loads(found["000000000.json"])["original_width"] == 300
    assert "original_width" not in json.loads(found["000000002.json"])
    shrunk = np.asarray(Image.open(io.BytesIO(found["000000005.jpg"])).convert("L")).astype(float)
    ideal = np.asarray(Image.linear_gradient("L")).astype(float).mean(1).reshape(64, 4).mean(1)
    assert np.abs(shrunk.mean(1) - ideal).max() < 4, "a ramp stays a ramp"


def test_bad_samples_are_left_out_and_named(shards: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bad = {1: {**sample(1), "png": b"<html>"}, 4: {"txt": b"alone"}, 5: {**sample(5), "png": png(5)[:40]}}
    folder = shards(4, 4, changes=bad)
    out = tmp_path / "out"
    assert main(["data", "shard", str(folder), "--out", str(out), "--samples-per-shard", "3", "--workers", "1"]) == 0
    said = capsys.readouterr().out
    assert "3 shards, 5 samples" in said
    assert "3 samples are left out" in said
    lines = [json.loads(line) for line in (out / "skipped.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [(line["id"], line["name"]) for line in lines] == [
        (1, "00000.tar:000000001"),
        (4, "00001.tar:000000004"),
        (5, "00001.tar:000000005"),
    ]
    assert [line["reason"] for line in lines][:2] == ["cannot identify image", "no image"]
    kept = [[name[:9] for name in members(out / f"0000{n}.tar") if name.endswith("txt")] for n in range(3)]
    assert kept == [["000000000", "000000002"], ["000000003", "000000006"], ["000000007"]]
    assert open_index(str(out), progress=False).usable.tolist() == [0, 1, 2, 3, 4]


def test_a_listing_becomes_shards_with_all_captions(tmp_path: Path) -> None:
    """The layout of CC3M and of retrieval files: a folder of images, and a JSON beside it."""
    (tmp_path / "images").mkdir()
    rows = []
    for number in range(4):
        (tmp_path / "images" / f"{number}.png").write_bytes(png(number))
        captions = [f"caption {number}", f"second {number}", ""]
        rows.append({"image": f"{number}.png", "caption": captions, "image_id": 100 + number})
    (tmp_path / "images" / "2.png").unlink()
    (tmp_path / "clip_train").mkdir()
    listing = tmp_path / "clip_train" / "train.json"
    listing.write_text(json.dumps(rows), encoding="utf-8")
    out = tmp_path / "out"
    arguments = ["data", "shard", str(listing), "--images", str(tmp_path / "images"), "--out", str(out)]
    assert main([*arguments, "--workers", "1"]) == 0
    found = members(out / "00000.tar")
    assert [name for name in found if name.endswith(".txt")] == [f"00000000{n}.txt" for n in (0, 1, 3)]
    facts = json.loads(found["000000003.json"])
    assert facts["image_id"] == 103
    assert facts["captions"] == ["caption 3", "second 3"]
    assert facts["source"] == "train.json:3.png"
    index = open_index(str(out), progress=False, caption_key="captions")
    assert index.captions(2) == ("caption 3", "second 3")
    assert index.image_bytes(2) == png(3)
    skipped = json.loads((out / "skipped.jsonl").read_text(encoding="utf-8"))
    assert skipped["id"] == 2
    assert "No such file" in skipped["reason"]


def test_other_input_or_settings_are_refused(shards: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, out = shards(2, 2), tmp_path / "out"
    arguments = ["data", "shard", str(folder), "--out", str(out), "--workers", "1"]
    assert main(arguments) == 0
    before = content(out)
    assert main(arguments) == 0
    for more, message in [
        (["--samples-per-shard", "3"], "samples per shard 10000, not 3"),
        (["--resize", "5"], "resize 0, not 5"),
        (["--quality", "0"], "--quality: must be a whole number from 1 to 100 (got 0)"),
        (["--workers", "-1"], "--workers: must be a whole number from 0"),
    ]:
        assert main([*arguments, *more]) == 2
        assert message in capsys.readouterr().err
    write_shard(folder / "00001.tar", {"other": sample(9)})
    (folder / "all.index").unlink()
    assert main(arguments) == 2
    assert "made from another input" in capsys.readouterr().err
    assert main([*arguments[:4], str(folder), *arguments[5:]]) == 2
    assert "has other shards, such as 00000.tar" in capsys.readouterr().err
    assert content(out) == before


def test_a_stopped_command_leaves_whole_shards_and_goes_on(tmp_path: Path) -> None:
    source, settings = open_index(EMOJI, progress=False), WriteSettings(100, resize=32, quality=80)
    write_shards(source, tmp_path / "whole", settings, workers=1, progress=False)
    whole, out, kept = content(tmp_path / "whole"), tmp_path / "out", 0
    for number, workers in ((signal.SIGTERM, "2"), (signal.SIGKILL, "1")):
        running = command(EMOJI, out, "--workers", workers, "--resize", "32", "--quality", "80")
        wait_for(out, kept + 2, running)
        running.send_signal(number)
        said = running.communicate(timeout=300)[1]
        if number == signal.SIGTERM:
            assert running.returncode == 128 + number
            assert "of 12 shards are complete" in said
            assert not list(out.glob(f"{WRITING}*")), "workers and what they began are gone"
        early = content(out)
        assert kept + 2 <= len(early) < 12
        assert early.items() <= whole.items()
        kept = len(early)
    write_shards(source, out, settings, workers=1, progress=False)
    assert content(out) == whole
    assert not list(out.glob(f"{WRITING}*"))


def test_a_killed_worker_is_one_line(tmp_path: Path) -> None:
    source, others = open_index(EMOJI, progress=False), set(multiprocessing.active_children())

    def kill() -> None:
        while not list(tmp_path.glob(f"{WRITING}0*.tar-*")):
            time.sleep(0.01)
        for worker in set(multiprocessing.active_children()) - others:  # whichever writes; the other may have ended
            worker.kill()

    killer = threading.Thread(target=kill, daemon=True)
    killer.start()
    with pytest.raises(UserError, match=r"a worker process died while it worked on 0000[01]\.tar: SIGKILL"):
        write_shards(source, tmp_path, WriteSettings(700, resize=32), workers=2, progress=False)
    killer.join()
    assert not list(tmp_path.glob(f"{WRITING}*"))


def test_a_full_disk_is_one_line(whole: dict[str, bytes], tmp_path: Path) -> None:
    source = open_index(EMOJI, progress=False)
    reason = r"00000\.tar: cannot be written: File too large; complete shards stay"
    with small_files(400_000), pytest.raises(UserError, match=reason):  # bytes: less than a shard
        write_shards(source, tmp_path, WriteSettings(100), workers=1, progress=False)
    assert content(tmp_path) == {}
    assert not list(tmp_path.glob(f"{WRITING}*"))
    write_shards(source, tmp_path, WriteSettings(100), workers=1, progress=False)
    assert content(tmp_path) == whole


def test_two_commands_do_not_write_one_folder(shards: Write, tmp_path: Path) -> None:
    source, out = open_index(str(shards(2)), progress=False), tmp_path / "out"
    out.mkdir()
    with FileLock(out / ".lock"), pytest.raises(UserError, match="another command is writing shards here"):
        write_shards(source, out, WriteSettings(), workers=1, progress=False)


def wait_for(folder: Path, shards: int, running: subprocess.Popen[str]) -> None:
    for _ in range(6000):
        if len(list(folder.glob("0*.tar"))) >= shards:
            return
        assert running.poll() is None, running.communicate()[1]
        time.sleep(0.01)
    raise AssertionError("it did not happen within a minute")
