"""Evaluation of towers whose answers are known by hand, on one process and on two."""

from __future__ import annotations

import os
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch

from disttempnet.errors import UserError
from disttempnet.evaluation import TaskResult, embed_samples, evaluate, evaluator
from disttempnet.evaluation import tasks as readers
from disttempnet.evaluation.tasks import Task, TaskData, find_task, read_samples
from tests.evaluation.toy import COLOURS, METRICS, colour_towers, evaluate_toy, toy_task, write_shard
from tests.gloo import Pools

TRUE = [(colour, colour, colour) for colour in COLOURS]


def run(folder: Path, patch: pytest.MonkeyPatch, batch: int = 4, **fields: object) -> TaskResult:
    patch.setattr(readers, "all_tasks", lambda: {"toy": toy_task(folder, **fields)})
    return evaluate(colour_towers(), ["toy"], device="cpu", batch=batch)["toy"]


def test_true_colours_are_all_right(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_shard(tmp_path / "0.tar", TRUE[:2])
    write_shard(tmp_path / "1.tar", TRUE[2:])
    result = run(tmp_path, monkeypatch)
    assert result.metrics == dict.fromkeys(METRICS, 1.0)
    assert tuple(result.metrics) == METRICS
    assert result.chance["acc1"] == pytest.approx(1 / 6)
    assert result.chance["image_to_text_recall@5"] == pytest.approx(5 / 6)
    assert result.chance["text_to_image_recall@10"] == 1.0
    assert result.class_names == tuple(sorted(COLOURS))
    assert [result.class_names[i] for i in result.labels] == list(COLOURS)
    assert result.keys == ("0.tar/00000", "0.tar/00001", *(f"1.tar/0000{i}" for i in range(4)))
    assert result.captions == tuple(COLOURS)
    torch.testing.assert_close(result.image_features, result.text_features, atol=1e-3, rtol=0)
    assert result.complete
    assert result.samples == 6


def test_wrong_labels_and_captions_by_hand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [
        ("red", "a red square", "red"),
        ("red", "a red square\nsomething green", "red"),  # its second caption is that of the green image, too
        ("green", "something green", "blue"),  # mislabelled: predicted green
        ("blue", "a blue square", "blue"),
    ]
    write_shard(tmp_path / "0.tar", rows)
    result = run(tmp_path, monkeypatch, templates=("{c}", "a {c} thing"))
    assert result.class_names == ("blue", "red")
    # the green image is orthogonal to both classes: the tie goes to the first, blue, which is its label
    assert result.metrics["acc1"] == 1.0
    assert result.metrics["image_to_text_recall@1"] == 1.0
    assert result.metrics["text_to_image_recall@1"] == 1.0
    assert result.trials["image_to_text_recall@1"] == 4
    assert result.trials["text_to_image_recall@1"] == 3  # equal captions are one candidate
    # images own 1, 2, 1, 1 of 3 captions; the captions belong to 2, 2, 1 of 4 images
    assert result.chance["image_to_text_recall@1"] == pytest.approx((1 + 2 + 1 + 1) / (4 * 3))
    assert result.chance["text_to_image_recall@1"] == pytest.approx((2 + 2 + 1) / (3 * 4))


def test_an_image_with_the_caption_of_another_is_wrong(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_shard(tmp_path / "0.tar", [*TRUE[:5], ("red", "grey", "grey")])
    result = run(tmp_path, monkeypatch)
    assert result.metrics["acc1"] == pytest.approx(5 / 6)
    assert result.metrics["mean_per_class_recall"] == pytest.approx(5 / 6)
    assert result.metrics["image_to_text_recall@1"] == pytest.approx(5 / 6)
    # grey is nearer to pink than to the red image captioned so; all others find their own image first
    assert result.metrics["text_to_image_recall@1"] == pytest.approx(5 / 6)


def test_batch_size_and_evaluating_twice_change_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_shard(tmp_path / "0.tar", TRUE)
    results = [run(tmp_path, monkeypatch, batch) for batch in (1, 4, 4, 100)]
    assert all(result.metrics == results[0].metrics for result in results)
    assert torch.equal(results[1].image_features, results[2].image_features)


def test_pixels_beyond_the_cache_are_streamed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_shard(tmp_path / "0.tar", TRUE)
    monkeypatch.setattr(evaluator, "PIXEL_CACHE_BYTES", 0)
    cached = len(evaluator._pixels)
    assert run(tmp_path, monkeypatch).metrics["acc1"] == 1.0
    assert len(evaluator._pixels) == cached


def with_frequencies(folder: Path, trained: dict[str, int], rows: list[tuple[str, str, str]]) -> dict[str, object]:
    """Fields of a task on `rows` whose training shard holds that many samples of each label."""
    (folder / "train").mkdir()
    write_shard(folder / "train" / "0.tar", [(label, label, label) for label, n in trained.items() for _ in range(n)])
    write_shard(folder / "0.tar", rows)
    return {"frequency_from": str(folder / "train"), "metrics": ("acc1", "acc1_head", "acc1_middle", "acc1_tail")}


def test_head_middle_and_tail_by_hand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [
        ("red", "red", "red"),
        ("grey", "red", "red"),  # grey is nearest to pink
        ("green", "green", "green"),
        ("blue", "blue", "blue"),
        ("blue", "pink", "pink"),  # predicted blue
        ("blue", "yellow", "yellow"),  # predicted blue
    ]
    trained = {"pink": 5, "red": 3, "yellow": 1, "blue": 1}
    # images in order of frequency: pink 5 | red 3, red 3 | blue 1 | yellow 1 | green 0. Pink ends at 1 of 6 images,
    # its middle at 0.5: head. Red covers 1 to 3, middle 2: already the middle third. Blue before yellow by name,
    # 3 to 4: middle. Yellow and green: tail.
    result = run(tmp_path, monkeypatch, **with_frequencies(tmp_path, trained, rows))
    assert result.frequency.tolist() == [3, 3, 0, 1, 5, 1]
    expected = {"acc1": 3 / 6, "acc1_head": 0.0, "acc1_middle": 2 / 3, "acc1_tail": 1 / 2}
    assert result.metrics == pytest.approx(expected)
    assert result.trials == {"acc1": 6, "acc1_head": 1, "acc1_middle": 3, "acc1_tail": 2}
    assert result.chance == pytest.approx(dict.fromkeys(expected, 1 / 5))


def test_frequency_follows_the_readable_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [("red", "red", "red"), ("corrupt", "green", "green"), ("green", "green", "green"), ("blue", "blue", "blue")]
    result = run(tmp_path, monkeypatch, **with_frequencies(tmp_path, {"red": 3, "green": 2, "blue": 1}, rows))
    assert result.frequency.tolist() == [3, 2, 1]
    assert result.trials == {"acc1": 3, "acc1_head": 1, "acc1_middle": 1, "acc1_tail": 1}


def test_without_training_data_there_is_no_frequency(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_shard(tmp_path / "0.tar", TRUE)
    assert run(tmp_path, monkeypatch).frequency.tolist() == []


def test_frequencies_that_cannot_be_had_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fields = with_frequencies(tmp_path, {"red": 3}, [TRUE[0], ("corrupt", "green", "green"), TRUE[2]])
    with pytest.raises(UserError, match="none of its readable images is in the tail by training frequency"):
        run(tmp_path, monkeypatch, **fields)
    with pytest.raises(UserError, match=r"task 'toy': sample 0\.tar/00000: no 'group' to count"):
        run(tmp_path, monkeypatch, **fields, frequency_by="group")


def test_corrupt_image_is_counted_and_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_shard(tmp_path / "0.tar", [TRUE[0], ("corrupt", "green", "green"), *TRUE[2:]])
    result = run(tmp_path, monkeypatch)
    assert not result.complete
    assert result.corrupt == ("0.tar/00001",)
    assert result.samples == len(result.image_features) == len(result.labels) == 5
    assert "green" not in result.captions
    assert result.metrics["acc1"] == 1.0


def test_modes_and_random_state_come_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_shard(tmp_path / "0.tar", TRUE)
    monkeypatch.setattr(readers, "all_tasks", lambda: {"toy": toy_task(tmp_path)})
    towers = colour_towers()
    state, calls = torch.get_rng_state(), []
    evaluate(towers, ["toy"], device="cpu", batch=4, progress=lambda *call: calls.append(call))
    assert torch.equal(torch.get_rng_state(), state)
    assert towers.module.training
    assert towers.module.dropout.training
    assert not towers.module.frozen.training
    assert calls == [("texts", 1, 2), ("texts", 2, 2), ("toy", 1, 2), ("toy", 2, 2)]


def test_features_that_are_not_finite_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_shard(tmp_path / "0.tar", TRUE)
    monkeypatch.setattr(readers, "all_tasks", lambda: {"toy": toy_task(tmp_path)})
    towers = colour_towers()
    monkeypatch.setattr(towers.module, "encode_image", lambda pixels, **_: torch.full((len(pixels), 3), torch.nan))
    with pytest.raises(UserError, match="task 'toy': the towers give features that are not finite"):
        evaluate(towers, ["toy"], device="cpu")


def test_embed_samples_drops_the_unreadable(tmp_path: Path) -> None:
    write_shard(tmp_path / "0.tar", [TRUE[0], ("corrupt", "green", "green"), *TRUE[2:]])
    images, texts, kept = embed_samples(colour_towers(), read_samples(str(tmp_path)), device="cpu", batch=2)
    assert [sample.captions[0] for sample in kept] == [name for name in COLOURS if name != "green"]
    torch.testing.assert_close(images, texts, atol=1e-3, rtol=0)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([("red", "", "red")], "sample 00000: no caption"),
        ([("red", "red", "")], "sample 0.tar/00000: no label"),
        ([("corrupt", "red", "red")], "none of its 1 samples can be read; 0.tar/00000: cannot identify image"),
    ],
)
def test_unusable_samples_are_named(tmp_path, monkeypatch, rows, message) -> None:
    write_shard(tmp_path / "0.tar", rows)
    with pytest.raises(UserError, match=message):
        run(tmp_path, monkeypatch)


def test_broken_folders_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"no \.tar shards in this folder"):
        run(tmp_path, monkeypatch)
    write_shard(tmp_path / "0.tar", TRUE)
    (tmp_path / "0.tar").write_bytes((tmp_path / "0.tar").read_bytes()[:700])
    with pytest.raises(UserError, match=r"0\.tar: not a readable tar shard"):
        run(tmp_path, monkeypatch)


