"""Exports against the forms that their readers expect: open_clip's published CSV, CLIP_benchmark's build."""

from __future__ import annotations

import csv
import io
import json
from dataclasses import replace

from disttempnet.evaluation.averages import counted_tags
from disttempnet.evaluation.exports import Evaluated, clip_benchmark_files, openclip_csv
from disttempnet.evaluation.readers import all_tasks
from disttempnet.evaluation.records import TaskRecord
from disttempnet.evaluation.summary import Subject
from evaluation import published

TITLES = {key: task.display for key, task in all_tasks().items()}


def evaluated(row: dict[str, str]) -> Evaluated:
    parameters = round(float(row["params (M)"]) * 1e6)
    subject = Subject(row["name"], row["pretrained"], parameters=parameters)
    return Evaluated(subject, published.records(published.scores(row)))


def exported(*every: Evaluated) -> list[list[str]]:
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
    header, row = exported(Evaluated(replace(subject, parameters=0), part))
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
    files = clip_benchmark_files(Evaluated(Subject("ViT-B-32", "runs/a b"), records))
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
