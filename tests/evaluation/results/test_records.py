"""eval_results.jsonl: what is written, what is read, and what DataComp's aggregate script makes of it."""

from __future__ import annotations

import json
import math
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

from disttempnet.errors import UserError
from disttempnet.evaluation.results.averages import why_not
from disttempnet.evaluation.results.records import TaskRecord, append_record, read_records
from tests.evaluation import published

DTD = TaskRecord(
    "vtab/dtd",
    "Describable Textures",
    {"acc1": 0.25, "acc5": 0.5, "mean_per_class_recall": 0.2, "main_metric": 0.25},
    "acc1",
    samples=1880,
    expected=1880,
    seconds=1.5,
)


def datacomp_average(path: Path) -> float:
    """The rule of DataComp's aggregate script: rows without a main metric are dropped, 38 must be left."""
    values = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        if row["metrics"]["main_metric"] is not None:
            assert row["dataset"] not in values
            values[row["dataset"]] = row["metrics"]["main_metric"]
    assert len(values) == 38, len(values)
    return sum(values.values()) / 38


def test_line_is_the_published_form(tmp_path: Path) -> None:
    path = tmp_path / "new" / "eval_results.jsonl"
    append_record(path, DTD)
    text = path.read_text(encoding="utf-8")
    assert text.startswith(
        '{"key": "vtab/dtd", "dataset": "Describable Textures", "metrics": {"acc1": 0.25, "acc5": 0.5, '
        '"mean_per_class_recall": 0.2, "main_metric": 0.25}, '
    )
    assert text.count("\n") == 1
    assert text.endswith("}\n")
    assert read_records(path) == {"vtab/dtd": DTD}
    assert {p.name for p in path.parent.iterdir()} <= {"eval_results.jsonl", ".eval_results.jsonl.lock"}


def test_task_run_again_replaces_its_line(tmp_path: Path) -> None:
    path = tmp_path / "eval_results.jsonl"
    failed = TaskRecord(
        "vtab/dtd", "Describable Textures", {"main_metric": None}, "acc1", complete=False, error="no tar"
    )
    other = replace(DTD, key="cars", dataset="Stanford Cars")
    for record in (failed, other, DTD):
        append_record(path, record)
    assert list(read_records(path).items()) == [("cars", other), ("vtab/dtd", DTD)]
    assert len(path.read_text().splitlines()) == 2


def test_incomplete_main_metric_is_kept_from_other_programs(tmp_path: Path) -> None:
    path = tmp_path / "eval_results.jsonl"
    incomplete = replace(DTD, samples=1879, corrupt=("0.tar/s0000001",), complete=False)
    append_record(path, incomplete)
    assert json.loads(path.read_text())["metrics"] == {**DTD.metrics, "main_metric": None}
    (back,) = read_records(path).values()
    assert back == incomplete
    assert back.value == 0.25
    assert not back.counts


def test_undefined_numbers_are_null(tmp_path: Path) -> None:
    path = tmp_path / "eval_results.jsonl"
    append_record(path, replace(DTD, metrics={"acc1": math.nan, "acc5": None, "main_metric": math.nan}))
    assert "NaN" not in path.read_text()
    (record,) = read_records(path).values()
    assert record.metrics == {"acc1": None, "acc5": None, "main_metric": None}
    assert record.value is None
    assert not record.counts


def test_reads_what_datacomp_writes(tmp_path: Path) -> None:
    path = tmp_path / "eval_results.jsonl"
    path.write_text(
        '{"key": "wilds/fmow", "dataset": "FMoW", "metrics": {"acc_avg": 0.5, "acc_region:3": NaN, '
        '"acc_worst_region": 0, "main_metric": 0}}\n'
        '{"key": "fairness/utkface", "dataset": "UTKFace", "metrics": {"main_metric": null}}\n'
    )
    fmow, utkface = read_records(path).values()
    assert fmow.metrics == {"acc_avg": 0.5, "acc_region:3": None, "acc_worst_region": 0.0, "main_metric": 0.0}
    assert fmow.counts
    assert utkface.complete
    assert not utkface.counts


