"""The grid of a comparison: which runs it makes, under which names, and mistakes in its file."""

from __future__ import annotations

from pathlib import Path

import pytest

from disttempnet.compare.grid import load_grid
from disttempnet.config import CONFIG_FOLDER, load_config
from disttempnet.errors import UserError
from disttempnet.losses import OBJECTIVES
from disttempnet.training.model import resolved
from tests.compare.grids import GRID, write


def test_the_shipped_grid_is_valid_and_the_first_seed_comes_first() -> None:
    grid = load_grid(CONFIG_FOLDER / "compare.toml", ["vary.data.global_batch=[32,64]"])
    names = [config.name for config in grid.configs]
    assert names[0] == "clip--global_batch-32--seed-1"
    each = len(names) // 3
    assert [name.rpartition("-")[2] for name in names] == ["1"] * each + ["2"] * each + ["3"] * each
    assert each == 2 * len({name.partition("--")[0] for name in names})
    assert {config.data.global_batch for config in grid.configs if "global_batch-64" in config.name} == {64}
    assert grid.configs[-1].train.seed == 3


def test_the_baseline_is_the_first_run_or_the_named_one(tmp_path: Path) -> None:
    path = write(tmp_path, GRID + '[runs."long run"]\noptim.lr = 5e-4\n')
    assert load_grid(path).baseline == "clip"
    assert load_grid(path, ["baseline=v1"]).baseline == "v1"
    grid = load_grid(path, ["baseline=long run"])
    assert grid.baseline == "long-run"
    assert any(config.name.startswith(f"{grid.baseline}--") for config in grid.configs)
    with pytest.raises(UserError, match=r"grid.toml: unknown baseline 'clop'. Did you mean 'clip'\?"):
        load_grid(path, ["baseline=clop"])


def test_a_run_lays_its_keys_over_the_base_and_replaces_its_loss(tmp_path: Path) -> None:
    path = write(
        tmp_path, GRID + '[runs.slow]\noptim.lr = 5e-4\nloss.name = "sogclr"\n[vary]\n"loss.temperature" = [0.1]'
    )
    with pytest.raises(UserError, match=r"grid.toml: v1--temperature-0.1--seed-1: .*unknown argument .*'temperature'"):
        load_grid(path)
    path = write(tmp_path, GRID + '[runs.slow]\noptim.lr = 5e-4\nloss.name = "sogclr"\n')
    configs = {config.name: config for config in load_grid(path, ["optim.grad_clip=2", "seeds=[7]"]).configs}
    assert list(configs) == ["clip--seed-7", "v1--seed-7", "slow--seed-7"]
    slow = configs["slow--seed-7"]
    assert (slow.optim.lr, slow.optim.grad_clip, slow.optim.warmup_steps) == (5e-4, 2, 5)
    # nothing of debug.toml's rho
    assert slow.loss.model_dump() == {"name": "sogclr"}
    assert slow.data.limit == 64


def test_no_loss_key_is_lost(tmp_path: Path) -> None:
    """debug.toml's loss is disttempnet-v1 with its own arguments."""
    base = load_config(CONFIG_FOLDER / "debug.toml").loss.arguments
    text = 'config = "debug.toml"\nseeds = [1]\n[common]\nloss.tau_max = 0.3\nloss.tau_min = 0.02\n'
    text += '[runs]\na.loss = { name = "disttempnet-v1", rho = 1.5, tau_min = 0.01 }\nb.loss.rho = 2.5\n'
    arguments = [resolved(config).loss.arguments for config in load_grid(write(tmp_path, text)).configs]
    defaults = OBJECTIVES["disttempnet-v1"].arguments
    assert arguments[0] == defaults | {"tau_max": 0.3, "tau_min": 0.01, "rho": 1.5}
    assert arguments[1] == defaults | base | {"tau_max": 0.3, "tau_min": 0.02, "rho": 2.5}
    grid = load_grid(write(tmp_path, text), ["vary={loss.tau_max=[0.4, 0.5], optim.lr=[1e-3]}"])
    assert [config.loss.arguments["tau_max"] for config in grid.configs] == [0.4, 0.4, 0.5, 0.5]
    with pytest.raises(UserError, match=r"c--seed-1: .*unknown argument .*'tau_max'"):
        load_grid(write(tmp_path, text + 'c.loss = { name = "clip-constant" }\n'))
    alone = load_grid(write(tmp_path, 'config = "debug.toml"\nseeds = [1]\n[common]\nloss.name = "clip"\n[runs.x]'))
    assert alone.configs[0].loss.model_dump() == {"name": "clip"}


