"""Every layout that is no tar gives dense, stable ids, and names its faults."""

import csv
import errno
import importlib.util
import json
import os
import pickle
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from disttempnet.config import SourceConfig
from disttempnet.data import (
    EpochPlan,
    PairDataset,
    ShardIndex,
    UnreadableImage,
    decode,
    eval_transform,
    open_listing,
    open_source,
)
from disttempnet.data.listings import open as listing_module
from disttempnet.data.listings import parquet as parquet_module
from disttempnet.data.listings.index import ROW_REASONS
from disttempnet.data.listings.open import Listing
from disttempnet.errors import UserError, UserNotice
from tests.data.conftest import png, sample, write_shard
from tests.data.listings.layouts import cc3m, images_and_texts, open_one, refusal, write_images
from tests.gloo import Pools

needs_pyarrow = pytest.mark.skipif(importlib.util.find_spec("pyarrow") is None, reason="pyarrow is not installed")


def as_evaluated(data: bytes, seed: int) -> torch.Tensor:
    """A training transform without augmentation."""
    return eval_transform(4)(decode(data))


def five(number: int) -> list[str]:
    return [f"caption {number}, {word}" for word in ("one", "two", "three", "four", "five")]


def coco(folder: Path, count: int) -> SourceConfig:
    names = [f"val2014/COCO_val2014_{n:012d}.jpg" for n in range(count)]
    write_images(folder / "coco", *names)
    listing = folder / "downstream" / "coco_test.json"
    listing.parent.mkdir()
    listing.write_text(json.dumps([{"image": name, "caption": five(n)} for n, name in enumerate(names)], indent=1))
    return SourceConfig(path=str(listing), images=str(folder / "coco"))


