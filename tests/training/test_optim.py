"""Learning rates by formula, and which parameter is in which group."""

from __future__ import annotations

import itertools
import json
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from disttempnet.cli.main import main
from disttempnet.config import OptimConfig, load_config
from disttempnet.errors import UserNotice
from disttempnet.losses import build_loss
from disttempnet.models import load_model
from disttempnet.training.checkpoint import load_run
from disttempnet.training.optim import build_optimizers, learning_rate, shortened_warmup, temperature_learning_rate
from disttempnet.training.run_folder import list_checkpoints


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
    assert shortened_warmup(config, 41) == config
    assert [shortened_warmup(config, steps).warmup_steps for steps in (40, 16, 9, 1)] == [4, 1, 1, 1]
    assert shortened_warmup(OptimConfig(lr=1.0), 1).warmup_steps == 0


def test_a_small_data_set_is_learned_and_the_warm_up_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "debug", f"out={tmp_path}", "data.limit=64", "train.epochs=2", "eval.tasks=[]"]) == 0
    assert "optim.warmup_steps = 5 would take up the whole run of 4 steps: shortened to 1" in capsys.readouterr().err
    assert rates(tmp_path / "debug") == pytest.approx([1e-3, 1e-3, 0.75e-3, 0.25e-3])
    assert load_config(tmp_path / "debug" / "config.toml").optim.warmup_steps == 5, "as it was asked for"


def rates(run: Path) -> list[float]:
    lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line)["lr"] for line in lines]


@pytest.mark.parametrize("older", [False, True])
def test_a_resumed_run_keeps_the_warm_up_that_it_began_with(older: bool, tmp_path: Path) -> None:
    command = ["train", "debug", f"out={tmp_path}", "data.limit=64", "train.epochs=2", "eval.tasks=[]"]
    command += ["data.workers=0", "train.log_every=1"]
    assert main([*command, "train.stop_after_steps=2"]) == 0
    if older:
        _edit(tmp_path / "debug", lambda trainer: trainer.pop("warmup_steps"))
    assert main([*command, "--resume", "auto"]) == 0
    # 5 steps of warm-up in a run of 4: one step as it began, and all of them as older versions had it
    assert rates(tmp_path / "debug")[2:] == pytest.approx([0.6e-3, 0.8e-3] if older else [0.75e-3, 0.25e-3])


def _edit(run: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Make a checkpoint what an older version would have written."""
    last = list_checkpoints(run)[-1]
    trainer = torch.load(last / "trainer.pt", weights_only=True)
    change(trainer)
    torch.save(trainer, last / "trainer.pt")
    listing = json.loads((last / "files.json").read_text(encoding="utf-8"))
    content = (last / "trainer.pt").read_bytes()
    listing["trainer.pt"] = [len(content), zlib.crc32(content)]
    (last / "files.json").write_text(json.dumps(listing), encoding="utf-8")


@pytest.mark.filterwarnings("always::disttempnet.errors.UserNotice")
def test_a_run_with_values_that_no_new_one_may_have_is_opened_and_goes_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "debug"
    command = ["train", "debug", f"out={tmp_path}", "eval.tasks=[]", "data.workers=0", "train.log_every=1"]
    assert main([*command, "train.stop_after_steps=1"]) == 0

    def of_before(trainer: dict[str, Any]) -> None:
        trainer["config"]["optim"]["lr_end"] = 2e-3
        trainer["config"]["loss"]["rho"] = -1.0

    _edit(run, of_before)
    with pytest.warns(UserNotice, match=r"lr_end 0.002 is above lr 0.001") as told:
        assert load_run(run).loss.rho == -1
    assert any("rho must be a number above 0 and at most 100, got -1.0" in str(one.message) for one in told)

    capsys.readouterr()
    same = ["optim.lr_end=2e-3", "loss.rho=-1.0"]
    command += ["train.stop_after_steps=2", "--resume", "auto"]
    assert main([*command, *same]) == 0
    assert "lr_end 0.002 is above lr 0.001: set optim.lr_end too: kept, as" in capsys.readouterr().err
    assert rates(run) == pytest.approx([0.2e-3, 0.4e-3])
    # what is not that run's own is refused as ever: in it, and in a new one
    for wrong, said in {
        ("train.keep=0", *same): "key 'train.keep': must be a whole number from 1 to",
        ("optim.lr_end=3e-3", "loss.rho=-1.0"): "lr_end 0.003 is above lr 0.001",
        ("optim.lr_end=2e-3", "loss.rho=-2.0"): "rho must be a number above 0 and at most 100, got -2.0",
        ("name=new", *same): "lr_end 0.002 is above lr 0.001",
    }.items():
        assert main([*command, *wrong]) == 2
        assert said in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


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
