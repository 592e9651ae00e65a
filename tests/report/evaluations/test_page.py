"""The report over evaluations: averages over seeds beside published rows, tasks, differences, in every format."""

from __future__ import annotations

import csv
import io
import statistics
from dataclasses import replace
from pathlib import Path

import pytest

from disttempnet.errors import UserError
from disttempnet.evaluation.results.averages import counted_tags
from disttempnet.evaluation.results.records import RESULTS_FILE, append_record
from disttempnet.report import write_report
from disttempnet.report.evaluations.compare import (
    read_published,
)
from tests.evaluation import published
from tests.report.evaluations.records import (
    CLIP,
    average_of,
    folders,
    model_subject,
    record,
    write_evaluation,
)
from tests.report.pages import Page, assert_self_contained


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
    words = ["Average over 38", "ImageNet & variants", "Retrieval", "ImageNet shifts", "VTAB"]
    assert lines[2] == "|  | seeds | " + "".join(f"{word} | difference to CLIP, 95 % | " for word in words).strip()
    assert lines[4].startswith("| CLIP | 3 | 23.74 (2.85) | baseline | 22.00 (2.65) | baseline | 44.00 (5.29) |")
    # .10, .11, .09 by seed: 10 ± 4.303 · 1 / √3
    assert lines[5].startswith(
        "| DistTempNet-v1 | 3 | **34.53 (2.16)** | **+10.79 [8.11, 13.47]** | **32.00 (2.00)** "
        "| **+10.00 [7.52, 12.48]** | **64.00 (4.00)** | **+20.00 [15.03, 24.97]** |"
    )
    v3 = "| FastCLIP-v3 (CC12M, ViT-B/32, 2048) [2] | published | 31.60 (0.46) |  | 24.78 (0.28) |  | 34.88 (0.28) |"
    assert any(line.startswith(v3) for line in lines)
    v1 = "| DistTempNet-v1 (CC12M, ViT-B/32, 4096) [2, 3, 4] | published | 31.78 |  | 25.94 |  | 33.10 |  | – |"
    assert any(line.startswith(v1) for line in lines)
    assert any(line.startswith("[3] one run, 4096 samples a step") for line in lines)
    headings = [line for line in lines if line.startswith("## ")]
    assert headings == ["## Averages", "## ImageNet & variants", "## Retrieval", "## Tasks", "## DistTempNet-v1 − CLIP"]
    assert text.count("| published |") == len(read_published())
    assert "| Flickr | mean R@1 | 44.00 (5.29) | **64.00 (4.00)** |" in lines
    assert "| Retrieval | 44.00 (5.29) | 64.00 (4.00) | **+20.00 [15.03, 24.97]** |" in lines


def test_latex_is_one_table_a_heading(grid: Path) -> None:
    text = write_report(folders(grid), grid / "r.tex").read_text()
    assert text.count(r"\begin{tabular}") == text.count(r"\end{tabular}") == 3
    assert r"\multicolumn{5}{c}{}" not in text
    assert r"CLIP & 3 & 23.74 (2.85) & baseline & 22.00 (2.65) & baseline & 44.00 (5.29)" in text
    assert r"FastCLIP-v3, constant $\gamma$ (CC12M, ViT-B/32, 2048) [2] & pub. & 29.46 (0.39)" in text
    assert text.count("{") == text.count("}")


def test_page(grid: Path) -> None:
    odd = replace(model_subject("a<b>&c"), model="ViT<i>")
    append_record(grid / "odd" / RESULTS_FILE, record("cars", 0.2, complete=False, error="1 unreadable: <x>"))
    write_evaluation(grid / "odd", {"mnist": 0.5}, odd)
    html = write_report([*folders(grid), grid / "odd"], grid / "r.html").read_text()
    page = Page(html)
    assert_self_contained(page)
    shown = [
        "23.74 (2.85)",
        "31.60 (0.46)",
        "DistTempNet-v1 − CLIP",
        "+20.00 [15.03, 24.97]",
        "ViT<i> a<b>&c",
        "feedfeedfeed",
    ]
    for words in shown:
        assert words in page.text, words
    assert "Average over 38: CLIP 23.74 (2.85)." in page.text
    assert "Average over 38: DistTempNet-v1 34.53 (2.16), +10.79 [8.11, 13.47] to CLIP." in page.text
    assert "ViT<i> a<b>&c is partial: 1/38 tasks with a plain mean of 50.00." in page.text
    assert not any(tag == "details" for tag, _ in page.tags)
    lacking = "Left out: Stanford Cars incomplete: 1 unreadable: <x>"
    assert f"partial, 1/38 tasks with a plain mean of 50.00. {lacking}" in page.text
    assert "**" not in page.text


def test_partial_runs_are_in_no_average(grid: Path) -> None:
    folder = grid / "clip--seed-3" / "evaluation" / "step-100"
    append_record(folder / RESULTS_FILE, record("wilds/fmow", 0.9, complete=False, error="9 samples of 10 were seen"))
    text = write_report(folders(grid), grid / "r.md").read_text()
    two = [average_of(value) for value in CLIP[:2]]
    mean, std = 100 * statistics.mean(two), 100 * statistics.stdev(two)
    row = f"| CLIP | 3 | {mean:.2f} ({std:.2f}) n=2 | baseline | 22.00 (2.65) | baseline | 44.00 (5.29) | baseline |"
    assert row in text
    assert "| **+11.33 [4.47, 18.18] n=2** |" in text
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
    assert "- ViT-B-32 openai: may not compare with others. Stanford Cars: 6 class names, the task has 196; " in text
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


def test_metrics_choose_columns(grid: Path) -> None:
    text = write_report(folders(grid), grid / "r.md", ["averages/vtab", "vtab/dtd/acc1"]).read_text()
    assert "|  | seeds | VTAB | difference to CLIP, 95 % | Describable Textures: zero-shot top-1 | diff" in text
    assert "## Tasks" not in text
    with pytest.raises(UserError, match="unknown metric 'vtab/dtd/acc5'"):
        write_report(folders(grid), grid / "r.md", ["vtab/dtd/acc5"])
