"""Averages against published ones, and what an incomplete evaluation may call itself."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from disttempnet.errors import UserError
from disttempnet.evaluation.results.averages import averages, counted_tags, why_not
from disttempnet.evaluation.results.records import TaskRecord
from disttempnet.evaluation.results.summary import Subject, read_subject, write_summary
from disttempnet.evaluation.results.tables import records_table
from disttempnet.evaluation.tasks import all_tasks
from tests.evaluation import published


def rendered(records: dict[str, TaskRecord]) -> str:
    console = Console(width=110, no_color=True)
    with console.capture() as capture:
        console.print(records_table("ViT-B-32 openai", records, counted_tags()))
    return capture.get()


def mean_of(values: dict[str, float], names: set[str]) -> float:
    return sum(values[name] for name in names) / len(names)


def test_groups_are_those_of_datacomp() -> None:
    displays = {
        tag: {all_tasks()[key].display for key, tags in counted_tags().items() if tag in tags}
        for tag in ("datacomp", "imagenet", "shifts", "vtab", "retrieval")
    }
    assert displays == {
        "datacomp": set(published.header()[5:]),
        "imagenet": published.SHIFTS | {"ImageNet 1k"},
        "shifts": published.SHIFTS,
        "vtab": published.VTAB,
        "retrieval": published.RETRIEVAL,
    }


@pytest.mark.parametrize("row", published.rows(), ids=lambda row: f"{row['name']}-{row['pretrained']}")
def test_published_averages(row: dict[str, str]) -> None:
    values = published.scores(row)
    found = averages(published.records(values), counted_tags())
    assert [average.coverage for average in found.values()] == ["38/38", "7/7", "6/6", "13/13", "3/3"]
    assert all(average.complete for average in found.values())
    assert found["datacomp"].mean == pytest.approx(float(row["Average perf. on 38 datasets"]), abs=5e-5)
    assert found["datacomp"].title == "Average over 38"
    assert found["vtab"].mean == pytest.approx(mean_of(values, published.VTAB), abs=1e-12)
    assert found["retrieval"].mean == pytest.approx(mean_of(values, published.RETRIEVAL), abs=1e-12)
    six, seven = found["shifts"].mean, found["imagenet"].mean
    assert six == pytest.approx(mean_of(values, published.SHIFTS), abs=1e-12)
    assert six is not None
    assert seven == pytest.approx((values["ImageNet 1k"] + 6 * six) / 7, abs=1e-12)


def test_what_went_wrong_is_out_and_named() -> None:
    """By hand: main metrics 0.2 and 0.4 count, the others do not."""
    tags = dict.fromkeys("abcdef", ("datacomp",))
    records = {
        "a": TaskRecord("a", "A", {"main_metric": 0.2}, samples=5, expected=5),
        "b": TaskRecord("b", "B", {"main_metric": 0.4}),
        "c": TaskRecord("c", "C", {"main_metric": 0.9}, samples=4, expected=5, complete=False, error="1 unreadable: x"),
        "d": TaskRecord("d", "D", complete=False, error="no such folder"),
        "e": TaskRecord("e", "E", {"main_metric": None}),
        "fairness/fairface": TaskRecord("fairness/fairface", "FairFace", {"main_metric": None}),
    }
    found = averages(records, tags)
    assert list(found) == ["datacomp"]
    assert found["datacomp"].mean == pytest.approx(0.3)
    assert found["datacomp"].title == "All tasks: plain mean of 2/6, partial"
    assert dict(found["datacomp"].left_out) == {
        "c": "incomplete: 1 unreadable: x",
        "d": "failed: no such folder",
        "e": "its main metric is not defined",
        "f": "not run",
    }


def test_nothing_ran() -> None:
    average = averages({}, counted_tags())["retrieval"]
    assert (average.mean, average.complete, average.coverage) == (None, False, "0/3")


def test_incomplete_for_another_reason() -> None:
    assert why_not(TaskRecord("a", "A", {"main_metric": 0.5}, samples=7, complete=False)) == "incomplete: 7 samples"


def test_terminal_table() -> None:
    records = published.records(published.scores(published.rows()[0]))
    text = rendered(records)
    assert "ViT-B-32 openai" in text
    (line,) = [line for line in text.splitlines() if "Average over 38" in line]
    assert line.split() == ["Average", "over", "38", "58.7", "38/38"]
    assert "partial" not in text


def test_terminal_table_of_a_part() -> None:
    records = published.records(published.scores(published.rows()[0]))
    del records["cars"]
    records["cifar10"] = replace(
        records["cifar10"], complete=False, error="8 samples of 10 were seen", notes=("3 tars",)
    )
    records["fairness/utkface"] = TaskRecord("fairness/utkface", "UTKFace", {"acc": 0.5, "main_metric": None})
    text = rendered(records)
    assert "Average over" not in text
    (line,) = [line for line in text.splitlines() if "plain mean" in line]
    assert line.split()[:2] + line.split()[-2:] == ["All", "tasks", "36/38", "partial"]
    assert "in no average: CIFAR-10 incomplete: 8 samples of 10 were seen" in text
    assert "CIFAR-10: 3 tars" in text
    assert "in no average: not run: Stanford Cars" in text
    (cifar,) = [line for line in text.splitlines() if line.strip().startswith("CIFAR-10 ")]
    assert "incomplete" in cifar
    (utkface,) = [line for line in text.splitlines() if "UTKFace" in line]
    assert "ok" in utkface


def test_summary(tmp_path: Path) -> None:
    records = published.records(published.scores(published.rows()[0]))
    records["cars"] = replace(records["cars"], metrics={}, complete=False, error="no such folder")
    subject = Subject("ViT-B-32", "openai", "feed", "fp32", "", {"torch": "2.9"}, 151277313)
    write_summary(tmp_path, subject, records, counted_tags())
    table = json.loads((tmp_path / "summary.json").read_text())
    assert (table["checkpoint"], table["precision"], table["seconds"]) == ("feed", "fp32", 0.0)
    assert table["averages"]["datacomp"]["left_out"] == {"cars": "failed: no such folder"}
    assert table["averages"]["datacomp"]["title"] == "All tasks: plain mean of 37/38, partial"
    assert table["averages"]["retrieval"]["complete"] is True
    assert table["averages"]["retrieval"]["coverage"] == "3/3"
    assert table["incomplete"] == {"cars": "failed: no such folder"}
    assert read_subject(tmp_path) == subject


def test_no_summary(tmp_path: Path) -> None:
    assert read_subject(tmp_path) is None


@pytest.mark.parametrize("text", ["{", "[]", '{"model": 3}', "{}", '{"model": "a", "run": []}'])
def test_damaged_summary_is_one_line(tmp_path: Path, text: str) -> None:
    (tmp_path / "summary.json").write_text(text)
    with pytest.raises(UserError, match=r"summary\.json: damaged"):
        read_subject(tmp_path)