def json_lines(folder: Path, count: int) -> SourceConfig:
    write_images(folder, *(f"{n}.png" for n in range(count)))
    lines = [json.dumps({"file_name": f"{n}.png", "text": f"caption {n}"}) for n in range(count)]
    (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n")
    return SourceConfig(path=str(folder / "metadata.jsonl"))


def table(folder: Path, count: int, delimiter: str, header: Sequence[str]) -> SourceConfig:
    write_images(folder / "images", *(f"{n}.webp" for n in range(count)))
    path = folder / ("train.tsv" if delimiter == "\t" else "train.csv")
    with path.open("w", newline="") as file:
        writer = csv.writer(file, delimiter=delimiter)
        writer.writerow(header)
        writer.writerows([f"images/{n}.webp", f"caption {n}"] for n in range(count))
    return SourceConfig(path=str(path))


def comma(folder: Path, count: int) -> SourceConfig:
    return table(folder, count, ",", ("filepath", "title"))


def tab(folder: Path, count: int) -> SourceConfig:
    return table(folder, count, "\t", ("image", "caption"))


def parquet(folder: Path, count: int) -> SourceConfig:
    """As Hugging Face has it: struct {bytes, path}, two files."""
    return write_parquet(folder / "data", count, lambda n: {"bytes": png(n), "path": None}, lambda n: f"caption {n}")


def parquet_lists(folder: Path, count: int) -> SourceConfig:
    return write_parquet(folder / "data", count, png, five)


def write_parquet(folder: Path, count: int, image: Callable, caption: Callable) -> SourceConfig:
    import pyarrow
    from pyarrow.parquet import write_table

    folder.mkdir()
    for number, ids in enumerate(np.array_split(np.arange(count), 2)):
        columns = {
            "image": [image(int(n)) for n in ids],
            "caption": [caption(int(n)) for n in ids],
            "number": [int(n) for n in ids],
        }
        path = folder / f"train-{number:05d}-of-00002.parquet"
        write_table(pyarrow.Table.from_pydict(columns), path, row_group_size=2)
    return SourceConfig(path=str(folder))


WRITERS = [
    cc3m,
    coco,
    json_lines,
    comma,
    tab,
    images_and_texts,
    pytest.param(parquet, marks=needs_pyarrow),
    pytest.param(parquet_lists, marks=needs_pyarrow),
]


@pytest.mark.parametrize("write", WRITERS)
def test_every_layout_becomes_samples(write: Callable[[Path, int], SourceConfig], tmp_path: Path) -> None:
    config, count = write(tmp_path, 7), 7
    source = open_source((config,), progress=False)
    assert isinstance(source, Listing)
    assert len(source) == count
    assert source.problems() == ""
    assert source.usable.tolist() == list(range(count))
    assert int(source.first[-1]) == count
    assert int(source.usable_counts.sum()) == count
    captions = [source.captions(n) for n in range(count)]
    assert captions in ([(f"caption {n}",) for n in range(count)], [tuple(five(n)) for n in range(count)])
    assert [source.image_bytes(n) for n in range(count)] == [png(n) for n in range(count)]
    assert len({source.name(n) for n in range(count)}) == count

    dataset = PairDataset(source, as_evaluated, seed=1)
    for n in range(count):
        item = dataset[3, n]
        assert (item.id, item.skipped) == (n, ())
        assert item.caption in captions[n]
        assert item.image[:, 0, 0].tolist() == [n, 0, 77]
    plan = EpochPlan(source, global_batch=4, lanes=2, seed=0)
    assert set(np.concatenate([plan.batch(0, step) for step in range(plan.steps)]).tolist()) == set(range(count))

    copy = pickle.loads(pickle.dumps(source))
    assert (copy.digest, copy.captions(6), copy.image_bytes(6)) == (source.digest, captions[6], png(6))
    content = source.path.read_bytes()
    assert load_file(source.path)["status"].tolist() == [0] * count, "the index is a safetensors file"
    assert open_source((config,), progress=False).path.read_bytes() == content, "the second time nothing is written"
    source.path.unlink()
    assert open_source((config,), progress=False).digest == source.digest
    for number in (-1, count):
        with pytest.raises(IndexError):
            source.captions(number)


def test_other_fields_are_kept(tmp_path: Path) -> None:
    assert open_source((cc3m(tmp_path, 2),), progress=False).metadata(1) == {"image_id": "cc3m_1"}
    assert open_source((images_and_texts(tmp_path, 2),), progress=False).metadata(1) == {"number": 1}


@needs_pyarrow
def test_parquet_groups_are_row_groups_and_memory_for_them_is_bounded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = open_source((parquet(tmp_path, 7),), progress=False)
    assert source.first.tolist() == [0, 2, 4, 6, 7]
    assert source.metadata(5) == {"number": 5}
    assert source.name(5) == "train-00001-of-00002.parquet:1"
    monkeypatch.setattr(parquet_module, "CACHE_BYTES", 0)
    monkeypatch.setattr(parquet_module, "OPEN_PARQUET_FILES", 1)
    for n in (0, 6, 1, 5, 0, 3):
        assert source.image_bytes(n) == png(n)
        assert len(source.images._groups) == len(source.images._files) == 1


@needs_pyarrow
@pytest.mark.parametrize("pattern", ["train-*.parquet", "train-0000{0..1}-of-00002.parquet"])
def test_parquet_patterns(pattern: str, tmp_path: Path) -> None:
    config = parquet(tmp_path, 5)
    whole = open_one(config.path)
    assert open_one(f"{config.path}/{pattern}").digest == whole.digest
    part = open_one(f"{config.path}/train-00001-of-00002.parquet")
    assert [part.captions(n) for n in range(len(part))] == [("caption 3",), ("caption 4",)]
    assert "train-00002-of-00002.parquet: no such" in refusal(f"{config.path}/train-0000{{0..2}}-of-00002.parquet")


@needs_pyarrow
def test_parquet_rows_that_cannot_be_used(tmp_path: Path) -> None:
    import pyarrow
    from pyarrow.parquet import write_table

    captions = pyarrow.array([b"fine", b"\xff\xfe", None, b""]).cast(pyarrow.binary()).view(pyarrow.string())
    images = pyarrow.array([png(0), png(1), png(2), png(3)])
    write_table(pyarrow.table({"jpg": images, "caption": captions}), tmp_path / "a.parquet")
    write_table(
        pyarrow.table({"jpg": pyarrow.array([None, b"no image"]), "caption": ["x", "y"]}), tmp_path / "b.parquet"
    )
    source = open_one(tmp_path)
    assert [ROW_REASONS[code] for code in source.status] == [
        "ok",
        "caption is not UTF-8",
        "no caption",
        "empty caption",
        "no bytes of an image in this row",
        "ok",
    ]
    dataset = PairDataset(source, as_evaluated, seed=1)
    for n, reason in ((4, "no bytes of an image in this row"), (5, "cannot identify image")):
        with pytest.raises(UnreadableImage, match=reason):
            dataset[0, n]
    assert [source.name(n) for n in (4, 5)] == ["b.parquet:0", "b.parquet:1"]
    (tmp_path / "parquet.index").unlink()
    assert "'pixels' is not a column of images; its columns are jpg (binary), caption (string)" in refusal(
        tmp_path, image_key="pixels"
    )
    (tmp_path / "c.parquet").write_bytes(b"PAR1 cut off")
    assert "c.parquet: cannot be read as parquet" in refusal(tmp_path)


def test_parquet_without_pyarrow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    assert "Parquet needs pyarrow: pip install 'disttempnet[parquet]'" in refusal(tmp_path / "a.parquet")


@pytest.mark.parametrize("write", WRITERS)
def test_workers_of_another_process_read_the_same(write: Callable[[Path, int], SourceConfig], tmp_path: Path) -> None:
    dataset = PairDataset(open_source((write(tmp_path, 4),), progress=False), as_evaluated, seed=1)
    alone = [dataset[0, n] for n in range(4)]
    order = [[(0, n)] for n in range(4)]
    loader = torch.utils.data.DataLoader(dataset, batch_sampler=order, num_workers=1, collate_fn=_first)
    for one, other in zip(alone, loader, strict=True):
        assert torch.equal(one.image, other.image)
        assert one[1:] == other[1:]


def _first(items: list) -> Any:
    return items[0]


def test_where_images_are_looked_for(tmp_path: Path) -> None:
    config = cc3m(tmp_path, 2)
    message = refusal(config.path)
    assert f"is in {tmp_path / 'clip_train'} nor in {tmp_path}; they are in {tmp_path / 'cc3m'}; name" in message
    assert f"is in {tmp_path / 'clip_train'}; name" in refusal(config.path, images=str(tmp_path / "clip_train"))
    (tmp_path / "cc3m" / "cc3m_train").rename(tmp_path / "cc3m_train")
    assert open_one(config.path).image_bytes(1) == png(1), "in the folder above the listing's"
    (tmp_path / "cc3m_train").rename(tmp_path / "clip_train" / "cc3m_train")
    assert open_one(config.path).image_bytes(1) == png(1), "beside the listing"


def test_paths_may_be_absolute_but_not_leave_by_dots(tmp_path: Path) -> None:
    write_images(tmp_path, "out/0.png", "in/1.png")
    names = [str(tmp_path / "out" / "0.png"), "1.png", "../out/0.png", "x/../../out/0.png", "x/../1.png", "a\0b", ""]
    items = [{"image": name, "caption": "c"} for name in names]
    (tmp_path / "in" / "list.json").write_text(json.dumps(items))
    source = open_one(tmp_path / "in" / "list.json")
    reasons = [ROW_REASONS[code] for code in source.status]
    assert reasons == ["ok"] * 2 + ["image leaves the folder of images by '..'"] * 2 + [
        "ok",
        "image is not a path",
        "no image",
    ]
    assert source.image_bytes(0) == png(0)
    assert "2 samples left out, image leaves the folder of images by '..': list.json:../out/0.png" in source.problems()
    assert "no image: list.json:row 7" in source.problems()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "a.json",
            b'[{"image": "0.png", "caption": "c"},\n {"image": }]',
            r"a.json: not valid JSON: line 2, column 12:",
        ),
        ("a.json", b'[{"image": "0.png", "caption": "c"} {"image"', r"line 1, column 37: ',' or '\]' expected"),
        ("a.json", b'[{"image": "0.png", "caption": "c"},\n', "line 2, column 1: the file ends inside the list"),
        ("a.json", b'[{"image": "0.png", "caption": "c"}] x', "line 1, column 38: the list has ended before"),
        ("a.json", b'[{"image": "0.png", "capt', "line 1, column 21: Unterminated string"),
        ("a.json", b"[" * 200_000, "nested too deeply"),
        ("a.json", b"[]", "none of its rows can be used: they have no named fields"),
        ("a.json", b"", "none of its rows can be used"),
        ("a.json", b"\xff\xfe[\x00", "line 1, column 2: the file ends inside the list"),
        ("a.json", b'{"images": [], "annotations": []}', "none of its rows can be used: it has none"),
        (
            "a.json",
            b'[{"image": "0.png", "alt": "c", "id": 3}]',
            r"no row has captions \(any of caption, .*; its keys are image, alt, id; .* --caption-key alt ",
        ),
        ("a.json", b'[{"image": "0.png", "caption": 3}]', r"none of its rows can be used \(1: caption is not text\)"),
        ("a.jsonl", b'{"image": "0.png", "caption": "c"}\n{"image": "0', "line 2, column 11: Unterminated string"),
        (
            "a.csv",
            b"photo;de\n0.png;c\n",
            r"images \(any of image, filepath.*; its keys are photo, de; .*--image-key photo --caption-key de ",
        ),
        ("a.csv", b"0.png\n1.png\n", r"a.csv: line 1: no comma, tab, ';' or '\|' separates image and caption: '0.png'"),
        ("a.csv", b'filepath,title\n0.png;"c\n', "'0.png;\"c' begins a row of 1 cells, not 2"),
        ("a.csv", bytes(40) + b"filepath,title\n0.png,c\n", "is not text: 63% of its first bytes are zero"),
        ("a.csv", b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "is a Git LFS pointer"),
        ("a.txt", b"0.png,1,2\n1.png,2,3\n", "line 1 is not a header, and the caption may be in any of 3 columns"),
        ("a.csv", b"filepath,title\n0.png,\xe4\n", r"\(1: caption is not UTF-8\)"),
        ("a.csv", b"filepath,title\n0.png\n", "they have no named fields"),
        ("a.tsv", b"a typical bus station\thttp://lh6.example/x.jpg\n" * 2, "download the images first"),
        ("a.tsv", b"url\tcaption\nhttps://a.example/x.jpg\tc\n", "lists addresses, not files"),
        ("a.csv", b"image,caption\nhttps://a.example/x.jpg,c\n", "lists addresses, not files"),
        ("nowhere.json", None, "nowhere.json: no such listing"),
    ],
)
def test_what_is_wrong_with_a_listing_is_one_line(
    name: str, content: bytes | None, message: str, tmp_path: Path
) -> None:
    write_images(tmp_path, "0.png")
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        open_one(tmp_path / name)
    assert "\n" not in str(caught.value)
    assert str(tmp_path / name) in str(caught.value)
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted({"0.png", *([name] if content is not None else [])})


