"""docs/results*.md: every table is what its command gives, every grid can be run, and its results are all there."""

from __future__ import annotations

import csv
import importlib.util
import json
import re
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from disttempnet.compare.grid import Grid, load_grid
from disttempnet.config import CONFIG_FOLDER, LossConfig, defaults, flat
from disttempnet.config.identity import NO_EFFECT_ON_RESULT
from disttempnet.losses import with_later_arguments
from disttempnet.report.compact import CompactResult, read_results
from disttempnet.report.seeds.comparison import compare_groups
from disttempnet.training.model import resolved

ROOT = Path(__file__).resolve().parents[1]
PAGE, SCRATCH = PAGES = [ROOT / "docs" / "results.md", ROOT / "docs" / "results_scratch.md"]
RESULTS = sorted((ROOT / "docs" / "results").glob("*.jsonl"))
GRIDS = sorted(CONFIG_FOLDER.glob("compare*.toml"))


def tool_of_the_page() -> Any:
    spec = importlib.util.spec_from_file_location("fill_results", ROOT / "tools" / "fill_results.py")
    assert spec is not None
    assert spec.loader is not None
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    return tool


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_table_is_what_its_command_gives(page: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tool = tool_of_the_page()
    assert tool.PAGES == PAGES
    text = page.read_text(encoding="utf-8")
    assert tool.filled(text) == text
    emptied = re.sub(r"(<!-- disttempnet [^\n]* -->\n).*?(<!-- end -->)", r"\1\2", text, flags=re.DOTALL)
    assert emptied != text, "no table was filled"
    assert tool.filled(emptied) == text


def test_every_figure_shows_its_results(tmp_path: Path) -> None:
    """By the words in it: points depend on the version of the drawing library."""
    tool = tool_of_the_page()
    paths = tool.draw(PAGE.read_text(encoding="utf-8"), tmp_path)
    assert paths
    for path in paths:
        drawn, kept = (
            re.findall(r"<text[^>]*>([^<]*)", (folder / path).read_text("utf-8")) for folder in (tmp_path, ROOT)
        )
        assert drawn == kept
        assert f"]({path.relative_to('docs')})" in PAGE.read_text(encoding="utf-8")


def test_the_figure_of_speed_shows_the_benchmarks() -> None:
    spec = importlib.util.spec_from_file_location("draw_speed", ROOT / "tools" / "draw_speed.py")
    assert spec is not None
    assert spec.loader is not None
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    drawn, kept = (
        re.findall(r"<text[^>]*>([^<]*)", svg)
        for svg in (tool.speed_svg(tool.ratios()), (ROOT / tool.OUT).read_text("utf-8"))
    )
    assert drawn == kept, "run tools/draw_speed.py"


def grid_of(results: Path) -> Grid:
    """The grid that makes these results: of the commands in the heads of the shipped grids, the one with their name."""
    for path in GRIDS:
        comment = re.sub(r"(?m)^# ?", "", path.read_text(encoding="utf-8")).replace("\\\n", " ")
        for command in re.findall(rf"disttempnet compare configs/{re.escape(path.name)}(.*)", comment):
            overrides = [word for word in shlex.split(command) if "=" in word]
            grid = load_grid(path, overrides)
            if grid.out.name == results.stem:
                return grid
    raise AssertionError(f"no grid's head has the command that makes {results.name}")


def with_choices(grid: Grid, results: Sequence[CompactResult]) -> Grid:
    """The grid with the settings that its results were trained with, where trials chose them."""
    tuned = {result.name.partition("--seed-")[0]: result.tuned for result in results if result.tuned}
    return grid.chosen(
        {cell.name: tuple(tuned[cell.name].chosen[key] for key in cell.tuned) for cell in grid.cells if cell.tuned}
    )


def what_it_depends_on(config: dict[str, Any]) -> dict[str, Any]:
    """Its keys but for those that the result does not depend on; those that an old config lacks are as in its time."""
    loss = LossConfig(**config["loss"])
    arguments = with_later_arguments(loss.name, loss.arguments, config["data"]["global_batch"])
    if "rho" in arguments:  # of a share of log(B − 1), as some were
        arguments["rho"] = round(arguments["rho"], 4)
    config = {**config, "loss": {"name": loss.name, **arguments}}
    table = {**defaults(), **flat(config)}
    return {
        key: list(value) if isinstance(value, tuple) else value  # as JSON has it
        for key, value in table.items()
        if key not in NO_EFFECT_ON_RESULT
    }


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.stem)
def test_results_are_the_whole_grid_with_its_configs(path: Path) -> None:
    results = {result.name: result for result in read_results([path])}
    grid = with_choices(grid_of(path), list(results.values()))
    expected = {config.name: json.loads(resolved(config).model_dump_json()) for config in grid.configs}
    assert sorted(results) == sorted(expected)
    assert all(result.finished for result in results.values())
    for name, config in expected.items():
        assert what_it_depends_on(results[name].config) == what_it_depends_on(config), name


