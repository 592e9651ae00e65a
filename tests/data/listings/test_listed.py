"""Rows of one image are one sample, in training as in evaluation; `read_listing` gives them without an index."""

import json
import pickle
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from disttempnet.cli.main import main
from disttempnet.config import SourceConfig
from disttempnet.data import open_index, open_source
from disttempnet.data.listings import index as index_module
from disttempnet.data.listings.index import ROW_REASONS
from disttempnet.data.listings.listed import read_listing
from disttempnet.data.listings.open import Listing
from disttempnet.errors import UserError
from disttempnet.io.columns import ColumnWriter
from tests.data.conftest import png


def rows_of(images: int, each: int) -> list[dict[str, Any]]:
    return [
        {"image": f"{n}.png", "caption": f"caption {k} of {n}", "label": f"class {n % 2}", "split": "test", "number": k}
        for n in range(images)
        for k in range(each)
    ]


def write(folder: Path, rows: list[dict[str, Any]]) -> Path:
    for name in {row["image"] for row in rows if row.get("image")}:
        (folder / name).write_bytes(png(int(name[:-4])))
    path = folder / "captions.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def opened(path: Path, **settings: Any) -> Listing:
    source = open_source((SourceConfig(path=str(path), **settings),), progress=False)
    assert isinstance(source, Listing)
    return source


def captions_of(n: int, each: int) -> tuple[str, ...]:
    return tuple(f"caption {k} of {n}" for k in range(each))


def test_rows_of_one_image_are_one_sample(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path, rows_of(12, 5))
    source = opened(path)
    assert [source.captions(n) for n in range(len(source))] == [captions_of(n, 5) for n in range(12)]
    assert [source.image_bytes(n) for n in range(12)] == [png(n) for n in range(12)]
    assert source.metadata(3) == {"label": "class 1", "split": "test"}, "what its rows agree on"
    assert source.first.tolist() == [0, 12]
    assert pickle.loads(pickle.dumps(source)).captions(11) == captions_of(11, 5)
    note = "60 rows, 12 samples: rows of one image are one sample (join_rows = false: a sample a row)"
    assert source.notes() == [note]
    assert main(["data", "index", str(path)]) == 0
    text = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert "samples 12, of which 12 usable" in text
    assert "60 rows, 12 samples" in text
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []


def test_rows_can_be_samples_as_before(tmp_path: Path) -> None:
    path = write(tmp_path, rows_of(3, 2))
    source = opened(path, join_rows=False)
    assert [source.captions(n) for n in range(6)] == [(f"caption {k} of {n}",) for n in range(3) for k in range(2)]
    assert source.notes() == []
    with pytest.raises(
        UserError, match="was indexed with join_rows = 'False', not 'True': set join_rows = 'False', or delete"
    ):
        opened(path)


def test_an_index_of_before_there_was_joining_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path, rows_of(3, 2))

    class AsBefore(ColumnWriter):
        def add(self, name: str, values: np.ndarray) -> None:
            if name == "about":
                about = json.loads(values.tobytes())
                about["notes"] = {}
                del about["settings"]["join_rows"]
                values = np.frombuffer(json.dumps(about).encode(), np.uint8)
            super().add(name, values)

    monkeypatch.setattr(index_module, "ColumnWriter", AsBefore)
    before = opened(path, join_rows=False)
    monkeypatch.undo()
    for join in (True, False):
        source = opened(path, join_rows=join)
        assert (len(source), source.digest, source.notes()) == (6, before.digest, [])


def test_a_listing_without_repeats_has_the_ids_and_the_digest_that_it_had(tmp_path: Path) -> None:
    path = write(tmp_path, rows_of(5, 1))
    joined = opened(path)
    assert joined.digest == opened(path, join_rows=False, index=str(tmp_path / "other")).digest
    assert (joined.notes(), joined.columns.numbers) == ([], None)


def test_rows_lie_anywhere_and_bad_ones_keep_their_number(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [*rows_of(4, 3), {"image": "1.png", "caption": ""}, {"caption": "no image"}, {"image": "9.png"}]
    random.Random(5).shuffle(rows)
    expected: dict[str, list[str]] = {}
    for row in rows:
        if row.get("image") and row.get("caption"):
            expected.setdefault(row["image"], []).append(row["caption"])
    for same_hash in (False, True):  # of all images: what has a hash in common is compared
        if same_hash:
            monkeypatch.setattr(index_module, "hash", lambda _: 7, raising=False)
        source = opened(write(tmp_path, rows), index=str(tmp_path / f"{same_hash}.index"))
        found = {source.columns.row(n)[0]: list(source.captions(n)) for n in source.usable.tolist()}
        assert found == expected
        bad = {ROW_REASONS[source.status[n]]: source.name(n) for n in range(len(source)) if source.status[n]}
        number = next(place for place, row in enumerate(rows, 1) if "image" not in row)
        assert bad == {
            "empty caption": "captions.jsonl:1.png",
            "no image": f"captions.jsonl:row {number}",
            "no caption": "captions.jsonl:9.png",
        }


def test_shards_for_retrieval_hold_an_image_once(tmp_path: Path) -> None:
    path, out = write(tmp_path, rows_of(6, 5)), tmp_path / "out"
    assert main(["data", "shard", str(path), "--captions", "lines", "--workers", "1", "--out", str(out)]) == 0
    index = open_index(str(out), caption_key="captions", progress=False)
    assert [index.captions(n) for n in range(len(index))] == [captions_of(n, 5) for n in range(6)]


def test_read_listing(tmp_path: Path) -> None:
    path = write(tmp_path, [*rows_of(4, 2), {"image": "0.png", "caption": " "}])
    before = sorted(tmp_path.iterdir())
    listed = read_listing(path)
    assert sorted(tmp_path.iterdir()) == before, "nothing is written beside the data"
    assert [(image.name, image.path, image.captions, image.fields, image.split) for image in listed.images] == [
        (
            f"captions.jsonl:{n}.png",
            tmp_path / f"{n}.png",
            captions_of(n, 2),
            {"label": f"class {n % 2}", "split": "test"},
            "test",
        )
        for n in range(4)
    ]
    assert [pickle.loads(pickle.dumps(image)).read() for image in listed.images] == [png(n) for n in range(4)]
    assert listed.left_out == (("empty caption", 1, ["captions.jsonl:0.png"]),)
    assert "9 rows, 5 samples" in listed.notes[0]


def test_read_listing_of_parquet(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    table = pyarrow.table({"image": [png(0), png(1)], "caption": [["a", "b"], ["c"]], "label": [3, 4]})
    pytest.importorskip("pyarrow.parquet").write_table(table, tmp_path / "a.parquet")
    listed = read_listing(tmp_path)
    found = [(image.path, image.captions, image.fields["label"], image.read()) for image in listed.images]
    assert found == [(None, ("a", "b"), 3, png(0)), (None, ("c",), 4, png(1))]