def test_two_processes_give_the_same_as_one(tmp_path: Path, gloo: Pools) -> None:
    # 5 batches of 2: the second rank has one fewer, and an unreadable image lies in its part
    rows = [*TRUE, ("red", "grey", "grey"), ("corrupt", "blue", "blue"), ("green", "pink\nred", "pink")]
    write_shard(tmp_path / "0.tar", rows)
    alone = evaluate_toy(tmp_path)
    assert alone["corrupt"] == ("0.tar/00007",)
    for together in gloo(2, evaluate_toy, tmp_path):
        assert together.keys() == alone.keys()
        for key, value in alone.items():
            np.testing.assert_equal(together[key], value, err_msg=key)


def test_another_cache_folder_is_read_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    """What was read of one may be deleted."""
    read: list[str] = []
    data = TaskData(find_task("scenes"), ())

    def load(task: Task, root: Path | None) -> TaskData:
        read.append(os.environ["DISTTEMPNET_CACHE"])
        return data

    monkeypatch.setattr(evaluator, "load_task", load)
    for name in ("/first", "/second", "/second"):
        monkeypatch.setenv("DISTTEMPNET_CACHE", name)
        assert evaluator.load_tasks(["scenes"], None) == [data]
    assert read == ["/first", "/second"]
    evaluator._loaded.cache_clear()


def test_one_process_compares_its_data_with_nobodys(tmp_path: Path) -> None:
    write_shard(tmp_path / "0.tar", [("red", "red", "red"), ("blue", "blue", "blue")])
    with mock.patch("disttempnet.evaluation.evaluator.digest") as asked:
        evaluate_toy(tmp_path)
    asked.assert_not_called()