@pytest.mark.parametrize("path", sorted((ROOT / "docs" / "results" / "tuning").glob("*.jsonl")), ids=lambda p: p.stem)
def test_results_have_the_best_of_all_trials(path: Path) -> None:
    results = {result.name.partition("--seed-")[0]: result for result in read_results([path.parents[1] / path.name])}
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    assert {line["name"] for line in lines} == set(results)
    for line in lines:
        tuned = results[line["name"]].tuned
        assert tuned is not None
        assert tuned.chosen == line["chosen"] == max(line["trials"], key=lambda trial: trial["score"])["setting"]
        assert (tuned.trials, tuned.metric) == (len(line["trials"]), line["metric"])


@pytest.mark.parametrize("path", GRIDS, ids=lambda path: path.stem)
def test_every_shipped_grid_is_valid_and_named_on_the_page(path: Path) -> None:
    assert load_grid(path).cells
    assert f"configs/{path.name}" in "".join(page.read_text(encoding="utf-8") for page in PAGES)


def test_every_objective_is_compared_at_the_best_of_its_three_settings() -> None:
    """The rule in the head of compare-tuning.toml; disttempnet-v1 is a default instead, and `-tuned` is its best."""
    tried: dict[str, list[CompactResult]] = {}
    for result in read_results([ROOT / "docs" / "results" / "compare-tuning.jsonl"]):
        run, letter = result.name.removesuffix("--seed-0").rsplit("-", 1)
        assert letter in "abc"
        tried.setdefault(run, []).append(result)
    assert {len(settings) for settings in tried.values()} == {3}
    for name in ("compare", "compare-scenes"):
        chosen = {
            config.name: resolved(config).loss
            for config in load_grid(CONFIG_FOLDER / f"{name}.toml", ["seeds=[1]"]).configs
        }
        del chosen["disttempnet-v1--seed-1"]
        assert {run.removesuffix("--seed-1").removesuffix("-tuned") for run in chosen} == set(tried)
        for run, loss in chosen.items():
            settings = tried[run.removesuffix("--seed-1").removesuffix("-tuned")]
            best = max(settings, key=lambda r: sum(scores.metrics["mean_recall"] for scores in r.final.values()))
            told = what_it_depends_on(best.config)
            assert {f"loss.{key}": value for key, value in loss.model_dump().items()}.items() <= told.items(), run


def test_the_network_leads_and_shuffling_costs_as_the_page_says() -> None:
    """Differences of means, and in how many of the five seeds they are positive."""
    scores = {
        result.name: result.final["scenes-test"].metrics
        for result in read_results([ROOT / "docs" / "results" / "compare-personal.jsonl"])
    }
    told = {
        "network-shuffled": ((1.5, 5), (0.3, 5)),
        "learned": ((1.3, 5), (0.3, 5)),
        "clip-06": ((1.3, 4), (0.4, 5)),
        "clip-08": ((2.6, 5), (0.5, 4)),
        "mlp": ((3.9, 5), (1.1, 5)),
    }
    for other, expected in told.items():
        for metric, (points, ahead) in zip(("acc1", "mean_recall"), expected, strict=True):
            leads = [
                100 * (scores[f"network--seed-{seed}"][metric] - scores[f"{other}--seed-{seed}"][metric])
                for seed in range(11, 16)
            ]
            assert round(sum(leads) / 5, 1) == points, (other, metric)
            assert sum(lead > 0 for lead in leads) == ahead, (other, metric)


def test_the_intervals_exclude_zero_where_the_page_says() -> None:
    """All of the network's leads but that of top-1 to τ = .06; on the tail the shuffle alone; 4 of 68 to CLIP."""
    columns = [f"scenes-test/{metric}" for metric in ("acc1", "mean_recall", "acc1_tail")]
    found = read_results([ROOT / "docs" / "results" / "compare-personal.jsonl"])
    comparison = compare_groups(found, columns, "network")
    signs = {
        group.run: [one.sign for one in row if one is not None]
        for group, row in zip(comparison.groups, comparison.differences, strict=True)
    }
    assert signs == {
        "clip-06": [0, -1, 0],
        "clip-08": [-1, -1, 0],
        "learned": [-1, -1, 0],
        "mlp": [-1, -1, 0],
        "network": [],
        "network-shuffled": [-1, -1, -1],
    }
    assert "where that excludes zero: 4 of 68 " in SCRATCH.read_text(encoding="utf-8")


def test_the_correlations_of_the_network_are_those_of_the_file_beside_the_page() -> None:
    with (PAGE.parent / "results" / "frequency-personal.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [row["seed"] for row in rows] == ["11", "11", "12", "12", "13", "13"]
    text = " ".join(SCRATCH.read_text("utf-8").split())
    for what in ("frequency", "ambiguity"):
        for side in ("image", "text"):
            found = sorted(float(row[side]) for row in rows if row["with"] == what)
            low, high = (f"{value:.2f}".replace("0.", ".").replace("-", "−") for value in (found[0], found[-1]))
            assert f"{what}, {side} side: {low} to {high}" in text
