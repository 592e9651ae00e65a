"""The demo's own run, at full length: its temperatures live inside their bounds and apart, and it learns."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from disttempnet.compare.grid import load_grid
from disttempnet.config import CONFIG_FOLDER, Config, load_config
from disttempnet.losses import OBJECTIVES
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
        "disttempnet",
        "dcl",
        "drrho",
        "drrho-learnable",
        "neuclip",
        "nuclr",
        "scent",
        "tuneclip",
    }