def test_half_written_last_line_is_ignored_and_then_written_over(tmp_path: Path) -> None:
    path = tmp_path / "eval_results.jsonl"
    append_record(path, DTD)
    whole = path.read_text()
    path.write_text(whole + whole.replace("vtab/dtd", "cars")[:60])
    assert list(read_records(path)) == ["vtab/dtd"]
    append_record(path, replace(DTD, key="cars"))
    assert list(read_records(path)) == ["vtab/dtd", "cars"]


def test_a_write_that_fails_leaves_the_file(tmp_path: Path) -> None:
    path = tmp_path / "eval_results.jsonl"
    append_record(path, DTD)
    before = path.read_bytes()
    with pytest.raises(ValueError, match="JSON compliant"):
        append_record(path, replace(DTD, key="cars", seconds=math.inf))
    assert path.read_bytes() == before


def test_several_at_once_lose_nothing(tmp_path: Path) -> None:
    """Jobs that take a part of the tasks each, into one folder."""
    path = tmp_path / "eval_results.jsonl"
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda i: append_record(path, replace(DTD, key=f"task{i}")), range(40)))
    assert read_records(path).keys() == {f"task{i}" for i in range(40)}


def test_what_failed_is_still_failed_when_it_is_read_again(tmp_path: Path) -> None:
    path = tmp_path / "eval_results.jsonl"
    for record in (
        TaskRecord("cars", "Stanford Cars", main_metric_name="acc1", complete=False, error="no tar"),
        replace(DTD, complete=False, error="5 samples of 1,880 were seen"),
    ):
        append_record(path, record)
    back = read_records(path)
    assert why_not(back["cars"]) == "failed: no tar"
    assert why_not(back["vtab/dtd"]) == "incomplete: 5 samples of 1,880 were seen"


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("in the way")
    with pytest.raises(UserError, match=r"eval_results\.jsonl: cannot be written: "):
        append_record(tmp_path / "out" / "eval_results.jsonl", DTD)


def test_no_file_is_no_record(tmp_path: Path) -> None:
    assert read_records(tmp_path / "eval_results.jsonl") == {}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"key": \n{"key": "a", "dataset": "A", "metrics": {"main_metric": 0}}\n', "line 1 is not JSON"),
        ('{"key": "a", "dataset": "A"}\n', "line 1 is not the result of a task"),
        ('["a"]\n', "line 1 is not the result of a task"),
        ('{"key": "a", "dataset": "A", "metrics": {"acc1": 0.5}}\n', "line 1 is not the result of a task"),
        ('{"key": "a", "dataset": "A", "metrics": {"main_metric": "0.5"}}\n', "line 1 is not the result of a task"),
        ('{"key": "a", "dataset": "A", "metrics": {"main_metric": true}}\n', "line 1 is not the result of a task"),
        ('{"key": "", "dataset": "A", "metrics": {"main_metric": 0.5}}\n', "line 1 is not the result of a task"),
        ('{"key": "a", "dataset": "A", "metrics": {"main_metric": 1}, "samples": "x"}\n', "line 1 is not the result"),
    ],
)
def test_malformed_file_is_one_line(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "eval_results.jsonl"
    path.write_text(text)
    with pytest.raises(UserError, match=words) as caught:
        read_records(path)
    assert "\n" not in str(caught.value)


def test_bytes_that_are_no_text_are_one_line(tmp_path: Path) -> None:
    path = tmp_path / "eval_results.jsonl"
    path.write_bytes(b"\xff\xfe{}\n")
    with pytest.raises(UserError, match="cannot be read"):
        read_records(path)


def test_datacomps_aggregate_reads_our_file(tmp_path: Path) -> None:
    row = published.rows()[0]
    path = tmp_path / "eval_results.jsonl"
    for record in published.records(published.scores(row)).values():
        append_record(path, record)
    for name in ("FairFace", "UTKFace"):  # no main metric: dropped
        append_record(path, TaskRecord(f"fairness/{name.lower()}", name, {"acc_avg": 0.5, "main_metric": None}))
    assert datacomp_average(path) == pytest.approx(float(row["Average perf. on 38 datasets"]), abs=5e-5)
    cars = read_records(path)["cars"]
    append_record(path, replace(cars, complete=False, samples=1))
    with pytest.raises(AssertionError, match="37"):
        datacomp_average(path)
