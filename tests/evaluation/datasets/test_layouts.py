"""Where evaluation data is looked for, and what is said of data that is not as it should be."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
import torch
from PIL import Image

from disttempnet.errors import UserError
from disttempnet.evaluation import evaluate
from disttempnet.evaluation.datasets.open import find_data, folder_names, load_task
from disttempnet.evaluation.evaluator import load_tasks
from disttempnet.evaluation.tasks import find_task
from tests.evaluation.colours import COLOURS
from tests.evaluation.formats import labelled, write_captioned_csv, write_tar, write_wds
from tests.evaluation.toy import meaning_towers

SIX = tuple(COLOURS)


COCO = "retrieval/mscoco_2014_5k_test_image_text_retrieval"


WINO = "misc/winogavil"


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
        UserError,
        match=r"none of wds_cifar10_test, wds_cifar10 below .* holds test/\*\.tar; get huggingface\.co",
    ):
        load_tasks(["emoji-concepts", "cifar10"], tmp_path)
    raw = r"test/\*\.tar or a CSV with its images; get .*nlphuji/winogavil: its CSV and its images, unzipped, in "
    with pytest.raises(UserError, match=rf"{raw}{tmp_path / 'winogavil'}$"):
        load_tasks([WINO], tmp_path)
    (tmp_path / "hf_cache").mkdir()
    with pytest.raises(UserError, match=rf"{tmp_path / 'winogavil'}; {tmp_path / 'hf_cache'} is not read$"):
        load_tasks([WINO], tmp_path)
    with pytest.raises(UserError, match=r"task 'cifar10' needs its data: set --data-root, or eval\.data_root"):
        load_tasks(["cifar10"], None)
    load_tasks(["emoji-concepts"], None)
    write_wds(tmp_path, "cifar10", labelled([("red", "red")], SIX), templates=["{c}"])
    with pytest.raises(UserError, match=r"classnames\.txt: cannot be read: No such file"):
        load_tasks(["cifar10"], tmp_path)


def test_a_folder_with_nothing_of_use(tmp_path: Path) -> None:
    (tmp_path / "winogavil").mkdir()
    (tmp_path / "winogavil" / "other.csv").write_text("a,b\n1,2\n")
    with pytest.raises(UserError, match=r"neither test/\*\.tar nor a CSV with columns cue, candidates, associations"):
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
