"""Exports against the forms that their readers expect: open_clip's published CSV, CLIP_benchmark's build."""

from __future__ import annotations

import csv
import io
import json
from dataclasses import replace
from pathlib import Path

import pytest

from disttempnet.cli.main import main
from disttempnet.evaluation.results.averages import counted_tags
from disttempnet.evaluation.results.export import ModelResults, clip_benchmark_files, openclip_csv
from disttempnet.evaluation.results.records import RESULTS_FILE, TaskRecord, write_records
from disttempnet.evaluation.results.summary import Subject, write_summary
from disttempnet.evaluation.tasks import all_tasks
from tests.evaluation import published

TITLES = {key: task.display for key, task in all_tasks().items()}


def evaluated(row: dict[str, str]) -> ModelResults:
    parameters = round(float(row["params (M)"]) * 1e6)
    subject = Subject(row["name"], row["pretrained"], parameters=parameters)
    return ModelResults(subject, published.records(published.scores(row)))


def exported(*every: ModelResults) -> list[list[str]]:
    return list(csv.reader(io.StringIO(openclip_csv(every, counted_tags(), TITLES))))


def test_openclip_csv_is_the_published_one() -> None:
    """Every cell but FLOPs, which are not counted, and the params cells where trailing zeros were lost there."""
    with published.CSV.open(encoding="utf-8", newline="") as file:
        expected = list(csv.reader(file))
    found = exported(*(evaluated(row) for row in published.rows()))
    assert found[0] == expected[0]
    assert len(found) == len(expected) == 9
    for ours, theirs in zip(found[1:], expected[1:], strict=True):
        assert float(ours[2]) == float(theirs[2])
        assert ours[3] == ""
        assert [*ours[:2], *ours[4:]] == [*theirs[:2], *theirs[4:]]


def test_openclip_csv_of_a_part_has_no_average() -> None:
    subject, records = evaluated(published.rows()[0])
    part = dict(records)
    part["cars"] = replace(part["cars"], complete=False)
    del part["mnist"]
    header, row = exported(ModelResults(replace(subject, parameters=0), part))
    cells = dict(zip(header, row, strict=True))
    assert {name for name, cell in cells.items() if not cell} == {
        "params (M)", "FLOPs (B)", "Average perf. on 38 datasets", "Stanford Cars", "MNIST",
    }  # fmt: skip


def test_clip_benchmark_files_build() -> None:
    """`clip_benchmark build` joins `metrics` and the other keys, and reads `model` and `pretrained`."""
    records = {
        "vtab/dtd": TaskRecord(
            "vtab/dtd", "Describable Textures", {"acc1": 0.5, "acc5": None, "main_metric": 0.5}, "acc1"
        ),
        "retrieval/flickr": TaskRecord(
            "retrieval/flickr", "Flickr", {"image_retrieval_recall@1": 0.25, "main_metric": 0.25}, "mean_recall@1"
        ),
        "misc/winogavil": TaskRecord("misc/winogavil", "WinoGAViL", {"jaccard_score_5": 0.75, "main_metric": 0.75}),
        "cars": TaskRecord("cars", "Stanford Cars", {"acc1": 0.1, "main_metric": 0.1}, "acc1", complete=False),
        "mnist": TaskRecord("mnist", "MNIST", {"main_metric": None}, "acc1", complete=False, error="no such folder"),
    }
    files = clip_benchmark_files(ModelResults(Subject("ViT-B-32", "runs/a b"), records))
    rows = {}
    for name, text in files.items():
        data = json.loads(text)
        rows[name] = {**data["metrics"], **data, "model_fullname": data["model"] + " " + data["pretrained"]}
    assert set(files) == {
        "vtab_dtd_runs_a_b_ViT-B-32_en_zeroshot_classification.json",
        "retrieval_flickr_runs_a_b_ViT-B-32_en_zeroshot_retrieval.json",
        "misc_winogavil_runs_a_b_ViT-B-32_en_winogavil.json",
    }
    dtd = rows["vtab_dtd_runs_a_b_ViT-B-32_en_zeroshot_classification.json"]
    assert dtd["metrics"] == {"acc1": 0.5, "acc5": None}
    assert (dtd["dataset"], dtd["task"], dtd["language"]) == ("wds/vtab/dtd", "zeroshot_classification", "en")
    assert dtd["model_fullname"] == "ViT-B-32 runs/a b"
    assert list(json.loads(next(iter(files.values())))) == [
        "dataset", "model", "pretrained", "task", "metrics", "language",
    ]  # fmt: skip


def write(folder: Path, one: ModelResults) -> Path:
    write_records(folder / RESULTS_FILE, one.records.values())
    write_summary(folder, one.subject, one.records, counted_tags())
    return folder


def test_command_writes_one_csv_of_several_models(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = published.rows()[:2]
    folders = [str(write(tmp_path / str(i), evaluated(row))) for i, row in enumerate(rows)]
    out = tmp_path / "new" / "results.csv"
    assert main(["export", *folders, "--to", "openclip-csv", "--out", str(out)]) == 0
    assert "(1 file)" in capsys.readouterr().out
    read = list(csv.DictReader(io.StringIO(out.read_text())))
    assert [row["Average perf. on 38 datasets"] for row in read] == [
        row["Average perf. on 38 datasets"] for row in rows
    ]


def test_command_names_what_it_leaves_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    subject, records = evaluated(published.rows()[0])
    part = {**records, "cars": replace(records["cars"], complete=False, error="9 samples of 10 were seen")}
    folder = write(tmp_path / "part", ModelResults(subject, part))
    out = tmp_path / "json"
    assert main(["export", str(folder), "--to", "clip-benchmark", "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    assert f"left out of {folder}: Stanford Cars incomplete: 9 samples of 10 were seen" in printed
    assert "(37 files)" in printed
    assert len(list(out.glob("*.json"))) == 37


def test_command_mistakes_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = str(write(tmp_path / "a", evaluated(published.rows()[0])))
    out = ["--out", str(tmp_path / "out")]
    for arguments, words in (
        ([str(tmp_path / "none"), "--to", "openclip-csv"], "no results of an evaluation"),
        ([folder, folder, "--to", "clip-benchmark"], "two of the results are of the same model and weights"),
    ):
        assert main(["export", *arguments, *out]) == 2
        error = capsys.readouterr().err
        assert words in error
        assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()
