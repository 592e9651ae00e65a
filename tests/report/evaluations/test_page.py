"""The report over evaluations: averages over seeds beside published rows, tasks, differences, in every format."""

from __future__ import annotations

import csv
import io
import json
import statistics
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
from tests.evaluation import published
from tests.report.evaluations.records import flat, model_subject, record, run_subject, write_evaluation
from tests.report.runs.test_page import Page, assert_self_contained

CLIP = (0.20, 0.21, 0.25)
TEMPNET = (0.30, 0.32, 0.34)


@pytest.fixture
def grid(tmp_path: Path) -> Path:
    """Two configs of three seeds, as `evaluate` leaves them below run folders."""
    for loss, values in (("clip", CLIP), ("disttempnet-v1", TEMPNET)):
        for seed, value in enumerate(values, 1):
            write_evaluation(
                tmp_path / f"{loss}--seed-{seed}/evaluation/step-100", flat(value), run_subject(loss, seed)
            )
    return tmp_path


def folders(grid: Path) -> list[Path]:
    return sorted(grid.glob("*/evaluation"))


def average_of(value: float) -> float:
    """Of `flat(value)` by hand: 35 tasks at it and 3 of retrieval at twice it."""
    return (35 * value + 3 * 2 * value) / 38


def rows_of(text: str) -> dict[tuple[str, str, str], dict[str, str]]:
    return {(row["group"], row["task"], row["metric"]): row for row in csv.DictReader(io.StringIO(text))}


def test_csv_by_hand(grid: Path) -> None:
    rows = rows_of(write_report(folders(grid), grid / "r.csv").read_text())
    row = rows["CLIP", "averages", "datacomp"]
    means = [average_of(value) for value in CLIP]
    assert float(row["mean"]) == pytest.approx(statistics.mean(means), abs=1e-12)
    assert float(row["std"]) == pytest.approx(statistics.stdev(means), abs=1e-12)
    assert (row["n"], row["mark"]) == ("3", "")
    assert rows["DistTempNet-v1", "averages", "datacomp"]["mark"] == "best"
    assert float(rows["DistTempNet-v1", "averages", "retrieval"]["mean"]) == pytest.approx(0.64)
    assert float(rows["CLIP", "vtab/pets", "mean_per_class_recall"]["mean"]) == pytest.approx(0.22)
    assert len([key for key in rows if key[0] == "CLIP"]) == 5 + 38
    v3 = rows["FastCLIP-v3 (CC12M, ViT-B/32, 2048)", "averages", "retrieval"]
    assert (v3["mean"], v3["std"], v3["n"], v3["mark"]) == ("0.3488", "0.0028", "0", "published")


def test_markdown(grid: Path) -> None:
    text = write_report(folders(grid), grid / "r.md").read_text()
    lines = text.splitlines()
    assert lines[2] == "|  | seeds | Average over 38 | ImageNet & variants | Retrieval | ImageNet shifts | VTAB |"
    assert lines[4] == "| CLIP | 3 | 23.74 (2.85) | 22.00 (2.65) | 44.00 (5.29) | 22.00 (2.65) | 22.00 (2.65) |"
    assert lines[5].startswith("| DistTempNet-v1 | 3 | **34.53 (2.16)** | **32.00 (2.00)** | **64.00 (4.00)** |")
    assert (
        "| FastCLIP-v3 (CC12M, ViT-B/32, 2048) [2] | published | 31.60 (0.46) | 24.78 (0.28) | 34.88 (0.28) | – | – |"
        in lines
    )
    assert "| DistTempNet-v1 (CC12M, ViT-B/32, 4096) [2, 3, 4] | published | 31.78 | 25.94 | 33.10 | – | – |" in lines
    assert any(line.startswith("[3] one run, 4096 samples a step") for line in lines)
    headings = [line for line in lines if line.startswith("## ")]
    assert headings == ["## Averages", "## ImageNet & variants", "## Retrieval", "## Tasks", "## DistTempNet-v1 − CLIP"]
    assert text.count("| published |") == len(read_published())
    assert "| Flickr | mean R@1 | 44.00 (5.29) | **64.00 (4.00)** |" in lines
    assert "| Retrieval | 44.00 (5.29) | 64.00 (4.00) | **+20.00 (6.63)** |" in lines


def test_latex_is_one_table_a_heading(grid: Path) -> None:
    text = write_report(folders(grid), grid / "r.tex").read_text()
    assert text.count(r"\begin{tabular}") == text.count(r"\end{tabular}") == 3
    assert r"\multicolumn{5}{c}{}" not in text
    assert r"CLIP & 3 & 23.74 (2.85) & 22.00 (2.65) & 44.00 (5.29)" in text
    assert r"FastCLIP-v3, constant $\gamma$ (CC12M, ViT-B/32, 2048) [2] & pub. & 29.46 (0.39)" in text
    assert text.count("{") == text.count("}")


