"""Compact results: the same tables as from run folders."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from disttempnet.report import write_report
from disttempnet.report.compact import read_results, write_compact
from disttempnet.report.seeds.comparison import compare_groups
from disttempnet.report.seeds.page import comparison_page
from disttempnet.report.seeds.tables import markdown_table
from tests.report.pages import Page
from tests.report.seeds.seeds import runs
from tests.report.synthetic import write_run


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
