"""Learning rates by formula, and which parameter is in which group."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest

from disttempnet.cli.main import main
from disttempnet.config import OptimConfig, load_config
from disttempnet.losses import build_loss
from disttempnet.models import load_model
from disttempnet.training.optim import build_optimizers, learning_rate, temperature_learning_rate, within


def test_warm_up_then_cosine() -> None:
    config = OptimConfig(lr=1.0, warmup_steps=4, lr_end=0.2)
    rates = [learning_rate(config, step, 24) for step in range(25)]
    assert rates[:4] == [0.25, 0.5, 0.75, 1.0]
    assert rates[4] == 1.0
    assert rates[14] == pytest.approx(0.6)
    assert rates[24] == pytest.approx(0.2)
    assert all(a >= b for a, b in itertools.pairwise(rates[4:]))


def test_a_warm_up_that_fills_the_run_is_a_tenth_of_it() -> None:
    config = OptimConfig(lr=1.0, warmup_steps=40)
    assert within(config, 41) == config
    assert [within(config, steps).warmup_steps for steps in (40, 16, 9, 1)] == [4, 1, 1, 1]
    assert within(OptimConfig(lr=1.0), 1).warmup_steps == 0


def test_a_small_data_set_is_learned_and_the_warm_up_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "debug", f"out={tmp_path}", "data.limit=64", "train.epochs=2", "eval.tasks=[]"]) == 0
    assert "optim.warmup_steps = 5 would take up the whole run of 4 steps: shortened to 1" in capsys.readouterr().err
    lines = (tmp_path / "debug" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    rates = [json.loads(line)["lr"] for line in lines]
    assert rates == pytest.approx([1e-3, 1e-3, 0.75e-3, 0.25e-3])
    assert load_config(tmp_path / "debug" / "config.toml").optim.warmup_steps == 5, "as it was asked for"


def test_the_temperature_decays_by_epoch_after_the_same_warm_up() -> None:
    config = OptimConfig(lr=1.0, warmup_steps=2)
    network = build_loss("disttempnet", num_samples=9, embed_dim=8, tau_lr=3e-5, tau_lr_decay=0.9).temperature
    assert temperature_learning_rate(config, 0, network.learning_rate(0)) == pytest.approx(1.5e-5)
    assert temperature_learning_rate(config, 9, network.learning_rate(2)) == pytest.approx(3e-5 * 0.81)


def test_every_trained_parameter_is_in_one_group() -> None:
    towers = load_model("demo-vit-32").module
    towers.logit_scale.requires_grad_(False)
    for name in ("clip", "sogclr", "isogclr", "fastclip-v0", "fastclip-v3", "disttempnet-v1"):
        loss = build_loss(name, num_samples=9, embed_dim=64)
        optimizers = build_optimizers(towers, loss, OptimConfig(lr=1e-3, weight_decay=0.3))
        seen = [id(p) for o in optimizers for g in o.param_groups for p in g["params"]]
        wanted = [id(p) for m in (towers, loss) for p in m.parameters() if p.requires_grad]
        assert sorted(seen) == sorted(wanted)
        decayed = {id(p) for o in optimizers for g in o.param_groups if g["weight_decay"] for p in g["params"]}
        assert all(p.ndim >= 2 for p in towers.parameters() if id(p) in decayed)
        assert not decayed & {id(p) for p in loss.parameters()}
        assert len(optimizers) == (2 if name in ("disttempnet-v1", "fastclip-v3") else 1)
