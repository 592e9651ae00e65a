"""Where evaluation data is looked for, and what is said of data that is not as it should be."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from disttempnet.errors import UserError
from disttempnet.evaluation import evaluate
from disttempnet.evaluation.datasets.open import MissingData, find_data, folder_names, load_task
from disttempnet.evaluation.evaluator import load_tasks
from disttempnet.evaluation.tasks import all_tasks, choose_tasks, find_task
from tests.evaluation.colours import COLOURS
from tests.evaluation.formats import labelled, npy, picture, write_captioned_csv, write_csv, write_tar, write_wds
from tests.evaluation.toy import meaning_towers

SIX = tuple(COLOURS)
COCO = "retrieval/mscoco_2014_5k_test_image_text_retrieval"
WINO = "misc/winogavil"


def test_rows_are_those_of_datacomp() -> None:
    tasks = [task for task in all_tasks().values() if task.below_root]
    assert len(tasks) == 40
    assert sum(task.size for task in tasks if task.main) == 697_369
    assert [task.name for task in tasks if not task.main] == ["fairness/fairface", "fairness/utkface"]
    assert {tag: len(choose_tasks(tags=[tag])) for tag in ("imagenet", "shifts", "vtab", "retrieval", "fairness")} == {
        "imagenet": 7,
        "shifts": 6,
        "vtab": 13,
        "retrieval": 3,
        "fairness": 4,
    }
    with pytest.raises(UserError, match=r"unknown tag 'imagenets'\. Did you mean 'imagenet'"):
        choose_tasks(tags=["imagenets"])
    assert [task.name for task in choose_tasks(["cifar10", WINO], ["retrieval"])][:2] == ["cifar10", WINO]
    assert len(choose_tasks(["cifar10", WINO], ["retrieval"])) == 4


@pytest.mark.parametrize(
    ("key", "folder"),
    [
        ("vtab/dtd", "wds_vtab-dtd_test"),
        ("wilds/fmow", "wds_wilds-fmow_test"),
        ("imagenet-a", "wds_imagenet-a_test"),
        ("fairness/geode", "wds_geode_test"),
        ("fairness/geode", "wds_fairness-geode_test"),
        (COCO, "wds_mscoco_captions_test"),
        (COCO, "mscoco_2014_5k_test_image_text_retrieval"),
        (WINO, "winogavil"),
        (WINO, "wds_winogavil_test"),
    ],
)
def test_names_of_folders(key: str, folder: str, tmp_path: Path) -> None:
    assert find_data(find_task(key), tmp_path) is None
    test = tmp_path / folder / "test"
    test.mkdir(parents=True)
    (test / ".0.tar").touch()  # a download that is not finished
    assert find_data(find_task(key), tmp_path) is None, "an empty folder is no data"
    write_tar(test / "0.tar", [])
    assert find_data(find_task(key), tmp_path) == tmp_path / folder


@pytest.mark.parametrize(
    ("key", "folder", "raw"),
    [(COCO, "mscoco_2014_5k_test_image_text_retrieval", True), (WINO, "winogavil", True), ("cifar10", "x", False)],
)
def test_a_csv_is_data_of_raw_sets_only(key: str, folder: str, raw: bool, tmp_path: Path) -> None:
    (tmp_path / folder_names(find_task(key))[0] / "test").mkdir(parents=True)  # tried first, and empty
    folder = folder if raw else folder_names(find_task(key))[0]
    (tmp_path / folder).mkdir(exist_ok=True)
    assert find_data(find_task(key), tmp_path) is None
    (tmp_path / folder / "a.csv").touch()
    assert find_data(find_task(key), tmp_path) == (tmp_path / folder if raw else None)


def test_what_is_missing_is_said_before_the_work(tmp_path: Path) -> None:
    assert folder_names(find_task("cifar10")) == ["wds_cifar10_test", "wds_cifar10"]
    with pytest.raises(
        MissingData,
        match=r"none of wds_cifar10_test, wds_cifar10 below .* holds test/\*\.tar; get huggingface\.co",
    ):
        load_tasks(["emoji-concepts", "cifar10"], tmp_path)
    raw = r"test/\*\.tar or a CSV with its images; get .*nlphuji/winogavil: its CSV and its images, unzipped, in "
    with pytest.raises(MissingData, match=rf"{raw}{tmp_path / 'winogavil'}$"):
        load_tasks([WINO], tmp_path)
    (tmp_path / "hf_cache").mkdir()
    with pytest.raises(MissingData, match=rf"{tmp_path / 'winogavil'}; {tmp_path / 'hf_cache'} is not read$"):
        load_tasks([WINO], tmp_path)
    with pytest.raises(UserError, match=r"task 'cifar10' needs its data: set --data-root, or eval\.data_root"):
        load_tasks(["cifar10"], None)
    load_tasks(["emoji-concepts"], None)
    write_wds(tmp_path, "cifar10", labelled([("red", "red")], SIX), templates=["{c}"])
    with pytest.raises(UserError, match=r"classnames\.txt: cannot be read: No such file"):
        load_tasks(["cifar10"], tmp_path)


def faces(root: Path, names: list[str], templates: list[str]) -> None:
    samples = [{"jpg": picture("red", "jpg"), "npy": npy((0, 0, 0, 0))}]
    write_wds(root, "fairness/fairface", samples, classes=names, templates=templates)


@pytest.mark.parametrize(
    ("names", "templates", "message"),
    [
        (["race:a", "b"], ["race:{c}"], "'b' begins with none of race, gender, age, toxic and a colon"),
        (["race:a"], ["race:{c}"], "no class names or no templates that begin with 'gender:'"),
        (["race:a"], ["race:it"], "template 'race:it' has no {c}"),
    ],
)
def test_lines_about_faces(names: list[str], templates: list[str], message: str, tmp_path: Path) -> None:
    faces(tmp_path, names, templates)
    with pytest.raises(UserError, match=message):
        load_task(find_task("fairness/fairface"), tmp_path)


@pytest.mark.parametrize(
    ("metadata", "reason"),
    [
        (None, "no metadata"),
        (np.array([1]), "metadata of 1 columns, 2 needed: region, year"),
        (np.array([-1, 3]), "metadata is not a row of group numbers"),
        (np.array([np.nan, 3]), "metadata is not a row of group numbers"),
        (np.array([2**40, 3]), "metadata is not a row of group numbers"),
        (np.array(["1", "3"]), "its metadata is not a row of numbers but <U1"),
        (b"", "its metadata cannot be read: No data left in file"),
        (b"\x93NUMPY\x01\x00junk", "its metadata cannot be read: "),
    ],
)
def test_metadata_that_cannot_be_used(metadata: np.ndarray | bytes | None, reason: str, tmp_path: Path) -> None:
    samples = labelled([("red", "red", 0, 16), ("green", "green", 5, 17, 99)], SIX)
    if metadata is None:
        del samples[0]["npy"]
    elif isinstance(metadata, bytes):
        samples[0]["npy"] = metadata
    else:
        file = io.BytesIO()
        np.save(file, metadata)
        samples[0]["npy"] = file.getvalue()
    write_wds(tmp_path, "wilds/fmow", samples, classes=SIX, templates=["{c}"])
    data = load_task(find_task("wilds/fmow"), tmp_path)
    assert len(data.broken) == 1, "counted, and the others are measured"
    assert data.broken[0].startswith(f"0.tar/s0000000: {reason}")
    assert data.metadata.tolist() == [[5, 17]], "columns behind those that are asked for are of no concern"


def test_pickled_metadata_is_not_opened(tmp_path: Path) -> None:
    samples = labelled([("red", "red", 0, 16)], SIX)
    file = io.BytesIO()
    np.save(file, np.array([{"region": 1}], dtype=object), allow_pickle=True)
    samples[0]["npy"] = file.getvalue()
    write_wds(tmp_path, "wilds/fmow", samples, classes=SIX, templates=["{c}"])
    assert "allow_pickle" in load_task(find_task("wilds/fmow"), tmp_path).broken[0]


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


def test_a_folder_with_nothing_of_use(tmp_path: Path) -> None:
    (tmp_path / "winogavil").mkdir()
    (tmp_path / "winogavil" / "other.csv").write_text("a,b\n1,2\n")
    with pytest.raises(UserError, match=r"neither test/\*\.tar nor a CSV with columns cue, candidates, associations"):
        load_task(find_task(WINO), tmp_path)


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


def test_transparency_is_dropped_as_other_evaluators_do(tmp_path: Path) -> None:
    """Red under full transparency is red to Pillow's convert, on which open_clip and CLIP_benchmark stand."""
    file = io.BytesIO()
    Image.new("RGBA", (4, 4), (255, 0, 0, 0)).save(file, "PNG")
    write_wds(tmp_path, "vtab/dtd", [{"png": file.getvalue(), "cls": b"0"}], classes=SIX, templates=["{c}"])
    assert load_task(find_task("vtab/dtd"), tmp_path).samples[0].image().getpixel((0, 0)) == (255, 0, 0)


