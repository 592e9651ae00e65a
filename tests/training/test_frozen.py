"""Frozen towers: nothing in them moves, the temperature does, and the run is a run like any other."""

from __future__ import annotations

from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from disttempnet.config import CONFIG_FOLDER, Config, load_config
from disttempnet.errors import UserError
from disttempnet.models import load_model, save_model
from disttempnet.training.checkpoint import load_run
from disttempnet.training.run_folder import list_checkpoints
from disttempnet.training.trainer import Trainer, train
from tests.gloo import Pools
from tests.training.test_trainer import WORLD_SIZE_TOLERANCE, debug, losses, same_ending

MEAN = (0.5, 0.4, 0.3)  # not the architecture's own: a saved model's folder says how its pixels are normalised


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved model's folder; its weights are random, which freezing does not see."""
    folder = tmp_path_factory.mktemp("pretrained")
    torch.manual_seed(7)
    towers = load_model("demo-vit-32")
    save_model(type(towers)(**{**vars(towers), "mean": MEAN}), folder, logit_scale=10.0)
    return folder


def frozen(out: Path, pretrained: Path, *overrides: str) -> Config:
    given = ["train.freeze=towers", f"model.pretrained={pretrained}", "eval.tasks=[]", *overrides]
    return debug(out, *given)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    loaded = load_file(folder / "open_clip_model.safetensors")
    del loaded["logit_scale"]  # the run's own τ, written at export
    return loaded


@pytest.fixture(scope="module")
def straight(pretrained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("frozen")
    assert train(frozen(out, pretrained, "eval.tasks=['emoji-concepts']", "eval.every_epochs=1"))
    return out / "debug"


def test_towers_stay_bit_equal_and_the_network_moves(straight: Path, pretrained: Path, tmp_path: Path) -> None:
    before, after = weights(pretrained), weights(list_checkpoints(straight)[-1])
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    start = Trainer(frozen(tmp_path, pretrained), torch.device("cpu")).loss.state_dict()
    opened = load_run(straight)
    assert opened.step == 20, "the towers score alike all along: the last checkpoint counts, not the first evaluated"
    end = opened.loss.state_dict()
    for side in ("image", "text"):
        for part in ("weight", "prototypes", "out_weight"):
            key = f"temperature.{side}.{part}"
            assert not torch.equal(start[key], end[key]), key
    assert (straight / "temperatures" / "step-00000020.npz").is_file(), "evaluated as any run"


def test_a_step_records_no_graph_of_the_towers(pretrained: Path, tmp_path: Path) -> None:
    trainer = Trainer(frozen(tmp_path, pretrained), torch.device("cpu"))
    assert not any(module.training for module in trainer.towers.module.modules())
    seen = []
    trainer.loss.register_forward_pre_hook(lambda _, args: seen.extend(part for part in args[0] if part is not None))
    trainer.train_step(next(trainer.data.loader_from(0)))
    assert len(seen) == 4
    assert not any(feature.requires_grad for feature in seen)
    assert all(p.grad is None for p in trainer.towers.module.parameters())
    towers = {id(p) for p in trainer.towers.module.parameters()}
    assert not towers & {id(p) for o in trainer.optimizers for g in o.param_groups for p in g["params"]}
    assert float(trainer._norm) > 0, "the gradient norm is that of the network"


def test_stop_and_resume_is_bit_exact(straight: Path, pretrained: Path, tmp_path: Path) -> None:
    tasks = "eval.tasks=['emoji-concepts']"
    assert train(frozen(tmp_path, pretrained, tasks, "train.stop_after_steps=7"))
    assert train(frozen(tmp_path, pretrained, tasks), resume="auto")
    assert losses(tmp_path / "debug") == losses(straight)
    same_ending(tmp_path / "debug", straight)


def steps_on_this_rank(out: str, pretrained: str, objective: str) -> tuple[list[float], list[torch.Tensor]]:
    """Losses of six steps, and what the objective has learned by then (its table's rows in the order of ids)."""
    trainer = Trainer(frozen(Path(out), Path(pretrained), f"loss={objective}"), torch.device("cpu"))
    found = [trainer.train_step(batch).metrics["loss"].item() for batch in islice(trainer.data.loader_from(0), 6)]
    learned = [p.detach() for p in trainer.loss.parameters()]
    table = getattr(trainer.loss.temperature, "state", trainer.loss.state)
    return found, [*learned, table.read(torch.arange(320))]


@pytest.mark.parametrize("objective", ['{name="disttempnet-v1", rho=2.4, tau_lr=1e-3}', '{name="isogclr", rho=2.4}'])
def test_two_processes_are_one(objective: str, gloo: Pools, pretrained: Path, tmp_path: Path) -> None:
    expected, learned = steps_on_this_rank(str(tmp_path / "1"), str(pretrained), objective)
    ranks = gloo(2, steps_on_this_rank, str(tmp_path / "2"), str(pretrained), objective)
    for found, also in ranks:
        np.testing.assert_allclose(found, expected, rtol=WORLD_SIZE_TOLERANCE)
        for mine, theirs in zip(learned, also, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-4)


def test_a_temperature_a_sample_learns_without_an_optimizer(pretrained: Path, tmp_path: Path) -> None:
    assert train(frozen(tmp_path, pretrained, 'loss={name="isogclr", rho=2.4}', "train.stop_after_steps=12"))
    tau = load_run(tmp_path / "debug").loss.tracked_temperatures()
    assert tau.std() > 0
    assert weights(pretrained).keys() == weights(list_checkpoints(tmp_path / "debug")[-1]).keys()


def test_a_run_folder_gives_its_best_checkpoint(straight: Path, tmp_path: Path) -> None:
    trainer = Trainer(frozen(tmp_path, straight), torch.device("cpu"))
    expected = weights(list_checkpoints(straight)[-1])
    loaded = trainer.towers.module.state_dict()
    assert all(torch.equal(loaded[key], value) for key, value in expected.items())
    assert trainer.towers.mean == MEAN, "normalised as the model it came from"
    assert load_run(straight).towers.mean == MEAN


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["model.pretrained=''"], "needs trained towers: set model.pretrained"),
        (["loss={name='sogclr'}"], "nothing to train: objective sogclr learns no temperature"),
        (["train.freeze=text"], "train.freeze"),
    ],
)
def test_what_cannot_be_trained_is_refused(
    overrides: list[str], message: str, pretrained: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=message):
        train(frozen(tmp_path, pretrained, *overrides))
    assert not (tmp_path / "debug").exists()


