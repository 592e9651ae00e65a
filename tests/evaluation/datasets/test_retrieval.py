"""Raw CSV and images of retrieval data, and WinoGAViL."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from disttempnet.errors import UserError
from disttempnet.evaluation.datasets.open import load_task
from disttempnet.evaluation.tasks import find_task
from tests.evaluation.colours import COLOURS
from tests.evaluation.formats import picture, write_captioned_csv, write_csv, write_tar

SIX = tuple(COLOURS)


COCO = "retrieval/mscoco_2014_5k_test_image_text_retrieval"


WINO = "misc/winogavil"


def test_raw_captions_without_their_image_are_named(tmp_path: Path) -> None:
    folder = tmp_path / "mscoco_2014_5k_test_image_text_retrieval"
    write_captioned_csv(folder, "test_5k_mscoco_2014.csv", "images", [("red", ["red", "it's red"]), ("blue", ["blue"])])
    next(folder.glob("images/*1.jpg")).unlink()
    data = load_task(find_task(COCO), tmp_path)
    assert data.broken == ("COCO_val2014_000000000001.jpg: no such image",)
    assert [sample.captions for sample in data.samples] == [("red", "it's red")]
    assert data.samples[0].image().size == (12, 10)


@pytest.mark.parametrize("raw", ["red", "[1, 2]", "{}"])
def test_raw_captions_that_are_no_list(raw: str, tmp_path: Path) -> None:
    folder = tmp_path / "mscoco_2014_5k_test_image_text_retrieval"
    folder.mkdir()
    write_csv(folder / "x.csv", [{"filename": "a.jpg", "raw": raw}])
    with pytest.raises(UserError, match="in its CSV is not a list of strings"):
        load_task(find_task(COCO), tmp_path)


def test_captions_as_python_prints_a_list(tmp_path: Path) -> None:
    folder = tmp_path / "mscoco_2014_5k_test_image_text_retrieval"
    (folder / "images").mkdir(parents=True)
    (folder / "images" / "a.jpg").write_bytes(picture("red", "jpg"))
    write_csv(folder / "x.csv", [{"filename": "a.jpg", "raw": "['one', \"it's two\"]"}])
    assert load_task(find_task(COCO), tmp_path).samples[0].captions == ("one", "it's two")


def test_raw_images_lie_as_deep_as_they_were_unzipped(tmp_path: Path) -> None:
    folder = tmp_path / "mscoco_2014_5k_test_image_text_retrieval"
    write_captioned_csv(folder / "in", "x.csv", "images", [("red", ["red"]), ("blue", ["blue"])])
    (folder / "in" / "x.csv").rename(folder / "x.csv")
    (folder / "__MACOSX" / "images").mkdir(parents=True)
    (folder / "__MACOSX" / "images" / "._COCO_val2014_000000000000.jpg").write_bytes(b"resource fork")
    data = load_task(find_task(COCO), tmp_path)
    assert data.broken == ()
    assert [sample.image().size for sample in data.samples] == [(12, 10)] * 2


def test_a_csv_that_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "winogavil").mkdir()
    (tmp_path / "winogavil" / "x.csv").write_bytes(b"cue,\xff\n")
    with pytest.raises(UserError, match=r"x\.csv: cannot be read: "):
        load_task(find_task(WINO), tmp_path)


def test_a_row_that_is_cut_off(tmp_path: Path) -> None:
    folder = tmp_path / "mscoco_2014_5k_test_image_text_retrieval"
    folder.mkdir()
    (folder / "x.csv").write_text("filename,raw\na.jpg\n")
    with pytest.raises(UserError, match="in its CSV is not a list of strings"):
        load_task(find_task(COCO), tmp_path)


def test_winogavil_as_tars(tmp_path: Path) -> None:
    """Images are indexed by name, each once however many puzzles show it; a puzzle without its image is named."""
    test = tmp_path / "wds_winogavil_test" / "test"
    test.mkdir(parents=True)
    write_tar(test / "0.tar", [{"jpg": picture(colour, "jpg")} for colour in SIX])
    (test / "nshards.txt").write_text("1")
    names = [f"s{i:07d}" for i in range(6)]
    puzzles = [
        {"cue": "red", "candidates": names[:5], "associations": [names[0], names[3]]},
        {"cue": "blue", "candidates": [names[2], names[0], names[1], names[3], names[4]], "associations": [names[2]]},
        {"cue": "pink", "candidates": ["nothing", *names[:4]], "associations": [names[0]]},
        {"cue": "pink", "candidates": names[:5], "associations": []},
        {"cue": "pink", "candidates": names[:5], "associations": [names[5]]},
    ]
    (tmp_path / "wds_winogavil_test" / "puzzles.jsonl").write_text("\n".join(map(json.dumps, puzzles)))
    data = load_task(find_task(WINO), tmp_path)
    assert [sample.key for sample in data.samples] == [f"0.tar/{name}" for name in names[:5]]
    assert data.puzzles[1].candidates == (2, 0, 1, 3, 4)
    assert data.puzzles[0].right == (True, False, False, True, False)
    assert data.broken == (
        "puzzle 3: no image 'nothing'",
        "puzzle 4: no associations",
        "puzzle 5: no associations",
    )
    (tmp_path / "wds_winogavil_test" / "puzzles.jsonl").write_text('{"cue": "red"}')
    with pytest.raises(UserError, match=r"puzzles\.jsonl: cannot be read"):
        load_task(find_task(WINO), tmp_path)