def test_values_in_names(tmp_path: Path) -> None:
    text = 'config = "debug.toml"\nseeds = [1]\n[runs]\na.loss = { name = "siglip" }\n'
    vary = 'vary={loss.bias=[-5.0, 2], eval.tasks=[["emoji-concepts"]]}'
    names = [config.name for config in load_grid(write(tmp_path, text), [vary]).configs]
    assert names == ["a--bias--5.0--tasks-emoji-concepts--seed-1", "a--bias-2--tasks-emoji-concepts--seed-1"]


def test_keys_that_vary_together(tmp_path: Path) -> None:
    text = 'config = "debug.toml"\nseeds = [1]\n[runs]\na.loss = { name = "siglip" }\n[vary]\nloss.bias = [-5.0, 2]\n'
    text += "together = [{ data.global_batch = 32, train.epochs = 2 }, { train.epochs = 4, data.global_batch = 64 }]\n"
    found = {
        config.name: (config.loss.arguments["bias"], config.data.global_batch, config.train.epochs)
        for config in load_grid(write(tmp_path, text)).configs
    }
    assert found == {
        "a--bias--5.0--global_batch-32--epochs-2--seed-1": (-5.0, 32, 2),
        "a--bias--5.0--global_batch-64--epochs-4--seed-1": (-5.0, 64, 4),
        "a--bias-2--global_batch-32--epochs-2--seed-1": (2, 32, 2),
        "a--bias-2--global_batch-64--epochs-4--seed-1": (2, 64, 4),
    }


def test_a_varied_key_is_overridden_in_vary_alone(tmp_path: Path) -> None:
    """Runs are named after its values; `--epochs-77` with one epoch would be a lie."""
    steps = CONFIG_FOLDER / "compare-steps-emoji.toml"
    for override in ("train.epochs=1", "train={epochs=1}"):
        with pytest.raises(UserError, match=r"^command line: 'train.epochs' is varied: override vary.together instead"):
            load_grid(steps, [override])
    for cell in load_grid(steps, ["train.keep=3", "vary.together=[{train.epochs=1, data.global_batch=8}]"]).cells:
        assert cell.name.endswith("--epochs-1--global_batch-8")
        assert cell.table["train"]["keep"] == 3
    path = write(tmp_path, GRID + "[vary]\noptim.lr = [1e-3]\n")
    with pytest.raises(UserError, match=r"'optim.lr' is varied: override vary.optim.lr instead, or leave optim.lr out"):
        load_grid(path, ["optim.lr=2e-3"])
    found = load_grid(path, ["vary.optim.lr=[2e-3]"])
    assert {config.optim.lr for config in found.configs} == {2e-3}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (GRID.replace("seeds", "seed"), r"grid.toml: unknown key 'seed'. Did you mean 'seeds'"),
        (GRID.replace("[1, 2]", "[1, 1]"), r"seeds holds a number twice"),
        (GRID.replace("[1, 2]", "[]"), r"grid.toml: key 'seeds'"),
        (GRID.replace("debug.toml", "nope.toml"), r"config: .*nope.toml: no such file"),
        (GRID.replace("data.limit", "data.limt"), r"clip--seed-1: unknown key 'data.limt'. Did you mean 'data.limit'"),
        (GRID.replace("rho", "roh"), r"v1--seed-1: \[loss\] .*'roh'. Did you mean 'rho'"),
        (GRID.replace('"clip" }', '"clap" }'), r"clip--seed-1: .*unknown objective 'clap'. Did you mean 'clip'"),
        (GRID.replace("emoji-concepts", "emoji-concept"), r"clip--seed-1: .*Did you mean 'emoji-concepts'"),
        (GRID.replace("data.limit", "train.seed"), r"common: 'train.seed' cannot be set there; it comes from seeds"),
        (GRID + "[vary]\ntrain.epochs = 3", r"vary: 'train.epochs' is not a list"),
        (GRID + "[vary]\ntogether = 3", r"vary: 'together' is not a list of tables"),
        (GRID + "[vary]\ntogether = [{train.seed = 3}]", r"vary.together: 'train.seed' cannot be set there"),
        (GRID + "[vary]\ntogether = [{train.epochs = 3}, {optim.lr = 1.0}]", r"its tables have different keys"),
        (GRID + "[vary]\noptim.lr = [1.0]\ntogether = [{optim.lr = 1.0}]", r"'optim.lr' is varied alone and in"),
        (GRID + '[runs."v 2"]\n[runs."v-2"]', r"two runs have the name"),
        ("config = 'debug.toml'\nseeds = [1]", r"grid.toml: key 'runs' is missing"),
    ],
)
def test_mistakes_are_named_before_anything_is_trained(text: str, message: str, tmp_path: Path) -> None:
    path = write(tmp_path, text)
    with pytest.raises(UserError, match=message) as caught:
        load_grid(path)
    assert "\n" not in str(caught.value)
    assert [p.name for p in tmp_path.iterdir()] == ["grid.toml"]
