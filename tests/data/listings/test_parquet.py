"""Parquet as other writers make it: the right captions for the right images, or a line that says what it holds."""

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest

from disttempnet.config import SourceConfig
from disttempnet.data import PairDataset, decode, eval_transform, open_source
from disttempnet.data.listings.index import ROW_REASONS
from disttempnet.data.listings.listed import read_listing
from disttempnet.data.listings.open import Listing
from disttempnet.errors import UserError
from tests.data.conftest import png

if importlib.util.find_spec("pyarrow") is None:
    pytest.skip("pyarrow is not installed", allow_module_level=True)

import pyarrow as pa
from pyarrow.parquet import ParquetFile, write_table

COUNT = 6
TEXTS = [f"caption {n}" for n in range(COUNT)]
IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def opened(path: Path, **settings: Any) -> Listing:
    source = open_source((SourceConfig(path=str(path), **settings),), progress=False)
    assert isinstance(source, Listing)
    return source


def write(folder: Path, name: str = "a.parquet", **columns: Any) -> Path:
    folder.mkdir(exist_ok=True)
    write_table(pa.table(columns), folder / name, row_group_size=4)
    return folder


def embedded() -> Any:
    return pa.array([{"bytes": png(n), "path": None} for n in range(COUNT)], IMAGE)


def check(source: Listing, texts: Any = None) -> None:
    assert [source.captions(n) for n in range(COUNT)] == [(text,) for text in TEXTS] if texts is None else texts
    assert [source.image_bytes(n) for n in range(COUNT)] == [png(n) for n in range(COUNT)]
    assert source.problems() == ""


@pytest.mark.parametrize(
    "captions",
    [
        pa.array(TEXTS).dictionary_encode(),
        pa.array(TEXTS).cast(pa.string_view()),
        pa.array(TEXTS).cast(pa.large_string()),
        pa.array([text.encode() for text in TEXTS]),
        pa.array([text.encode() for text in TEXTS]).cast(pa.large_binary()),
    ],
    ids=lambda column: str(column.type)[:20],
)
@pytest.mark.parametrize("image", ["struct", "binary"])
def test_columns_of_text(captions: Any, image: str, tmp_path: Path) -> None:
    images = embedded() if image == "struct" else pa.array([png(n) for n in range(COUNT)])
    check(opened(write(tmp_path / "data", image=images, caption=captions)))


LISTS = [[text, f"{text} again"] for text in TEXTS]


@pytest.mark.parametrize(
    "captions",
    [
        pa.array(LISTS, pa.list_(pa.string(), 2)),
        pa.array(LISTS, pa.large_list(pa.string())),
        pa.array(LISTS, pa.list_(pa.string_view())),
        pa.array([[text.encode() for text in texts] for texts in LISTS]),
        pa.array([[{"raw": text, "sentid": 3} for text in texts] for texts in LISTS]),
        pa.array([[*texts, None] for texts in LISTS]),
    ],
    ids=lambda column: str(column.type)[:40],
)
def test_columns_of_lists(captions: Any, tmp_path: Path) -> None:
    source = opened(
        write(tmp_path / "data", image=embedded(), sentences=captions, objects=pa.array([[{"x": 1}]] * COUNT))
    )
    assert [list(source.captions(n)) for n in range(COUNT)] == LISTS
    assert source.metadata(0) == {}
    assert [source.image_bytes(n) for n in range(COUNT)] == [png(n) for n in range(COUNT)]
    assert source.notes() == (
        ["6 captions are null: left out"] if captions.null_count or "None" in str(captions[0]) else []
    )


