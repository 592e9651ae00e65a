"""The reference model of a run: live or cached, in chunks, over processes, and what is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from disttempnet.config import CONFIG_FOLDER, Config, load_config
from disttempnet.errors import UserError
from disttempnet.models import encode_images, encode_texts, load_model
from disttempnet.training.checkpoint import load_run
from disttempnet.training.reference import _refuse_other_inputs
from disttempnet.training.run_folder import list_checkpoints
from disttempnet.training.trainer import Trainer, train
from tests.gloo import Pools
from tests.training.test_trainer import losses, same_ending

CPU = torch.device("cpu")
DRRHO = "loss={name='drrho', temperature=0.05, gamma_min=0.3, gamma_decay_epochs=2.0}"


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of ten steps."""
    out = tmp_path_factory.mktemp("teacher")
    assert train(load_config(CONFIG_FOLDER / "debug.toml", [f"out={json.dumps(str(out))}", "train.epochs=1", NO_TASKS]))
    return out / "debug"


NO_TASKS = "eval.tasks=[]"


def referred(out: Path, teacher: Path, *overrides: str) -> Config:
    given = [f"out={json.dumps(str(out))}", DRRHO, "reference.model=demo-vit-32", NO_TASKS]
    given += [f"reference.pretrained={json.dumps(str(teacher))}", "train.seed=5"]
    return load_config(CONFIG_FOLDER / "debug.toml", [*given, *overrides])


def cached(out: Path, teacher: Path, folder: Path, *overrides: str) -> Config:
    where = f"reference.cache_folder={json.dumps(str(folder))}"
    return referred(out, teacher, "reference.cached=true", where, *overrides)


def test_a_live_reference_embeds_the_augmented_batch(teacher: Path, tmp_path: Path) -> None:
    run = Trainer(referred(tmp_path, teacher, "train.accumulate=3"), CPU)
    batch = next(run.data.loader_from(0))
    theirs = load_model("demo-vit-32", str(list_checkpoints(teacher)[-1]))
    theirs.module.eval()
    with torch.no_grad():
        expected = encode_images(theirs, batch.images), encode_texts(theirs, batch.tokens)
    for side, wanted in zip(run._referred(batch), expected, strict=True):
        torch.testing.assert_close(side, wanted, rtol=1e-5, atol=1e-5)
        assert not side.requires_grad


def test_a_cached_reference_reads_the_embeddings_of_its_samples(teacher: Path, tmp_path: Path) -> None:
    """Of the evaluation transform, and the caption that the epoch reads; a second run computes nothing."""
    folder = tmp_path / "features"
    plain = "data.transform=evaluation"
    run = Trainer(cached(tmp_path, teacher, folder, plain), CPU)
    live = Trainer(referred(tmp_path / "live", teacher, plain), CPU)
    for epoch in (0, 1):
        batch = next(run.data.loader_from(epoch))
        for ours, theirs in zip(run._referred(batch, epoch), live._referred(batch, epoch), strict=True):
            torch.testing.assert_close(F.normalize(ours, dim=1), F.normalize(theirs, dim=1), rtol=1e-4, atol=1e-5)
    stores = sorted(path.name.partition("-")[0] for path in folder.iterdir())
    assert stores == ["image", "text"]
    times = {path: path.stat().st_mtime_ns for path in folder.rglob("*.safetensors")}
    Trainer(cached(tmp_path / "again", teacher, folder, plain), CPU)
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*.safetensors")} == times


@pytest.mark.parametrize("is_cached", [False, True])
def test_chunks_and_resuming_change_nothing(teacher: Path, tmp_path: Path, is_cached: bool) -> None:
    """With distillation and a learnable τ: the reference's embeddings are those of the rows in every chunk."""
    objective = "loss={name='drrho-learnable', rho=1.5, tau_lr=1e-3, distillation=1.0}"
    source = [f"reference.cached={str(is_cached).lower()}", objective]
    if is_cached:
        source.append(f"reference.cache_folder={json.dumps(str(tmp_path / 'cache'))}")
    assert train(referred(tmp_path / "a", teacher, *source))
    for stop in (4, 13):
        assert train(referred(tmp_path / "b", teacher, *source, f"train.stop_after_steps={stop}"), resume="auto")
    assert train(referred(tmp_path / "b", teacher, *source), resume="auto")
    assert losses(tmp_path / "a" / "debug") == losses(tmp_path / "b" / "debug")
    same_ending(tmp_path / "a" / "debug", tmp_path / "b" / "debug")
    assert train(referred(tmp_path / "c", teacher, *source, "train.accumulate=4", "train.stop_after_steps=8"))
    whole, chunked = (list(losses(tmp_path / run / "debug").values())[:8] for run in "ac")
    np.testing.assert_allclose(chunked, whole, rtol=2e-4)
    assert load_run(tmp_path / "a" / "debug").step == 20


def train_referred(out: Path, teacher: Path, folder: Path) -> None:
    train(cached(out, teacher, folder, "train.stop_after_steps=6"))
    train(referred(out / "live", teacher, "train.stop_after_steps=6"))


def test_two_processes_train_the_same_curve(gloo: Pools, teacher: Path, tmp_path: Path) -> None:
    train_referred(tmp_path / "one", teacher, tmp_path / "first")
    gloo(2, train_referred, tmp_path / "two", teacher, tmp_path / "second")
    for run in ("debug", "live/debug"):
        alone, together = losses(tmp_path / "one" / run), losses(tmp_path / "two" / run)
        np.testing.assert_allclose(list(together.values()), list(alone.values()), rtol=2e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["reference={}"], r"objective drrho is steered by a reference model: set reference.model"),
        (["loss={name='sogclr'}"], r"reference.model: objective sogclr takes no reference model"),
        (["reference={model='demo-vit-32'}"], r"reference.pretrained: a reference needs weights"),
        (["reference.model=demo-convnext-32"], r"demo-convnext-32|does not fit|missing"),
        (["reference={cached=true}"], r"pretrained and cached are of a reference model: set model too"),
        (["reference.cache_folder=/x"], r"cache_folder is for cached embeddings"),
    ],
)
def test_what_does_not_go_together_is_refused(
    teacher: Path, tmp_path: Path, overrides: list[str], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        Trainer(referred(tmp_path, teacher, *overrides), CPU)


def test_a_live_reference_needs_the_inputs_of_the_towers(teacher: Path, tmp_path: Path) -> None:
    run = Trainer(referred(tmp_path, teacher), CPU)
    other = replace(run.towers, image_size=64)
    with pytest.raises(UserError, match=r"takes images of 64 pixels, the batches have 32: set reference.cached"):
        _refuse_other_inputs(other, run.towers)
    shorter = replace(run.towers, tokenizer=lambda texts: run.towers.tokenizer(texts)[:, :8])
    with pytest.raises(UserError, match=r"has another tokenizer than model\.name"):
        _refuse_other_inputs(shorter, run.towers)


def test_the_error_of_normalisers_is_that_with_the_reference(teacher: Path, tmp_path: Path) -> None:
    assert train(referred(tmp_path, teacher, "eval.normaliser_samples=64", "train.epochs=1"))
    last = json.loads((tmp_path / "debug" / "metrics.jsonl").read_text().splitlines()[-1])
    assert 0 < last["normaliser_error/image_log_rms"] < 3
