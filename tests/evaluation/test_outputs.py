"""Results in a folder: what is missing, broken or wrong in tasks, and going on after a stop."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import tarfile
from pathlib import Path
from unittest import mock

import pytest
import torch

from disttempnet.errors import Preempted, UserError, UserNotice
from disttempnet.evaluation.encoder import FeatureEncoder
from disttempnet.evaluation.loader import Decoder, DecodeRequest, ImageBatch
from disttempnet.evaluation.results.records import RESULTS_FILE, TaskRecord, read_records
from disttempnet.evaluation.tasks import find_task
from tests.evaluation.colours import COLOURS
from tests.evaluation.formats import (
    CORRUPT,
    labelled,
    picture,
    write_captioned_csv,
    write_captioned_wds,
    write_tar,
    write_wds,
)
from tests.evaluation.toy import evaluate_into
from tests.gloo import Pools

SIX = tuple(COLOURS)


ROWS = [(colour, colour) for colour in SIX]


DTD, FLOWERS, CLEVR = "vtab/dtd", "vtab/flowers", "vtab/clevr_closest_object_distance"


THREE = (DTD, FLOWERS, "sun397")


FLICKR = "retrieval/flickr_1k_test_image_text_retrieval"


def write(root: Path, key: str, rows: list = ROWS, classes: tuple[str, ...] = SIX, shards: int = 1) -> Path:
    return write_wds(root, key, labelled(rows, classes), classes=classes, templates=["a {c} thing"], shards=shards)


def sizes(root: Path, **of_task: int) -> None:
    (root / "sizes.toml").write_text("".join(f'"vtab/{key}" = {size}\n' for key, size in of_task.items()))


def run(root: Path, *keys: str, **how: object) -> dict[str, TaskRecord]:
    return evaluate_into(root / "out", root, [find_task(key) for key in keys], **how)


def test_another_number_of_samples_than_the_task_has(tmp_path: Path) -> None:
    write(tmp_path, DTD)
    record = run(tmp_path, DTD)[DTD]
    assert (record.samples, record.expected, record.complete) == (6, 1880, False)
    assert record.error == "6 samples of 1,880 were seen"
    assert record.metrics["acc1"] == 1.0
    assert not record.counts
    line = json.loads((tmp_path / "out" / RESULTS_FILE).read_text())
    assert line["metrics"]["main_metric"] is None, "other programs average what stands there"


def test_a_part_that_says_so_is_whole_and_noted(tmp_path: Path) -> None:
    write(tmp_path, DTD)
    sizes(tmp_path, dtd=6)
    record = run(tmp_path, DTD)[DTD]
    assert (record.expected, record.complete, record.error) == (6, True, "")
    assert "sizes.toml: 6 samples, the task has 1,880" in record.notes
    assert "6 class names, the task has 47" in record.notes
    assert "1 templates, the published data has 8" in record.notes


@pytest.mark.parametrize(
    ("text", "message"), [("x", "cannot be read"), ('"vtab/dtd" = "6"', "'vtab/dtd' is not a number")]
)
def test_sizes_that_are_none(text: str, message: str, tmp_path: Path) -> None:
    write(tmp_path, DTD)
    (tmp_path / "sizes.toml").write_text(text)
    with pytest.raises(UserError, match=message):
        run(tmp_path, DTD)


def test_a_part_is_not_finished_where_the_whole_is_there(tmp_path: Path) -> None:
    """The same folder of results, first on a root that says it holds a part, then on a larger one."""
    folder = write(tmp_path, DTD, ROWS[:3])
    sizes(tmp_path, dtd=3)
    assert run(tmp_path, DTD)[DTD].samples == 3
    shutil.rmtree(folder)
    write(tmp_path, DTD, ROWS)
    sizes(tmp_path, dtd=6)
    record = run(tmp_path, DTD)[DTD]
    assert (record.samples, record.expected, record.counts) == (6, 6, True)


def test_missing_tasks_are_passed_over(tmp_path: Path) -> None:
    write(tmp_path, DTD)
    assert list(run(tmp_path, FLOWERS, DTD, FLICKR)) == [DTD]


def test_corrupt_images_are_counted_and_named(tmp_path: Path) -> None:
    samples = labelled(ROWS, SIX)
    samples[2] = {"jpg": CORRUPT, "cls": b"2"}
    samples[3] = {"jpg": picture("yellow", "jpg")[:-200], "cls": b"3"}
    write_wds(tmp_path, DTD, samples, classes=SIX, templates=["{c}"], shards=2)
    sizes(tmp_path, dtd=6)
    record = run(tmp_path, DTD)[DTD]
    assert (record.samples, record.complete) == (4, False)
    assert [name.split(":")[0] for name in record.corrupt] == ["0.tar/s0000002", "1.tar/s0000003"]
    assert record.error.startswith("2 unreadable: 0.tar/s0000002: cannot identify image; 1.tar/s0000003: cannot decode")
    assert record.error.endswith("4 samples of 6 were seen")
    assert record.metrics["acc1"] == 1.0, "of those that could be read"


def test_samples_without_label_image_or_number(tmp_path: Path) -> None:
    samples = labelled(ROWS, SIX)
    del samples[0]["cls"]
    samples[1] = {"cls": b"1"}
    samples[2]["cls"] = b"two"
    write_wds(tmp_path, DTD, samples, classes=SIX, templates=["{c}"])
    record = run(tmp_path, DTD)[DTD]
    assert record.corrupt == (
        "0.tar/s0000000: no label",
        "0.tar/s0000001: no image",
        "0.tar/s0000002: its label is 'two', not a number",
    )
    assert record.samples == 3


@pytest.mark.parametrize(
    ("text", "note"),
    [
        (None, "nshards.txt is missing; all 2 tars are read"),
        ("1", "nshards.txt says 1; all 2 tars that are there are read"),
        ("3", "nshards.txt says 3; all 2 tars that are there are read"),
        ("", "nshards.txt says nothing; all 2 tars that are there are read"),
        (b"\xff2", "nshards.txt says \ufffd2; all 2 tars that are there are read"),
    ],
)
def test_nshards_missing_or_wrong(text: str | bytes | None, note: str, tmp_path: Path) -> None:
    file = write(tmp_path, DTD, shards=2) / "test" / "nshards.txt"
    (file.parent / "._0.tar").write_bytes(b"what other systems leave on a shared disk")
    if text is None:
        file.unlink()
    else:
        file.write_bytes(text if isinstance(text, bytes) else text.encode())
    sizes(tmp_path, dtd=6)
    record = run(tmp_path, DTD)[DTD]
    assert record.notes[0] == note
    assert record.samples == 6


def test_ten_shards_without_zeros_in_front_come_in_their_order(tmp_path: Path) -> None:
    write(tmp_path, DTD, ROWS * 2, shards=12)
    from disttempnet.evaluation.datasets.open import load_task

    keys = [sample.key for sample in load_task(find_task(DTD), tmp_path).samples]
    assert keys == [f"{i}.tar/s{i:07d}" for i in range(12)]


def test_a_tar_that_is_cut_off_gives_what_it_has(tmp_path: Path) -> None:
    tar = write(tmp_path, DTD) / "test" / "0.tar"
    with tarfile.open(tar) as opened:
        last = opened.getmembers()[-2]
    tar.write_bytes(tar.read_bytes()[: last.offset_data + 10])
    record = run(tmp_path, DTD)[DTD]
    assert record.samples == 5
    assert record.corrupt[0].startswith(f"0.tar: cut off at byte {last.offset_data + 10:,}")
    assert not record.complete


def test_the_blank_class_of_clevr(tmp_path: Path) -> None:
    """Six names, the fourth blank, is what the data has; an older reader drops it, and names and labels part."""
    names = ("red", "green", "blue", "", "yellow", "pink")
    rows = [(name or "grey", label) for label, name in enumerate(names)]
    write(tmp_path, CLEVR, rows, names)
    (tmp_path / "sizes.toml").write_text(f'"{CLEVR}" = 6\n')
    assert run(tmp_path, CLEVR)[CLEVR].metrics["acc1"] == 1.0
    (tmp_path / "out" / RESULTS_FILE).unlink()
    record = run(tmp_path, CLEVR, compat="datacomp-1.4")[CLEVR]
    # five names: red, green, blue are as they were, yellow and pink have moved to labels 3 and 4; 5 is no class
    assert record.metrics["acc1"] == 3 / 6
    assert record.notes[0] == "5 class names, the task has 6"
    assert record.samples == 6


def test_one_that_fails_ends_nothing(tmp_path: Path) -> None:
    write(tmp_path, DTD, [*ROWS, ("red", 6)])
    write(tmp_path, FLOWERS)
    write(tmp_path, "cifar10")
    (tmp_path / "wds_cifar10_test" / "classnames.txt").unlink()
    sizes(tmp_path, flowers=6)
    records = run(tmp_path, "cifar10", DTD, FLOWERS)
    assert "sample 0.tar/s0000006: label 6, but 6 class names" in records[DTD].error
    assert "classnames.txt: cannot be read: No such file" in records["cifar10"].error
    assert records[FLOWERS].counts
    assert records[DTD].metrics == {}
    assert not records[DTD].complete


def test_towers_that_fail_on_one_task(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path, DTD)
    write(tmp_path, FLOWERS, ROWS[:3])
    encode = FeatureEncoder.images

    def out_of_memory(self: FeatureEncoder, pixels: torch.Tensor) -> torch.Tensor:
        if len(pixels) > 3:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return encode(self, pixels)

    with mock.patch.object(FeatureEncoder, "images", out_of_memory):
        records = run(tmp_path, DTD, FLOWERS)
    assert records[DTD].error == "OutOfMemoryError: CUDA out of memory"
    assert records[FLOWERS].samples == 3
    assert "Traceback" in capsys.readouterr().err, "a fault of the program is not hidden"


def test_the_reason_why_nothing_can_be_read(tmp_path: Path) -> None:
    write_captioned_csv(tmp_path / "flickr_1k_test_image_text_retrieval", "x.csv", "images", [("red", ["red"])])
    shutil.rmtree(tmp_path / "flickr_1k_test_image_text_retrieval" / "images")
    error = run(tmp_path, FLICKR)[FLICKR].error
    assert error.endswith("none of its 1 samples can be read; COCO_val2014_000000000000.jpg: no such image")


def test_features_that_are_not_finite(tmp_path: Path) -> None:
    write(tmp_path, DTD)
    with mock.patch.object(FeatureEncoder, "images", lambda self, pixels: torch.full((len(pixels), 3), torch.nan)):
        assert "not finite" in run(tmp_path, DTD)[DTD].error


def test_goes_on_where_it_stopped(tmp_path: Path) -> None:
    write(tmp_path, DTD)
    write(tmp_path, FLOWERS, ROWS[:3])
    sizes(tmp_path, dtd=6, flowers=6)
    first = run(tmp_path, DTD, FLOWERS)
    with (tmp_path / "out" / RESULTS_FILE).open("a") as file:
        file.write('{"key": "vtab/fl')  # a kill
    (tmp_path / "sizes.toml").write_text('"vtab/dtd" = 6\n"vtab/flowers" = 3\n')
    seen = []
    encode = FeatureEncoder.images
    with mock.patch.object(
        FeatureEncoder, "images", lambda self, pixels: (seen.append(len(pixels)), encode(self, pixels))[1]
    ):
        again = run(tmp_path, DTD, FLOWERS)
    assert seen == [3], "the complete task is not run again, the incomplete one is"
    assert again[DTD] == read_records(tmp_path / "out" / RESULTS_FILE)[DTD]
    assert first[DTD].metrics == again[DTD].metrics
    assert not first[FLOWERS].complete
    assert again[FLOWERS].counts


def run_and_be_told_to_stop(root: Path, told: int) -> tuple[list[str], int]:
    """Rank `told` is told within the second task; every rank calls this.

    Which tasks have a line afterwards, and how many batches of images this rank has when it goes on.
    """
    from disttempnet import distributed

    results, seen, encode = root / "out" / RESULTS_FILE, [], FeatureEncoder.images
    with pytest.raises(Preempted):
        run(root, *THREE, batch=2, stopped=lambda: distributed.rank() == told and len(read_records(results)) == 1)
    finished = list(read_records(results))
    distributed.barrier()
    with mock.patch.object(
        FeatureEncoder, "images", lambda self, pixels: (seen.append(len(pixels)), encode(self, pixels))[1]
    ):
        assert all(record.counts for record in run(root, *THREE, batch=2).values())
    return finished, len(seen)


@pytest.mark.parametrize(("told", "batches"), [(0, [6]), (0, [4, 2]), (1, [4, 2])])
def test_one_that_is_told_to_stop_keeps_what_is_finished(
    tmp_path: Path, gloo: Pools, told: int, batches: list[int]
) -> None:
    """Three tasks of three batches, in one process and in two: the finished one is not run again."""
    for key in THREE:
        write(tmp_path, key)
    (tmp_path / "sizes.toml").write_text("".join(f'"{key}" = 6\n' for key in THREE))
    alone = len(batches) == 1
    every = [run_and_be_told_to_stop(tmp_path, told)] if alone else gloo(2, run_and_be_told_to_stop, tmp_path, told)
    assert every == [(["sun397"], number) for number in batches]


def test_longest_task_first(tmp_path: Path) -> None:
    for key in (DTD, FLOWERS, "sun397"):
        write(tmp_path, key)
    run(tmp_path, DTD, FLOWERS, "sun397")
    assert list(read_records(tmp_path / "out" / RESULTS_FILE)) == ["sun397", FLOWERS, DTD]


def test_a_stream_that_ends_early_is_no_success(tmp_path: Path) -> None:
    write(tmp_path, DTD)
    with (
        mock.patch("disttempnet.evaluation.evaluator.decoded", return_value=iter(())),
        pytest.raises(UserError, match="decoding stopped before Describable Textures"),
    ):
        run(tmp_path, DTD)


@pytest.mark.parametrize("workers", [1, 2])  # two die together: out of memory, as a rule
def test_a_decoding_worker_that_dies_costs_nothing(workers: int, tmp_path: Path) -> None:
    for key in (DTD, FLOWERS):
        write(tmp_path, key)
    sizes(tmp_path, dtd=6, flowers=6)
    expected = run(tmp_path, DTD, FLOWERS, batch=2)
    decode = Decoder.__getitem__

    def dies(self: Decoder, request: DecodeRequest) -> ImageBatch:
        if multiprocessing.parent_process() is not None and request.start >= 2:
            os._exit(9)
        return decode(self, request)

    (tmp_path / "out" / RESULTS_FILE).unlink()
    with mock.patch.object(Decoder, "__getitem__", dies), pytest.warns(UserNotice, match="threads decode from here"):
        again = run(tmp_path, DTD, FLOWERS, batch=2, workers=workers)
    assert [again[key].metrics for key in (DTD, FLOWERS)] == [expected[key].metrics for key in (DTD, FLOWERS)]
    assert all(record.complete and not record.error for record in again.values())


def run_with_a_rank_that_fails(root: Path) -> list[tuple[str, bool]]:
    """Rank 1 cannot read its part of dtd; every rank calls this."""
    from disttempnet import distributed

    encode = FeatureEncoder.images

    def broken(self: FeatureEncoder, pixels: torch.Tensor) -> torch.Tensor:
        if distributed.rank() == 1 and len(pixels) == 2:
            raise UserError("the disk is gone")
        return encode(self, pixels)

    with mock.patch.object(FeatureEncoder, "images", broken):
        records = run(root, DTD, FLOWERS, batch=2)
    return [(records[key].error, records[key].complete) for key in (DTD, FLOWERS)]


def test_a_rank_that_fails_is_told_on_all_and_holds_up_none(tmp_path: Path, gloo: Pools) -> None:
    write(tmp_path, DTD)
    write(tmp_path, FLOWERS, ROWS[:3])
    sizes(tmp_path, dtd=6, flowers=3)
    here, there = gloo(2, run_with_a_rank_that_fails, tmp_path)
    assert here == [("rank 1: the disk is gone", False), ("", True)]
    assert there == [("the disk is gone", False), ("", True)]
    assert read_records(tmp_path / "out" / RESULTS_FILE)[DTD].error == "rank 1: the disk is gone"


def run_on_copies_that_differ(root: Path) -> list[str]:
    """Each rank has a data root of its own, the second with a sample less."""
    from disttempnet import distributed

    mine = root / str(distributed.rank())
    records = evaluate_into(root / "out", mine, [find_task(DTD), find_task(FLOWERS)])
    return [records[key].error for key in (DTD, FLOWERS)]


def test_ranks_that_see_different_data_do_not_wait_for_each_other(tmp_path: Path, gloo: Pools) -> None:
    for rank, rows in enumerate((ROWS, ROWS[:5])):
        (tmp_path / str(rank)).mkdir()
        write(tmp_path / str(rank), DTD, rows)
        write(tmp_path / str(rank), FLOWERS)
        sizes(tmp_path / str(rank), dtd=6, flowers=6)
    for errors in gloo(2, run_on_copies_that_differ, tmp_path):
        assert errors[0].startswith("the ranks see different data")
        assert errors[1] == ""


def test_captions_as_they_stand(tmp_path: Path) -> None:
    """Equal captions of two images are two texts, one of them wrong; a captionless image is named."""
    write_captioned_wds(tmp_path, FLICKR, [("red", ["red"]), ("pink", ["red", "pink"]), ("blue", [])])
    record = run(tmp_path, FLICKR)[FLICKR]
    assert record.corrupt == ("0.tar/s0000002: no caption",)
    # "red" finds the red image both times; the image red finds the first "red"; pink finds "pink"
    assert record.metrics["image_retrieval_recall@1"] == pytest.approx(2 / 3)
    assert record.metrics["text_retrieval_recall@1"] == 1.0


def test_unread_members_and_folders_in_a_tar(tmp_path: Path) -> None:
    """Names in folders and files that no one asked for are as webdataset has them."""
    folder = write(tmp_path, DTD, [])
    samples = [{**parts, "json": b"{}", "txt": b"x" * 5000} for parts in labelled(ROWS, SIX)]
    write_tar(folder / "test" / "0.tar", samples)
    assert run(tmp_path, DTD)[DTD].samples == 6
