"""Tables and page over seeds: what they say, in every format, and the same again from a compact file."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure
from rich.console import Console

from disttempnet.errors import UserError
from disttempnet.report import write_report
from disttempnet.report.compact import read_results, write_compact
from disttempnet.report.seeds import plots as comparison_plots
from disttempnet.report.seeds.groups import Column, compare_groups, families
from disttempnet.report.seeds.page import comparison_page
from disttempnet.report.seeds.plots import batch_series, frequency_panel, learning_series
from disttempnet.report.seeds.tables import csv_table, latex_table, markdown_table, text_table
from disttempnet.report.seeds.tau_tables import tau_series
from tests.report.invented import result
from tests.report.runs.test_page import Page, assert_self_contained
from tests.report.synthetic import write_run

TASK = "emoji-concepts"
CLIP = (0.20, 0.22, 0.24)
TEMPNET = (0.23, 0.25, 0.27)  # ± 0.02
OTHER = (0.004, 0.006)


def runs() -> list:
    made = [result("clip", s, {TASK: {"acc1": v, "acc1_head": 0.5, "acc1_tail": 0.1}}) for s, v in enumerate(CLIP)]
    made += [result("x", s, {TASK: {"acc1": v}}, title="A_B & τ|<b>") for s, v in enumerate(TEMPNET)]
    return made + [result("sogclr", s, {TASK: {"acc1": v}}) for s, v in enumerate(OTHER)]


def test_markdown() -> None:
    lines = markdown_table(compare_groups(runs())).splitlines()
    assert lines[0] == (
        "|  | seeds | Unseen concepts: zero-shot top-1 | Unseen concepts: top-1, head | Unseen concepts: top-1, tail |"
    )
    assert lines[2] == "| CLIP | 3 | 22.0 (2.0) | 50.0 (0.0) | 10.0 (0.0) |"
    assert lines[3] == "| A_B & τ\\|&lt;b&gt; | 3 | **25.0 (2.0)** | – | – |"
    assert lines[4] == "| SogCLR | 2 | 0.50 (0.14) | – | – |"
    assert lines[5] == "| chance |  | 1.0 | 1.0 | 1.0 |"
    near = markdown_table(compare_groups([*runs()[:3], result("x", 0, {TASK: {"acc1": 0.235}})]))
    assert "| 3 | 22.0 (2.0)† |" in near
    assert "| x | 1 | **23.5** |" in near


def test_a_cell_of_fewer_seeds_says_so_everywhere() -> None:
    made = [result("clip", s, {TASK: {"acc1": v} | ({"mean_recall": v} if s else {})}) for s, v in enumerate(CLIP)]
    comparison = compare_groups([*made, result("x", 0, {TASK: {"acc1": 0.1, "mean_recall": 0.1}})])
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(text_table(comparison))
    tables = [markdown_table(comparison), latex_table(comparison), console.export_text()]
    for text in [*tables, Page(comparison_page(comparison)).text]:
        assert "22.0 (2.0)" in text
        assert "23.0 (1.4) n=2" in text
        assert text.count("n=") == 1


def test_latex_is_escaped_and_complete() -> None:
    text = latex_table(compare_groups(runs()))
    assert r"A\_B \& $\tau$|<b> & 3 & \textbf{25.0 (2.0)} & -- & -- \\" in text
    assert r"\multicolumn{3}{c}{Unseen concepts}" in text
    assert r"\cmidrule(lr){3-5}" in text
    scores, *_ = text.split(r"\end{tabular}")
    rows = [line for line in scores.splitlines() if line.endswith(r"\\") and "multicolumn" not in line]
    assert {line.replace(r"\&", "").count("&") for line in rows} == {4}
    assert text.count("{") == text.count("}")


def csv_rows(results: list) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(csv_table(compare_groups(results, [f"{TASK}/acc1"])))))


def test_csv_carries_raw_numbers() -> None:
    rows = [row for row in csv_rows(runs()) if row["task"] == TASK]
    assert [row["group"] for row in rows] == ["CLIP", "A_B & τ|<b>", "SogCLR"]
    for row, values in zip(rows, (CLIP, TEMPNET, OTHER), strict=True):
        assert float(row["mean"]) == pytest.approx(np.mean(values), rel=1e-14)
        assert float(row["std"]) == pytest.approx(np.std(values, ddof=1), rel=1e-14)
        assert int(row["n"]) == len(values)
        assert float(row["chance"]) == 0.01
    assert [row["mark"] for row in rows] == ["", "best", ""]
    (single,) = (row for row in csv_rows(runs()[:1]) if row["task"] == TASK)
    assert single["std"] == ""


def test_terminal() -> None:
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(text_table(compare_groups(runs())))
    text = console.export_text()
    assert "25.0 (2.0)" in text
    assert "sample standard deviation" in text


def test_runs_without_evaluations_have_every_table() -> None:
    comparison = compare_groups([result("clip", s, {}) for s in (1, 2)])
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(text_table(comparison))
    tex = latex_table(comparison)
    for text in (console.export_text(), markdown_table(comparison), tex):
        assert "no task was evaluated: set" in text
    assert " & seeds \\\\\n" in tex
    assert "CLIP & 2 \\\\\n" in tex


def test_a_compact_file_makes_the_same_tables(tmp_path: Path) -> None:
    folders = [write_run(tmp_path / "grid" / f"clip--seed-{i}", acc1=0.3 + i / 10) for i in (1, 2)]
    for i, folder in enumerate(folders):
        config = (folder / "config.toml").read_text().replace("seed = 2024", f"seed = {i}")
        (folder / "config.toml").write_text(config)
    small = write_report([tmp_path / "grid"], tmp_path / "results.jsonl")
    assert len(small.read_text().splitlines()) == 2
    assert max(map(len, small.read_text().splitlines())) < 6000
    first = json.loads(small.read_text().splitlines()[0])
    assert (first["seed"], first["seconds"], first["facts"]["versions"]["torch"]) == (0, 240.0, "2.9")
    tau = np.load(folders[0] / "temperatures" / "step-00000040.npz")["text"]
    assert first["tau"]["text"] == pytest.approx([tau.mean(), tau.min(), tau.max(), tau.std()], rel=1e-5)
    for name in ("table.md", "table.tex", "table.csv"):
        direct = write_report([tmp_path / "grid"], tmp_path / name).read_text()
        again = write_report([small], tmp_path / f"again-{name}").read_text()
        assert again == direct
        assert "0.45" in direct or "45.0 (7.1)" in direct
    assert write_compact(read_results([small])) == small.read_text()
    assert write_compact(read_results(folders)) == small.read_text()


def test_tau_against_frequency_of_a_run_and_over_seeds(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "v1")
    frequency = np.repeat([3, 20], 100)
    last = folder / "temperatures" / "step-00000040.npz"
    tau = {side: values + 0.001 * frequency for side, values in np.load(last).items()}
    np.savez(last, **tau, frequency=frequency)
    (found,) = read_results([folder])
    by_frequency = found.tau_by_frequency
    assert by_frequency["frequency"] == [3, 20]
    for side in ("image", "text"):
        rare, frequent = tau[side][:100], tau[side][100:]
        assert by_frequency[side] == pytest.approx([np.median(rare), np.median(frequent)])
        # a group of ties against values: Spearman from the ranks by its definition
        ranks = np.argsort(np.argsort(tau[side])).astype(float)
        expected = np.corrcoef(frequency, ranks)[0, 1]
        assert by_frequency["spearman"][["image", "text"].index(side)] == pytest.approx(expected)
    seeds = [0.5 + 0.1 * seed for seed in compare_groups(runs()).groups[0].seeds]
    text = Page(comparison_page(compare_groups(runs()))).text
    for shown in (text, markdown_table(compare_groups(runs()))):
        assert "-0.25 (0.00)" in shown
        assert f"{np.mean(seeds):.2f} ({np.std(seeds, ddof=1):.2f})" in shown
        assert "0.0300 ± 0.0040, 0.0200 to 0.0500" in shown


def test_tau_stands_in_every_table() -> None:
    """Where it ends, its correlation with frequency, and its trajectory: mean and std over the seeds 0, 1, 2."""
    made = [one for one in runs() if one.name.startswith("x")]
    for seed, one in enumerate(made):
        one.tau["text"] = [0.04 + 0.01 * seed, 0.02, 0.06, 0.005]
        curve = one.tau_curve  # what stands between its points lies on a line
        curve["mean"] = [0.01 * epoch + 0.001 * seed for epoch in curve["epoch"]]
    final = "0.0300 ± 0.0040, 0.0200 to 0.0500", "0.0500 ± 0.0050, 0.0200 to 0.0600", "0.60 (0.10)", "-0.25 (0.00)"
    # four epochs; the first that is logged is .1
    trained = "0.0020 (0.0010)", "0.0110 (0.0010)", "0.0210 (0.0010)", "0.0310 (0.0010)", "0.0410 (0.0010)"
    markdown, latex = markdown_table(compare_groups(made)), latex_table(compare_groups(made))
    for words in (final, trained):
        assert "| A_B & τ\\|&lt;b&gt; | " + " | ".join(words) + " |" in markdown
        assert r"A\_B \& $\tau$|<b> & " + " & ".join(words).replace("±", r"$\pm$") + r" \\" in latex
    assert latex.count(r"\begin{tabular}") == latex.count(r"\end{tabular}") == 3
    rows = {row["metric"]: row for row in csv_rows(made) if not row["task"]}
    assert {row["n"] for row in rows.values()} == {"3"}
    for metric, mean, std in (
        ("tau_image_mean", 0.03, 0),
        ("tau_text_mean", 0.05, 0.01),
        ("tau_text_min", 0.02, 0),
        ("tau_text_max", 0.06, 0),
        ("tau_text_std", 0.005, 0),
        ("tau_image_rank_correlation_with_frequency", 0.6, 0.1),
        ("tau_text_rank_correlation_with_frequency", -0.25, 0),
        ("training_tau_image_mean@0", 0.002, 0.001),
        ("training_tau_image_mean@0.25", 0.011, 0.001),
        ("training_tau_image_mean@1", 0.041, 0.001),
    ):
        assert float(rows[metric]["mean"]) == pytest.approx(mean, abs=1e-12), metric
        assert float(rows[metric]["std"]) == pytest.approx(std, abs=1e-12), metric


def test_no_table_of_tau_where_it_is_one_for_all() -> None:
    made = runs()[:3]
    for one in made:
        one.tau_by_frequency.clear()
    comparison = compare_groups(made)
    assert "τ" not in markdown_table(comparison)
    assert latex_table(comparison).count("tabular") == 2
    assert all(row["task"] for row in csv_rows(made))


def test_curves_and_batches_are_means_over_seeds() -> None:
    made = [
        result("clip", s, {TASK: {"acc1": v + batch / 1000}}, batch=batch, varied=f"--global_batch-{batch}")
        for batch in (32, 128)
        for s, v in enumerate(CLIP)
    ]
    groups = compare_groups(made).groups
    column = Column(TASK, "acc1")
    curve = learning_series(groups[0], column)
    np.testing.assert_allclose(curve.x, [1, 2, 3, 4])
    np.testing.assert_allclose(curve.mean, 100 * (np.mean(CLIP) + 0.032) * curve.x / 4)
    np.testing.assert_allclose(curve.std, 100 * np.std(CLIP, ddof=1) * curve.x / 4)
    line = batch_series(families(groups)[0], column)
    np.testing.assert_allclose(line.x, [32, 128])
    np.testing.assert_allclose(line.mean, [22 + 3.2, 22 + 12.8])
    assert "Accuracy against batch size" in Page(comparison_page(compare_groups(made))).text


def test_tau_of_seeds_that_logged_at_other_epochs_is_averaged_at_the_same_epochs() -> None:
    made = [result("clip", s, {TASK: {"acc1": 0.1}}) for s in (1, 2)]
    for one, epochs, slope in zip(made, ([0.5, 1, 2, 4], [1, 3, 4]), (0.01, 0.03), strict=True):
        mean = slope * np.array(epochs)
        one.tau_curve.update(epoch=epochs, mean=mean.tolist(), min=(mean - 0.001).tolist(), max=(2 * mean).tolist())
    (group,) = compare_groups(made).groups
    x, mean, low, high = tau_series(group)
    np.testing.assert_allclose(x, [1, 2, 3, 4])
    np.testing.assert_allclose(mean, 0.02 * x)
    np.testing.assert_allclose(low, 0.01 * x - 0.001)
    np.testing.assert_allclose(high, 0.06 * x)


def test_a_concept_that_was_never_trained_on_is_on_the_chart() -> None:
    made = result("clip", 1, {TASK: {"acc1": 0.1}})
    made.tau_by_frequency.update(frequency=[0, 1, 10, 1000], image=[0.02] * 4, text=[0.03] * 4)
    axis = Figure().subplots()
    frequency_panel(axis, compare_groups([made]).groups[0])
    axis.autoscale_view()
    x = axis.transAxes.inverted().transform(axis.transData.transform([(f, 0.02) for f in (0, 1, 10, 1000)]))[:, 0]
    assert (x > 0).all()
    assert (x < 1).all()
    assert (np.diff(x) > 0.05).all()
    assert x[3] - x[2] == pytest.approx(2 * (x[2] - x[1]))  # logarithmic from 1 on


def test_the_page_over_seeds_is_self_contained_and_escaped() -> None:
    page = Page(comparison_page(compare_groups([*runs(), result("late", 1, {TASK: {"acc1": 0.9}}, finished=False)])))
    assert_self_contained(page)
    assert page.ids == ["results", "learning", "parts", "temperatures", "frequency", "provenance"]
    for part in ("3 configurations, 2 to 3 seeds each", "A_B & τ|<b>", "25.0 (2.0)", "0123abcd", "torch 2.9"):
        assert part in page.text, part
    assert "Left out, because unfinished: late--seed-1." in page.text
    assert "90.0" not in page.text
    assert [a["class"] for tag, a in page.tags if tag == "td" and a.get("class") in ("best", "near")] == ["best"]


def test_the_page_of_runs_without_evaluations() -> None:
    page = Page(comparison_page(compare_groups([result("clip", s, {}) for s in (1, 2)])))
    assert page.ids == ["results", "learning", "temperatures", "frequency", "provenance"]


def test_what_is_given_decides_the_page(tmp_path: Path) -> None:
    one = write_run(tmp_path / "grid" / "a")
    alone = write_report([one], tmp_path / "one.html").read_text()
    assert 'id="zero-shot"' in alone
    again = write_run(tmp_path / "after" / "a", acc1=0.5)  # the same config and seed after a change of the code
    two = write_report([one, again], tmp_path / "two.html").read_text()
    assert 'id="zero-shot"' in two
    (again / "config.toml").write_text((again / "config.toml").read_text().replace("seed = 2024", "seed = 7"))
    assert 'id="zero-shot"' not in write_report([one, again], tmp_path / "seeds.html").read_text()
    grouped = write_report([tmp_path / "grid"], tmp_path / "grid.html").read_text()
    assert 'id="zero-shot"' not in grouped


def test_mistakes_are_named(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "bad.jsonl").write_text('{"format": 1}\n')
    for path, message in (
        (tmp_path / "empty", "neither a run folder"),
        (tmp_path / "none", "not a run folder"),
        (tmp_path / "none.jsonl", "cannot be read"),
        (tmp_path / "bad.jsonl", "line 1 is not a compact result"),
    ):
        with pytest.raises(UserError, match=message):
            write_report([path], tmp_path / "table.md")
    with pytest.raises(UserError, match=r"table.pdf: unknown ending; give one of .html, .md"):
        write_report([write_run(tmp_path / "a")], tmp_path / "table.pdf")
    for out, message in (("bad.jsonl/new/x.md", "bad.jsonl is no folder"), ("empty.md", "it is a folder")):
        (tmp_path / "empty.md").mkdir(exist_ok=True)
        with pytest.raises(UserError, match=f"{out}: cannot be written: .*{message}"):
            write_report([tmp_path / "not even read"], tmp_path / out)


def test_every_panel_shows_all_of_its_temperatures(monkeypatch: pytest.MonkeyPatch) -> None:
    """The panels share one axis: a later one's higher τ must not fall outside it."""
    drawn = []
    monkeypatch.setattr(comparison_plots, "svg", lambda figure: drawn.append(figure) or "")
    groups = compare_groups(runs()).groups
    for i, group in enumerate(groups):
        for one in group.results:
            one.tau_curve["max"][:] = [0.1 * (i + 1)] * len(one.tau_curve["max"])
            one.tau_by_frequency["image"][:] = [0.1 * (i + 1)] * 2
    comparison_plots.tau_chart(groups)
    comparison_plots.frequency_chart(groups)
    for figure in drawn:
        low, high = figure.axes[0].get_ylim()
        assert low == 0
        assert high >= 0.1 * len(groups)
