"""The page: complete, self-contained, escaped, and honest about unfinished or damaged runs."""

from __future__ import annotations

import base64
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from matplotlib.figure import Figure

from disttempnet.report import build_report, read_run
from disttempnet.report.runs import examples, plots
from tests.report.pages import EVIL, SECTIONS, assert_self_contained, page_of
from tests.report.synthetic import write_run


def test_two_runs_without_checkpoints(tmp_path: Path) -> None:
    folders = [write_run(tmp_path / "a"), write_run(tmp_path / "b", "CLIP", spread=0.0, acc1=0.3)]
    page = page_of(folders, tmp_path / "new" / "page.html")
    assert page.ids == list(SECTIONS)
    assert_self_contained(page)
    for part in (
        "DistTempNet-v1 vs. CLIP",
        "Unseen renderings",
        "chance",
        "Both are single runs",
        "A full bar is 50 % everywhere",
        "zero-shot top-1 1.0 40.0 30.0 −10.0",
        "mean recall 2.0 50.0 50.0 0.0",
        "How the temperatures of DistTempNet-v1 spread",
        "loss.rho",
        "0123abcd",
        "feed",
        "4.0 min",
        "no checkpoint",
    ):
        assert part in page.text, part
    assert "unfinished" not in page.text
    assert "temperatures of CLIP spread" not in page.text
    assert FORMULA_TAIL in page.text
    assert "▲" not in page.text


FORMULA_TAIL = "+ ρ) <b>"  # shown as text: escaped in the source


def test_what_is_logged_is_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    figures: list[Figure] = []
    monkeypatch.setattr(plots, "svg", lambda figure: figures.append(figure) or "")
    runs = [read_run(write_run(tmp_path / name)) for name in "ab"]
    plots.training_chart(runs, ["A", "B"])
    shown = [axis.get_title(loc="left") for axis in figures[0].axes if axis.get_visible()]
    assert shown == [
        "loss: A", "loss: B", "inner learning rate γ", "learning rate", "gradient norm", "samples per second",
        "waiting for data, % of the time",
    ]  # fmt: skip
    waiting = figures[0].axes[shown.index("waiting for data, % of the time")].lines[0]
    np.testing.assert_allclose(waiting.get_ydata(), 20.0)
    # bounds .005 and .2 of τ at .04: the axis stays, and says them
    plots.temperature_chart(runs, ["A", "B"])
    axis = figures[1].axes[0]
    assert axis.get_ylim()[1] < 0.1
    assert [text.get_text() for text in axis.texts] == ["bounds 0.005 and 0.2"]
    assert sorted(float(line.get_ydata()[0]) for line in axis.lines[-2:]) == [0.005, 0.2]


def test_charts_take_their_colours_from_the_page(tmp_path: Path) -> None:
    chart = plots.training_chart([read_run(write_run(tmp_path / "a"))], ["A"])
    svg = base64.b64decode(chart.partition(",")[2]).decode()
    rules = svg.partition("@media (prefers-color-scheme: dark)")[2].partition("</style>")[0]
    drawn = svg.partition("</style>")[2]
    for name in ("ink", "faint", "axis", "run-0"):
        light, dark = plots.PALETTE[name], plots.DARK_PALETTE[name]
        assert light in drawn, name
        assert any(f'{what}: {light}"]{{{what}:{dark}!important}}' in rules for what in ("fill", "stroke")), name
    assert set(re.findall(r"#[0-9a-f]{6}\b", drawn)) <= set(plots.PALETTE.values())  # none is left light


def test_equal_runs_give_equal_pages(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "a")
    pages = [build_report([folder], tmp_path / name).read_bytes() for name in ("1.html", "2.html")]
    assert pages[0] == pages[1]


def test_unfinished_run_is_described_as_far_as_it_is(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "a", epochs=2, finished=False)
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 21, "epo')  # the process was killed here
    page = page_of([folder], tmp_path / "page.html")
    assert "DistTempNet-v1 is unfinished: it has logged 20 steps, 2.0 of 4 epochs." in page.text


def test_run_that_has_only_begun(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "a", finished=False)
    for name in ("metrics.jsonl", "eval.jsonl"):
        (folder / name).unlink()
    page = page_of([folder], tmp_path / "page.html")
    assert page.ids == list(SECTIONS)
    assert "No evaluation has been made yet." in page.text


def test_examples_and_gallery_by_hand(tmp_path: Path, toy_run: Path) -> None:
    page = page_of([toy_run], tmp_path / "page.html")
    assert_self_contained(page)
    assert "<script" not in page.html
    assert EVIL in page.text
    assert "Right 6 of 7 (85.7 %)" in page.text  # classes: the green image labelled red is wrong
    assert "Wrong 1 of 7 (14.3 %)" in page.text
    assert "Lowest τ, image side" in page.text
    assert "7 pairs, all of the training set" not in page.text  # one of its 8 usable entries is no image
    assert "caption → image" in page.text
    assert "image → caption" in page.text
    assert "at step 40" in page.text


@pytest.mark.parametrize("robust", [True, False])
def test_the_page_says_what_moves_the_temperature(tmp_path: Path, toy_run: Path, robust: bool) -> None:
    examples.open_model(SimpleNamespace()).loss.robust = robust
    page = page_of([toy_run], tmp_path / "page.html")
    assert ("by a fixed amount, ρ nats" in page.text) == robust
    assert ("In a cross-entropy, τ falls" in page.text) == (not robust)
    assert "learns to predict it from the embedding alone" in page.text


def test_training_data_that_is_gone_is_said(tmp_path: Path, toy_run: Path) -> None:
    for shard in (tmp_path / "train").iterdir():
        shard.unlink()
    page = page_of([toy_run], tmp_path / "page.html")
    assert "The training data cannot be read:" in page.text
