"""Evaluations: which paths are some, damaged files, averages, sections and differences."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from disttempnet.errors import UserError
from disttempnet.evaluation.results.averages import counted_tags
from disttempnet.evaluation.results.records import RESULTS_FILE, append_record
from disttempnet.evaluation.tasks import all_tasks
from disttempnet.report import write_report
from disttempnet.report.evaluations.compare import (
    compare_columns,
    holds_evaluations,
    known_columns,
    read_evaluations,
    read_published,
    score_differences,
    sections,
)
from disttempnet.report.seeds.groups import AVERAGES, Column
from disttempnet.report.seeds.intervals import PairedDifference, mean_interval
from tests.evaluation import published
from tests.report.evaluations.records import (
    CLIP,
    TEMPNET,
    flat,
    folders,
    model_subject,
    record,
    run_subject,
    write_evaluation,
)


def test_published_rows_repeat_open_clips_csv() -> None:
    """The one published row that can be computed here: RN50 on CC12M."""
    (row,) = [row for row in published.rows() if (row["name"], row["pretrained"]) == ("RN50", "cc12m")]
    values = published.scores(row)
    (openclip,) = [one for one in read_published() if one.title.startswith("OpenCLIP")]
    names = {
        "datacomp": set(values),
        "imagenet": published.SHIFTS | {"ImageNet 1k"},
        "retrieval": published.RETRIEVAL,
    }
    for tag, group in names.items():
        mean = sum(values[name] for name in group) / len(group)
        assert openclip.values[Column(AVERAGES, tag)].mean == pytest.approx(mean, abs=5.1e-5)


def test_differences_by_hand(grid: Path) -> None:
    every = read_evaluations(folders(grid))
    clip, tempnet = compare_columns(every, known_columns(every)).groups
    pets, flickr = (
        Column("vtab/pets", "mean_per_class_recall"),
        Column("retrieval/flickr_1k_test_image_text_retrieval", "mean_recall@1"),
    )
    first, second = score_differences(clip, tempnet, [pets, flickr])
    assert (first.column, second.column) == (flickr, pets)
    assert first.paired.mean == pytest.approx(2 * (0.32 - 0.22))
    by_seed = [b - a for a, b in zip(CLIP, TEMPNET, strict=True)]
    assert second.paired.interval == pytest.approx(mean_interval(by_seed))
    assert (second.paired.sign, second.paired.n) == (1, 3)
    assert score_differences(clip, clip, [pets])[0].paired.sign == 0
    one_seed = replace(clip, results=clip.results[:1])
    (alone,) = score_differences(one_seed, tempnet, [pets])
    assert alone.paired == PairedDifference(pytest.approx(0.1), None, 1)
    (unpaired,) = score_differences(one_seed, replace(tempnet, results=tempnet.results[1:]), [pets])
    assert unpaired.paired == PairedDifference(pytest.approx(0.33 - 0.20), None, 0)


def test_every_task_is_in_one_section(grid: Path) -> None:
    columns = [column for column in known_columns(read_evaluations(folders(grid))) if column.task != AVERAGES]
    found = sections(columns)
    assert [(title, len(of)) for title, of in found] == [
        ("ImageNet & variants", 7), ("VTAB", 13), ("Other", 10), ("Retrieval", 3), ("WILDS", 3), ("Fairness", 2),
    ]  # fmt: skip
    assert sorted(c for _, of in found for c in of) == sorted(columns)


def test_precision_tells_evaluations_apart(grid: Path) -> None:
    half = replace(run_subject("clip", 1), precision="bf16")
    folder = write_evaluation(grid / "half", flat(0.5), half)
    text = write_report([grid / "clip--seed-1" / "evaluation", folder], grid / "r.md").read_text()
    assert text.count("| 1 |") >= 2
    same = write_evaluation(grid / "same", flat(0.5), run_subject("clip", 1))
    with pytest.raises(UserError, match=r"seed 1 .* was given 2 times"):
        write_report([grid / "clip--seed-1" / "evaluation", same], grid / "r.md")


def test_what_is_an_evaluation(grid: Path) -> None:
    folder = grid / "clip--seed-1" / "evaluation" / "step-100"
    assert holds_evaluations(folder)
    assert holds_evaluations(folder.parent)
    assert holds_evaluations(folder / RESULTS_FILE)
    assert not holds_evaluations(grid / "clip--seed-1")  # a run folder has a page of its own
    assert not holds_evaluations(grid / "nothing")
    (grid / "other.jsonl").write_text('{"format": 1}\n')
    assert not holds_evaluations(grid / "other.jsonl")
    with pytest.raises(UserError, match=r"other\.jsonl: no evaluation"):
        write_report([folder, grid / "other.jsonl"], grid / "r.md")
    with pytest.raises(UserError, match="evaluations are compact"):
        write_report([folder], grid / "r.jsonl")


def test_lines_of_datacomps_own_evaluator(tmp_path: Path) -> None:
    lines = [
        {"key": key, "dataset": all_tasks()[key].display, "metrics": {"acc1": 0.5, "main_metric": 0.5}}
        for key in counted_tags()
    ]
    path = tmp_path / "theirs.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    text = write_report([path], tmp_path / "r.md").read_text()
    assert f"| {path} | 1 | 50.00 | 50.00 | 50.00 | 50.00 | 50.00 |" in text


@pytest.mark.parametrize(
    ("text", "words"),
    [("{", "line 1 is not JSON"), ('{"key": "a", "dataset": "A", "metrics": {}}\n', "line 1 is not the result")],
)
def test_malformed_lines_are_one_line(tmp_path: Path, text: str, words: str) -> None:
    append_record(tmp_path / RESULTS_FILE, record("cars", 0.5))
    (tmp_path / RESULTS_FILE).write_text(text + "\n" + (tmp_path / RESULTS_FILE).read_text())
    with pytest.raises(UserError, match=words) as caught:
        write_report([tmp_path], tmp_path / "r.md")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("run", [{"config": {"name": "a"}}, {"config": {"name": "a", "train": {"seed": "x"}}}])
def test_summary_of_a_damaged_run_is_one_line(tmp_path: Path, run: dict) -> None:
    write_evaluation(tmp_path / "e", {"cars": 0.5}, replace(model_subject("openai"), run=run))
    with pytest.raises(UserError, match=r"summary\.json does not hold a run's config"):
        write_report([tmp_path / "e"], tmp_path / "r.md")


def test_no_results(tmp_path: Path) -> None:
    (tmp_path / RESULTS_FILE).write_text('{"half')
    with pytest.raises(UserError, match="holds no result of a task"):
        write_report([tmp_path], tmp_path / "r.md")