def test_evaluation_in_training_takes_rows_below_a_root(tmp_path: Path) -> None:
    """Their metrics are of the whole task, main one first; captions bring features for temperatures."""
    rows = [("red", "red", 0, 16), ("yellow", "blue", 5, 17), ("blue", "blue", 1, 17)]
    write_wds(tmp_path, "wilds/fmow", labelled(rows, SIX), classes=SIX, templates=["{c}"])
    folder = tmp_path / "mscoco_2014_5k_test_image_text_retrieval"
    write_captioned_csv(folder, "x.csv", "images", [("red", ["red", "it's red"]), ("blue", ["blue"])])
    results = evaluate(meaning_towers(), ["wilds/fmow", COCO], device="cpu", data_root=tmp_path)
    shown = results["wilds/fmow"]
    assert next(iter(shown.metrics)) == "acc_worst_region"
    assert shown.headline == 0.0
    assert shown.metrics["acc_worst_region_no_other"] == 1.0
    assert not any(":" in name for name in shown.metrics)
    assert shown.corrupt == ("3 samples of 22,108 were seen",), "not silently another task"
    assert "image_features" not in vars(shown)
    captioned = vars(results[COCO])
    assert captioned["captions"] == ("red", "blue")
    assert torch.equal(captioned["image_features"] @ captioned["text_features"].T > 0.9, torch.eye(2, dtype=torch.bool))
    assert results[COCO].headline == 1.0