@pytest.mark.parametrize("kind", ["struct", "path struct", "string", "string_view"])
def test_files_that_a_column_names(kind: str, tmp_path: Path) -> None:
    """As `embed_external_files=False` and pandas write it; rows of one image are joined as those of other tables."""
    names = [f"{n // 2}.png" for n in range(COUNT)]
    column = {
        "struct": pa.array([{"bytes": None, "path": name} for name in names], IMAGE),
        "path struct": pa.array([{"path": name} for name in names]),
        "string": pa.array(names),
        "string_view": pa.array(names).cast(pa.string_view()),
    }[kind]
    folder = write(tmp_path / "data", image=column, text=pa.array(TEXTS))
    with pytest.raises(UserError, match=r"such as 0\.png, is in .*; name the folder of images"):
        opened(folder)
    (tmp_path / "pictures").mkdir()
    for n in range(COUNT // 2):
        (tmp_path / "pictures" / f"{n}.png").write_bytes(png(n))
    source = opened(folder, images=str(tmp_path / "pictures"))
    assert [source.captions(n) for n in range(len(source))] == [(TEXTS[2 * n], TEXTS[2 * n + 1]) for n in range(3)]
    assert [source.image_bytes(n) for n in range(len(source))] == [png(n) for n in range(3)]
    assert source.notes()[0] == "column 'image' names image files"
    listed = read_listing(folder, images=str(tmp_path / "pictures"))
    assert [image.path for image in listed.images] == [tmp_path / "pictures" / f"{n}.png" for n in range(3)]


def test_images_without_bytes_are_known_from_the_start(tmp_path: Path) -> None:
    """img2dataset's own Parquet has nulls for dead links: one look says which, without reading images."""
    alive = [n not in (1, 2, 5) for n in range(COUNT)]
    images = pa.array([png(n) if alive[n] else None for n in range(COUNT)], pa.binary())
    structs = pa.array([{"bytes": png(n) if alive[n] else None, "path": "x"} for n in range(COUNT)], IMAGE)
    status = pa.array(["success" if ok else "failed_to_download" for ok in alive])
    tables = {
        "img2dataset": {"jpg": images, "key": pa.array(TEXTS), "status": status, "url": pa.array(TEXTS)},
        "binary": {"jpg": images},
        "struct": {"image": structs},
    }
    for name, columns in tables.items():
        source = opened(write(tmp_path / name, **columns, caption=pa.array(TEXTS)))
        assert [ROW_REASONS[code] == "ok" for code in source.status] == alive
        assert source.left_out() == [
            ("no bytes of an image in this row", 3, ["a.parquet:1", "a.parquet:2", "a.parquet:5"])
        ]
        items = [PairDataset(source, lambda data, seed: eval_transform(4)(decode(data)), 1)[0, n] for n in (0, 3, 4)]
        assert [(item.id, item.caption, item.skipped) for item in items] == [(n, TEXTS[n], ()) for n in (0, 3, 4)]


def test_dead_links_are_found_without_reading_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images = pa.array([png(0), None], pa.binary())
    columns = {"key": pa.array(["0", "1"]), "status": pa.array(["success", "failed_to_resize"])}
    write(tmp_path / "data", jpg=images, caption=pa.array(["a", "b"]), **columns)
    read = ParquetFile.read_row_group

    def watched(self: Any, group: int, columns: list[str], **options: Any) -> Any:
        assert "jpg" not in columns
        return read(self, group, columns=columns, **options)

    monkeypatch.setattr(ParquetFile, "read_row_group", watched)
    assert opened(tmp_path / "data").status.tolist() == [0, ROW_REASONS.index("no bytes of an image in this row")]


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        (("url", "caption", "key", "status"), "is img2dataset's table of what it has downloaded: name the folder"),
        (("URL", "TEXT"), "lists addresses, not files: download the images first"),
        (("id", "caption"), r"no columns of images; its columns are id \(string\), caption \(string\); name one of"),
    ],
)
def test_tables_without_images(columns: tuple[str, ...], message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        opened(write(tmp_path / "data", **{name: pa.array(["x"]) for name in columns}))


def test_img2dataset_as_files(tmp_path: Path) -> None:
    """Its default output: folders of files, and beside each a table and counts of what was downloaded."""
    folder = tmp_path / "cc"
    for shard in range(2):
        (folder / f"{shard:05d}").mkdir(parents=True)
        fixed = {"url": "http://h/x", "status": "success"}
        rows = [{**fixed, "caption": f"photo {n}", "key": f"{shard:05d}{n:04d}"} for n in range(4)]
        for n, row in enumerate(rows):
            if n == 2:
                continue  # a dead link
            stem = folder / f"{shard:05d}" / row["key"]
            stem.with_suffix(".jpg").write_bytes(png(10 * shard + n))
            stem.with_suffix(".txt").write_text(row["caption"])
            stem.with_suffix(".json").write_text(json.dumps(row))
        write_table(pa.Table.from_pylist(rows), folder / f"{shard:05d}.parquet")
        (folder / f"{shard:05d}_stats.json").write_text('{"count": 4}')
    source = opened(folder)
    assert [source.captions(n) for n in range(6)] == [(f"photo {n}",) for n in (0, 1, 3)] * 2
    assert [source.image_bytes(n) for n in range(6)] == [png(n) for n in (0, 1, 3, 10, 11, 13)]
    with pytest.raises(UserError, match="is img2dataset's table of what it has downloaded: name the folder of its"):
        opened(folder / "00000.parquet")


@pytest.mark.parametrize("name", ["metadata.jsonl", "metadata.csv", "captions.txt"])
def test_a_folder_of_images_names_the_table_in_it(name: str, tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "0.png").write_bytes(png(0))
    (tmp_path / "images" / name).write_text("image,caption\n0.png,c\n")
    with pytest.raises(UserError, match=f"1: no caption.*it has {name}: name that file if the captions are in it"):
        opened(tmp_path / "images")