def test_missing_and_broken_images_are_skipped_by_name(tmp_path: Path) -> None:
    config = cc3m(tmp_path, 5)
    source = open_source((config,), progress=False)
    images = tmp_path / "cc3m" / "cc3m_train"
    (images / "000000001.jpg").unlink()
    (images / "000000002.jpg").write_bytes(b"<html>")
    (images / "000000003.jpg").unlink()
    (images / "000000003.jpg").mkdir()
    dataset = PairDataset(source, as_evaluated, seed=1)
    for n, reason in ((1, "No such file or directory"), (2, "cannot identify image"), (3, "Is a directory")):
        with pytest.raises(UnreadableImage, match=rf"^{reason}"):
            dataset[0, n]
        assert source.name(n) == f"cc3m_train.json:cc3m_train/{n:09d}.jpg"


def test_images_are_looked_for_all_over_a_listing(tmp_path: Path) -> None:
    """The first 150 of 400 are lost: that is told, and no reason to refuse a folder that is right."""
    config = cc3m(tmp_path, 400)
    images = tmp_path / "cc3m" / "cc3m_train"
    for n in range(150):
        (images / f"{n:09d}.jpg").unlink()
    with pytest.warns(UserNotice, match=r"cc3m_train\.json: 38 of 100 probed images are not in \S+/cc3m;"):
        assert len(open_source((config,), progress=False)) == 400
    for n in range(150, 400):
        (images / f"{n:09d}.jpg").unlink()
    with pytest.raises(UserError, match=r"none of 100 of its images, such as cc3m_train/0{9}\.jpg, is in \S+/cc3m;"):
        open_source((config,), progress=False)