def locked(out: Path, pretrained: Path, objective: str, *overrides: str) -> Config:
    given = [f"model.pretrained={pretrained}", "eval.tasks=[]", f"loss={objective}", "data.transform=evaluation"]
    return debug(out, *given, "model.lock_image=true", "model.lock_text=true", *overrides)


@pytest.mark.parametrize("cached", ["train.cache_features=false", "train.cache_features=true"])
def test_locks_that_leave_nothing_to_train_are_refused(cached: str, pretrained: Path, tmp_path: Path) -> None:
    """open_clip's own towers have no head that a lock leaves."""
    message = (
        "model.lock_image and model.lock_text leave nothing to train: objective sogclr learns no temperature; "
        "demo-vit-32 has no head to train: unlock a tower, or take one that does"
    )
    with pytest.raises(UserError, match=message):
        train(locked(tmp_path, pretrained, "{name='sogclr'}", cached))
    assert not (tmp_path / "debug").exists()


def test_a_temperature_is_trained_on_locked_towers(pretrained: Path, tmp_path: Path) -> None:
    trainer = Trainer(locked(tmp_path, pretrained, "{name='clip'}"), torch.device("cpu"))
    start = [p.detach().clone() for p in trainer.loss.parameters()]
    trainer.train_step(next(trainer.data.loader_from(0)))
    assert float(trainer._norm) > 0, "the gradient norm is that of the temperature"
    assert all(not torch.equal(p, before) for p, before in zip(trainer.loss.parameters(), start, strict=True))


def test_a_run_folder_without_checkpoint_is_named(tmp_path: Path) -> None:
    (tmp_path / "empty" / "checkpoints").mkdir(parents=True)
    with pytest.raises(UserError, match="empty: holds no checkpoint"):
        train(frozen(tmp_path, tmp_path / "empty"))


def test_the_shipped_config_asks_for_towers() -> None:
    config = load_config(CONFIG_FOLDER / "tempnet_frozen.toml")
    assert config.train.freeze == "towers"
    assert config.model.pretrained == ""
