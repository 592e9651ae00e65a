"""`disttempnet data task`: raw data as tars, with the same numbers before and after, whole or not at all."""

from __future__ import annotations

import json
import tarfile
from pathlib import Path
from unittest import mock

import numpy as np
import pytest

from disttempnet.cli.main import main
from disttempnet.evaluation.datasets import convert as converting
from disttempnet.evaluation.datasets.open import find_data, load_task
from disttempnet.evaluation.results.records import TaskRecord
from disttempnet.evaluation.tasks import find_task
from tests.evaluation.dataroot import CAPTIONED, EXPECTED, WINOGAVIL
from tests.evaluation.datasets.folders import write_pickle
from tests.evaluation.formats import CORRUPT, picture, write_captioned_csv, write_csv, write_winogavil_csv
from tests.evaluation.toy import evaluate_into

FLICKR = "retrieval/flickr_1k_test_image_text_retrieval"
COCO = "retrieval/mscoco_2014_5k_test_image_text_retrieval"
WINO = "misc/winogavil"


def raw_coco(folder: Path, rows: list = CAPTIONED) -> Path:
    write_captioned_csv(folder, "test_5k_mscoco_2014.csv", "images_mscoco_2014_5k_test", rows)
    return folder


def score(root: Path, key: str, size: int) -> TaskRecord:
    (root / "sizes.toml").write_text(f'"{key}" = {size}\n')
    (record,) = evaluate_into(root / "out", root, [find_task(key)]).values()
    (root / "out" / "eval_results.jsonl").unlink()
    return record


def convert(key: str, source: Path | str, root: Path, *more: str) -> int:
    return main(["data", "task", key, str(source), "--out", str(root), *more])