@pytest.mark.parametrize("code", [errno.EACCES, errno.EIO, errno.ESTALE, errno.EMFILE])
def test_an_image_that_is_there_and_cannot_be_read_ends_the_run(
    code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = cc3m(tmp_path, 2)
    source = open_source((config,), progress=False)

    def refuse(path: str, most: int) -> None:
        raise OSError(code, os.strerror(code), path)

    monkeypatch.setattr(listing_module, "read_regular", refuse)
    with pytest.raises(UserError) as caught:
        PairDataset(source, as_evaluated, seed=1)[0, 1]
    path = tmp_path / "cc3m" / "cc3m_train" / "000000001.jpg"
    why = "too many open files: this process may open " if code == errno.EMFILE else os.strerror(code)
    assert str(caught.value).startswith(f"{path}: cannot be read: {why}")
    assert ("ulimit -n" in str(caught.value)) == (code == errno.EMFILE)


@pytest.mark.parametrize("where", [".", "..", "01/.."])
def test_a_folder_without_a_name_of_its_own(where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = images_and_texts(tmp_path, 3)
    named = open_source((config,), progress=False)
    monkeypatch.chdir(Path(config.path) / ("01" if where == ".." else ""))
    source = open_one(where)
    assert source.path == named.path == tmp_path / "pairs.index"
    assert [source.name(n) for n in range(3)] == [named.name(n) for n in range(3)]


@needs_pyarrow
def test_changed_parquet_files_are_refused(tmp_path: Path) -> None:
    config = parquet(tmp_path, 4)
    open_one(config.path)
    first, second = sorted(Path(config.path).glob("*.parquet"))
    extra = first.with_name("train-00002.parquet")
    extra.write_bytes(first.read_bytes())
    assert f"{extra}: is new since the index was built; remove it, or delete" in refusal(config.path)
    extra.unlink()
    content = second.read_bytes()
    second.unlink()
    assert f"{second}: cannot be read any more (No such file or directory); restore it" in refusal(config.path)
    second.write_bytes(first.read_bytes())
    assert f"{second}: has changed since" in refusal(config.path)
    second.write_bytes(content)
    assert open_one(config.path).captions(3) == ("caption 3",)


@needs_pyarrow
def test_a_parquet_file_that_goes_away_ends_the_run(tmp_path: Path) -> None:
    config = parquet(tmp_path, 4)
    source = open_one(config.path)
    for path in Path(config.path).glob("*.parquet"):
        path.unlink()
    with pytest.raises(UserError, match=r"train-00000-of-00002\.parquet: is gone; restore it"):
        PairDataset(source, as_evaluated, seed=1)[0, 0]


def test_settings_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    shards = tmp_path / "shards"
    shards.mkdir()
    write_shard(shards / "0.tar", {"a": sample(1)})
    write_images(shards, "0.png")
    assert isinstance(open_source((SourceConfig(path=str(shards)),), progress=False), ShardIndex), "tars come first"
    assert "images is for JSON, CSV and Parquet; remove it" in refusal(shards, images="x")
    folder = images_and_texts(tmp_path, 2).path
    assert "has its images inside; remove images = 'x'" in refusal(folder, images="x")
    assert "a folder of images has no image_key" in refusal(folder, image_key="x")
    with pytest.raises(UserError, match="nowhere: no such folder of images"):
        open_listing(SourceConfig(path=str(tmp_path / "nowhere")), progress=False)


def open_on_a_rank(path: str, images: str) -> str:
    try:
        return open_source((SourceConfig(path=path, images=images),), progress=False).digest
    except UserError as error:
        return str(error)


def test_ranks_agree(tmp_path: Path, gloo: Pools) -> None:
    config = cc3m(tmp_path, 5)
    answers = gloo(2, open_on_a_rank, config.path, config.images)
    assert set(answers) == {open_source((config,), progress=False).digest}
    Path(config.path + ".index").unlink()
    Path(config.path).write_text("[{]")
    answers = gloo(2, open_on_a_rank, config.path, config.images)
    assert "not valid JSON: line 1, column 3" in answers[0]
    assert answers[1] == f"rank 0: {answers[0]}"
