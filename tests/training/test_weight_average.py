"""Averaged weights are those of the formula, at any world size and after any stop; training does not feel them."""

from __future__ import annotations

import json
from itertools import islice
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from disttempnet.errors import UserError
from disttempnet.evaluation.evaluator import evaluate
from disttempnet.models import load_model, save_model
from disttempnet.training.checkpoint import TRAINED_NAME, load_run
from disttempnet.training.run_folder import list_checkpoints
from disttempnet.training.trainer import Trainer, train
from tests import parts
from tests.gloo import Pools
from tests.training.test_trainer import CPU, debug, losses, same_ending

import open_clip  # isort: skip (after disttempnet.models)

EMA = ("train.ema=0.5", "eval.tasks=[]")
MODEL = "open_clip_model.safetensors"


def saved(out: Path, name: str = MODEL) -> dict[str, torch.Tensor]:
    return load_file(list_checkpoints(out / "debug")[-1] / name)


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six steps of one process, undisturbed."""
    out = tmp_path_factory.mktemp("straight")
    assert train(debug(out, *EMA, "train.stop_after_steps=6"))
    return out


def test_the_average_is_the_formulas(tmp_path: Path) -> None:
    """In float64, with the first epoch as still statistics: the average begins with the first step that moves."""
    trainer = Trainer(debug(tmp_path, "train.ema=0.25", "train.warm_statistics=1", "eval.tasks=[]"), CPU)
    named = {name: p for name, p in trainer.towers.module.named_parameters() if p.requires_grad}
    expected = {name: p.detach().double() for name, p in named.items()}
    for epoch, steps in ((0, 10), (1, 4)):
        trainer.loss.set_epoch(epoch)
        for batch in islice(trainer.data.loader_from(epoch), steps):
            trainer.train_step(batch)
            if epoch:
                done = trainer.step - 10
                decay = min(0.25, (1 + done) / (10 + done))  # 2/11, 3/12, then 0.25
                expected = {k: decay * v + (1 - decay) * named[k].detach().double() for k, v in expected.items()}
    assert trainer.average is not None
    assert trainer.average.values.keys() == expected.keys()
    for name, value in trainer.average.values.items():
        torch.testing.assert_close(value.double(), expected[name], rtol=1e-5, atol=1e-7)
    assert (trainer.average.values["visual.proj"] - named["visual.proj"]).abs().max() > 1e-4


def test_statistics_of_batch_norm_are_averaged_too(tmp_path: Path) -> None:
    name = parts.write_architecture(tmp_path / "towers")
    parts.write_text_folder(tmp_path / "towers")
    trainer = Trainer(debug(tmp_path, *EMA, f"model.name={json.dumps(name)}"), CPU)
    before = trainer.towers.module.visual.trunk.bn1.running_mean.clone()
    trainer.train_step(next(trainer.data.loader_from(0)))
    assert trainer.average is not None
    now = trainer.towers.module.visual.trunk.bn1.running_mean
    torch.testing.assert_close(trainer.average.values["visual.trunk.bn1.running_mean"], before.lerp(now, 9 / 11))
    assert not torch.equal(now, before)


def test_training_does_not_feel_it_and_goes_on_to_the_bit(straight: Path, tmp_path: Path) -> None:
    assert train(debug(tmp_path / "without", "eval.tasks=[]", "train.stop_after_steps=6"))
    assert losses(tmp_path / "without" / "debug") == losses(straight / "debug")
    trained, average = saved(straight, TRAINED_NAME), saved(straight)
    plain = saved(tmp_path / "without")
    assert all(torch.equal(trained[name], plain[name]) for name in trained)
    assert trained.keys() == average.keys() - {"logit_scale"}
    assert not torch.equal(average["visual.proj"], trained["visual.proj"])

    for stop in (3, 6):
        assert train(debug(tmp_path / "b", *EMA, f"train.stop_after_steps={stop}"), resume="auto")
    assert losses(tmp_path / "b" / "debug") == losses(straight / "debug")
    same_ending(tmp_path / "b" / "debug", straight / "debug")
    assert all(torch.equal(value, trained[name]) for name, value in saved(tmp_path / "b", TRAINED_NAME).items())


def some_steps(out: str, steps: int, *overrides: str) -> None:
    train(debug(Path(out), *EMA, f"train.stop_after_steps={steps}", *overrides), resume="auto")


def test_two_processes_average_alike_sharded_or_not(straight: Path, gloo: Pools, tmp_path: Path) -> None:
    """Each way goes on as the other one, and the last steps are one process's."""
    gloo(2, some_steps, str(tmp_path), 2, "train.shard=true")
    gloo(2, some_steps, str(tmp_path), 3)
    gloo(2, some_steps, str(tmp_path), 5, "train.shard=true")
    some_steps(str(tmp_path), 6)
    for name in (MODEL, TRAINED_NAME):
        expected, found = saved(straight, name), saved(tmp_path, name)
        assert found.keys() == expected.keys()
        for key, value in expected.items():
            torch.testing.assert_close(found[key], value, rtol=1e-3, atol=2e-4, msg=f"{name} {key}")


def test_evaluation_and_export_have_the_average_and_say_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    task = "emoji-concepts"
    assert train(debug(tmp_path, "train.ema=0.5", "train.epochs=1", "eval.every_epochs=1"))
    assert "train.ema = 0.5: evaluation, checkpoints and exports have averaged weights" in capsys.readouterr().err
    run = load_run(tmp_path / "debug")
    folder = list_checkpoints(tmp_path / "debug")[-1]
    assert run.towers.notes == (f"weights '{folder}' are a moving average over training steps (train.ema = 0.5)",)
    assert torch.equal(run.towers.module.visual.proj, saved(tmp_path)["visual.proj"])

    line = json.loads((tmp_path / "debug" / "eval.jsonl").read_text(encoding="utf-8").splitlines()[-1])
    scores = evaluate(run.towers, [task], device=CPU, batch=256)[task]
    assert json.dumps(line).count(f"{scores.metrics['acc1']}") >= 1, "the run's own score is the average's"
    module, _, _ = open_clip.create_model_and_transforms(f"local-dir:{folder}")
    assert torch.equal(module.visual.proj, saved(tmp_path)["visual.proj"])


@pytest.mark.parametrize(
    ("own", "message"),
    [
        (["train.freeze=towers"], "ema averages trained towers: leave it out with freeze"),
        (["model.lock_image=true", "model.lock_text=true"], "train.ema averages the towers' weights, and none of them"),
    ],
)
def test_an_average_of_nothing_is_refused(own: list[str], message: str, tmp_path: Path) -> None:
    save_model(load_model("demo-vit-32"), tmp_path, 10.0)
    with pytest.raises(UserError, match=message):
        Trainer(debug(tmp_path, *EMA, f"model.pretrained={json.dumps(str(tmp_path))}", *own), CPU)