def test_captions_and_images_of_a_csv(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The raw folder lies below the root by its own name; afterwards the tars are what is taken."""
    raw = raw_coco(tmp_path / "mscoco_2014_5k_test_image_text_retrieval")
    before = score(tmp_path, COCO, len(CAPTIONED))
    assert convert(COCO, raw, tmp_path, "--samples-per-shard", "4") == 0
    out = capsys.readouterr().out
    folder = tmp_path / "wds_retrieval-mscoco_2014_5k_test_image_text_retrieval_test"
    assert find_data(find_task(COCO), tmp_path) == folder
    assert f"{folder}: 3 tars, 10 images" in out
    assert sorted(path.name for path in tmp_path.iterdir() if path.name.startswith(".")) == []
    assert {path.name for path in folder.rglob("*") if path.is_file()} == {
        "0.tar", "1.tar", "2.tar", "nshards.txt", "dataset_type.txt", "sources.tsv",
    }  # fmt: skip
    assert (folder / "test" / "nshards.txt").read_text() == "3\n"
    assert (folder / "dataset_type.txt").read_text() == "retrieval\n"
    assert (folder / "sources.tsv").read_text().startswith("s0000000\tCOCO_val2014_000000000000.jpg\n")
    after = score(tmp_path, COCO, len(CAPTIONED))
    assert after.metrics == before.metrics == pytest.approx(EXPECTED[COCO] | after.metrics, abs=1e-6)
    assert (after.samples, after.complete, after.notes) == (10, True, before.notes)
    with tarfile.open(folder / "test" / "1.tar") as tar:
        assert [member.name for member in tar][:2] == ["s0000004.jpg", "s0000004.txt"]
        copied = tar.extractfile("s0000004.jpg")
        assert copied is not None
        assert copied.read() == (raw / "images_mscoco_2014_5k_test" / "COCO_val2014_000000000004.jpg").read_bytes()


def test_winogavil(tmp_path: Path) -> None:
    pool = {name: picture(name, "jpg") for _, candidates, _ in WINOGAVIL for name in candidates}
    write_winogavil_csv(tmp_path / "winogavil", WINOGAVIL, pool)
    before = score(tmp_path, WINO, len(WINOGAVIL))
    assert convert(WINO, tmp_path / "winogavil", tmp_path, "--samples-per-shard", "5") == 0
    folder = tmp_path / "wds_misc-winogavil_test"
    assert find_data(find_task(WINO), tmp_path) == folder
    row = json.loads((folder / "puzzles.jsonl").read_text().splitlines()[0])
    assert row == {
        "cue": "Red",
        "candidates": [f"s000000{i}" for i in range(5)],
        "associations": ["s0000000", "s0000003"],
    }
    after = score(tmp_path, WINO, len(WINOGAVIL))
    assert after.metrics == before.metrics == pytest.approx(EXPECTED[WINO], abs=1e-6)
    assert len(list((folder / "test").glob("*.tar"))) == 3, "twelve images, each once"


def test_folders_of_classes(tmp_path: Path) -> None:
    """Names and templates go along; what is called .jpg and is a PNG is called by its content."""
    for name, colours in {"a": ["red", "red"], "b": ["blue"], "c": []}.items():
        (tmp_path / "images" / name).mkdir(parents=True)
        for number, colour in enumerate(colours):
            (tmp_path / "images" / name / f"{number}.jpg").write_bytes(picture(colour))
    (tmp_path / "images" / "classnames.txt").write_text("red\nblue\n\n")
    (tmp_path / "images" / "templates.txt").write_text("{c}\na {c} thing\n")
    root = tmp_path / "root"
    assert convert("vtab/dtd", f"folder:{tmp_path / 'images'}", root) == 0
    data = load_task(find_task("vtab/dtd"), root)
    assert data.heads == ((("red", "blue"), ("{c}", "a {c} thing")),), "c is empty, and the last line is blank"
    assert data.labels == (0, 0, 1)
    assert score(root, "vtab/dtd", 3).metrics["acc1"] == 1.0
    with tarfile.open(root / "wds_vtab-dtd_test" / "test" / "0.tar") as tar:
        assert tar.getnames() == [f"s000000{i}.{suffix}" for i in range(3) for suffix in ("png", "cls")]


def test_cifar_keeps_its_pixels(tmp_path: Path) -> None:
    (tmp_path / "cifar").mkdir()
    rows = np.random.default_rng(0).integers(0, 256, (2, 3, 32, 32), dtype=np.uint8)
    write_pickle(tmp_path / "cifar" / "test_batch", {b"data": rows.reshape(2, -1), b"labels": [1, 0]})
    write_pickle(tmp_path / "cifar" / "batches.meta", {b"label_names": [b"red", b"blue"]})
    assert convert("cifar10", f"folder:{tmp_path / 'cifar'}", tmp_path / "root") == 0
    data = load_task(find_task("cifar10"), tmp_path / "root")
    assert data.labels == (1, 0)
    for sample, row in zip(data.samples, rows, strict=True):
        assert np.array_equal(np.asarray(sample.image()), row.transpose(1, 2, 0))


def test_what_is_corrupt_stays_so_and_what_is_missing_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    raw = raw_coco(tmp_path / "raw", CAPTIONED[:4])
    images = sorted(raw.glob("images*/*"))
    images[1].write_bytes(CORRUPT)
    images[2].unlink()
    assert convert(COCO, raw, tmp_path) == 1
    assert "left out: COCO_val2014_000000000002.jpg: no such image" in capsys.readouterr().out
    record = score(tmp_path, COCO, 4)
    assert record.corrupt == ("0.tar/s0000001: cannot identify image",)
    assert record.error.endswith("2 samples of 4 were seen")


def test_line_breaks_in_captions(tmp_path: Path) -> None:
    """A caption is a line of a file; a break inside is white space, as it is to the tokenizers."""
    raw = raw_coco(tmp_path / "raw", [("red", ["red\n", "a\x0bred thing", " red"])])
    assert convert(COCO, raw, tmp_path) == 0
    assert load_task(find_task(COCO), tmp_path).samples[0].captions == ("red", "a red thing", " red")


@pytest.mark.parametrize(
    ("key", "source", "message"),
    [
        (COCO, "nowhere", "nowhere: no such folder"),
        (COCO, "raw", "an empty caption, which the tars cannot hold"),
        (COCO, "folder:raw", "needs more than the images and classes"),
        (FLICKR, "none", "none: neither test/*.tar nor a CSV"),
        (FLICKR, "bare", "none of it can be used; a.jpg: no such image"),
        ("vtab/dtd", "raw", "has one raw form, images in folders of classes: give folder:raw"),
        ("emoji-concepts", "raw", "has no data below a data root"),
        ("vtab/dtdd", "raw", "Did you mean 'vtab/dtd'"),
        (WINO, "there", "there: holds tars already"),
        (WINO, "raw", "wds_misc-winogavil_test: exists already; delete it"),
    ],
)
def test_mistakes_are_one_line(
    key: str, source: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    raw_coco(tmp_path / "raw", [("red", ["red"]), ("blue", [" "])])
    for folder in ("none", "bare", "there/test", "root"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "there" / "test" / "0.tar").touch()
    write_csv(tmp_path / "bare" / "x.csv", [{"filename": "a.jpg", "raw": '["a"]'}])
    if "already; delete" in message:
        (tmp_path / "root" / "wds_misc-winogavil_test").mkdir()
    there = sorted((tmp_path / "root").rglob("*"))
    assert convert(key, source, tmp_path / "root") == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert sorted((tmp_path / "root").rglob("*")) == there


def test_a_stop_leaves_nothing_and_leftovers_are_written_over(tmp_path: Path) -> None:
    raw = raw_coco(tmp_path / "raw")
    left = tmp_path / ".wds_retrieval-mscoco_2014_5k_test_image_text_retrieval_test.part"
    (left / "test").mkdir(parents=True)
    (left / "test" / "9.tar").write_bytes(b"of a command that was killed")
    with mock.patch.object(converting, "_image_bytes", side_effect=KeyboardInterrupt):
        assert convert(COCO, raw, tmp_path) == 130
    assert find_data(find_task(COCO), tmp_path) is None
    assert not left.exists()
    (left / "test").mkdir(parents=True)
    (left / "test" / "9.tar").write_bytes(b"of a command that was killed")
    assert convert(COCO, raw, tmp_path) == 0
    assert score(tmp_path, COCO, len(CAPTIONED)).complete


def test_what_reads_back_otherwise_is_not_kept(tmp_path: Path) -> None:
    raw = raw_coco(tmp_path / "raw")
    words = converting._one_line
    with (
        mock.patch.object(converting, "_one_line", lambda text, sample: words(text, sample).upper()),
        pytest.raises(RuntimeError, match="the written task differs from its source"),
    ):
        convert(COCO, raw, tmp_path)
    assert find_data(find_task(COCO), tmp_path) is None


def test_an_image_that_goes_away_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    raw = raw_coco(tmp_path / "raw")
    with mock.patch.object(converting, "_read", side_effect=None) as read:
        read.return_value = converting.read_folder(find_task(COCO), raw)
        next(raw.glob("images*/*3.jpg")).unlink()
        assert convert(COCO, raw, tmp_path) == 2
    assert "000000000003.jpg: No such file or directory; nothing is left of" in capsys.readouterr().err