def test_page(grid: Path) -> None:
    odd = replace(model_subject("a<b>&c"), model="ViT<i>")
    append_record(grid / "odd" / RESULTS_FILE, record("cars", 0.2, complete=False, error="1 unreadable: <x>"))
    write_evaluation(grid / "odd", {"mnist": 0.5}, odd)
    html = write_report([*folders(grid), grid / "odd"], grid / "r.html").read_text()
    page = Page(html)
    assert_self_contained(page)
    shown = ["23.74 (2.85)", "31.60 (0.46)", "DistTempNet-v1 − CLIP", "+20.00 (6.63)", "ViT<i> a<b>&c", "feedfeedfeed"]
    for words in shown:
        assert words in page.text, words
    lacking = "Left out: Stanford Cars incomplete: 1 unreadable: <x>"
    assert f"partial, 1/38 tasks with a plain mean of 50.00. {lacking}" in page.text
    assert "**" not in page.text


def test_partial_runs_are_in_no_average(grid: Path) -> None:
    folder = grid / "clip--seed-3" / "evaluation" / "step-100"
    append_record(folder / RESULTS_FILE, record("wilds/fmow", 0.9, complete=False, error="9 samples of 10 were seen"))
    text = write_report(folders(grid), grid / "r.md").read_text()
    two = [average_of(value) for value in CLIP[:2]]
    mean, std = 100 * statistics.mean(two), 100 * statistics.stdev(two)
    assert f"| CLIP | 3 | {mean:.2f} ({std:.2f}) n=2 | 22.00 (2.65) | 44.00 (5.29) |" in text
    assert "| FMoW | top-1, worst region | 20.50 (0.71) n=2 |" in text
    rest = (38 * average_of(0.25) - 0.25) / 37
    assert (
        f"partial, 37/38 tasks with a plain mean of {100 * rest:.2f}. Left out: FMoW incomplete: 9 samples of 10"
        in text
    )


def test_a_subset_has_no_average_over_38(grid: Path) -> None:
    keys = [key for key, tags in counted_tags().items() if "retrieval" in tags]
    folder = write_evaluation(grid / "some", dict.fromkeys(keys, 0.5), model_subject("openai"))
    text = write_report([folder], grid / "r.md").read_text()
    assert "Average over 38" not in text
    assert "|  | seeds | Retrieval |" in text
    assert "partial, 3/38 tasks with a plain mean of 50.00. Left out: not run: 35 tasks" in text
    assert "−" not in text  # one model: nothing to compare


def test_notes_warn(tmp_path: Path) -> None:
    folder = write_evaluation(tmp_path / "e", {"mnist": 0.5}, model_subject("openai"))
    append_record(folder / RESULTS_FILE, record("cars", 0.2, notes=("6 class names, the task has 196",) * 12))
    text = write_report([folder], tmp_path / "r.md").read_text()
    assert f"- {folder}: may not compare with others. Stanford Cars: 6 class names, the task has 196; " in text
    assert text.count("Stanford Cars: 6 class names") == 10
    assert "and 2 more notes" in text


def test_only_tasks_without_a_main_metric(tmp_path: Path) -> None:
    append_record(tmp_path / "e" / RESULTS_FILE, record("fairness/fairface", 0.5))
    text = write_report([tmp_path / "e"], tmp_path / "r.md").read_text()
    assert "partial, 0/38 tasks. Left out: not run: 38 tasks" in text
    for ending in ("html", "tex", "csv"):
        assert write_report([tmp_path / "e"], tmp_path / f"r.{ending}").is_file()


def test_published_model_against_its_row(tmp_path: Path) -> None:
    row = published.rows()[0]
    values = {key: r.value or 0.0 for key, r in published.records(published.scores(row)).items()}
    folder = write_evaluation(tmp_path / "e", values, model_subject(row["pretrained"]))
    rows = rows_of(write_report([folder], tmp_path / "r.csv").read_text())
    mean = float(rows[f"ViT-B-32 {row['pretrained']}", "averages", "datacomp"]["mean"])
    assert mean == pytest.approx(float(row["Average perf. on 38 datasets"]), abs=5e-5)


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


def test_metrics_choose_columns(grid: Path) -> None:
    text = write_report(folders(grid), grid / "r.md", ["averages/vtab", "vtab/dtd/acc1"]).read_text()
    assert "|  | seeds | VTAB | Describable Textures: zero-shot top-1 |" in text
    assert "## Tasks" not in text
    with pytest.raises(UserError, match="unknown metric 'vtab/dtd/acc5'"):
        write_report(folders(grid), grid / "r.md", ["vtab/dtd/acc5"])


def test_differences_by_hand(grid: Path) -> None:
    every = read_evaluations(folders(grid))
    clip, tempnet = compare_columns(every, known_columns(every)).groups
    pets, flickr = (
        Column("vtab/pets", "mean_per_class_recall"),
        Column("retrieval/flickr_1k_test_image_text_retrieval", "mean_recall@1"),
    )
    first, second = score_differences(clip, tempnet, [pets, flickr])
    assert (first.column, second.column) == (flickr, pets)
    assert first.mean == pytest.approx(2 * (0.32 - 0.22))
    assert second.std == pytest.approx((statistics.variance(CLIP) + statistics.variance(TEMPNET)) ** 0.5)
    assert second.clear
    assert not score_differences(clip, clip, [pets])[0].clear
    assert not score_differences(replace(clip, results=clip.results[:1]), tempnet, [pets])[0].clear


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
