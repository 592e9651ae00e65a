"""A training step on trimmed captions is that on whole ones: at once, in chunks, on ranks of different lengths."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from disttempnet import distributed
from disttempnet.config import CONFIG_FOLDER, load_config
from disttempnet.data.loader import LENGTH_STEP
from disttempnet.distributed import fsdp
from disttempnet.models import load_model, save_model
from disttempnet.models.text import trimming
from disttempnet.training.trainer import Trainer
from tests.gloo import Pools

CPU = torch.device("cpu")
WORDS = ("red", "green", "cat", "dog", "apple")
ROUNDING = 2e-5  # relative, float32, over three steps of AdamW


class Found(NamedTuple):
    """What three steps left behind: of each its loss, gradient of the towers and length; and the towers' weights."""

    losses: list[float]
    gradients: list[Tensor]
    lengths: list[int]
    weights: Tensor


def steps(out: str, trimmed: bool, *overrides: str) -> Found:
    """Three steps, on rank 1 of longer captions."""
    own = [f"out={json.dumps(out)}", "eval.tasks=[]", *overrides]
    trainer = Trainer(load_config(CONFIG_FOLDER / "debug.toml", own), CPU)
    tokenizer, trim = trainer.towers.tokenizer, trimming(trainer.towers.module)
    assert trim is not None
    parameters = [*trainer.towers.module.parameters(), *trainer.loss.parameters()]
    found = Found([], [], [], torch.empty(0))
    for number, batch in enumerate(islice(trainer.data.loader_from(0), 3)):
        captions = [f"{number} {WORDS[i % 5]} " + "word " * (3 + 8 * distributed.rank()) for i in batch.ids.tolist()]
        tokens = tokenizer(captions)
        batch = replace(batch, tokens=trim(tokens, LENGTH_STEP) if trimmed else tokens)
        found.lengths.append(batch.tokens.shape[1])
        found.losses.append(float(trainer.train_step(batch).metrics["loss"]))
        gradients = [fsdp.full_tensor(p.grad).flatten() for p in parameters if p.grad is not None]
        found.gradients.append(torch.cat(gradients))
    return found._replace(weights=torch.cat([fsdp.full_tensor(p.detach()).flatten() for p in parameters]))


def assert_same(found: Found, expected: Found) -> None:
    torch.testing.assert_close(found.losses, expected.losses, rtol=ROUNDING, atol=0)
    pairs = [*zip(found.gradients, expected.gradients, strict=True), (found.weights, expected.weights)]
    for one, other in pairs:
        assert other.norm() > 0
        assert (one - other).norm() <= ROUNDING * other.norm()


@pytest.mark.parametrize("way", ["train.accumulate=1", "train.accumulate=3", "train.freeze=towers"])
def test_a_step_on_trimmed_captions_is_that_on_whole_ones(way: str, tmp_path: Path) -> None:
    own = [way]
    if "freeze" in way:  # weights that frozen towers could have
        save_model(load_model("demo-vit-32"), tmp_path, logit_scale=10.0)
        own += [f"model.pretrained={json.dumps(str(tmp_path))}"]
    found, expected = (steps(str(tmp_path / str(trimmed)), trimmed, *own) for trimmed in (True, False))
    assert found.lengths == [8, 8, 8]
    assert expected.lengths == [20, 20, 20]
    assert_same(found, expected)


@pytest.mark.parametrize("way", ["train.shard=false", "train.shard=true", "train.accumulate=2"])
def test_ranks_of_different_lengths_train_as_ranks_of_one(way: str, gloo: Pools, tmp_path: Path) -> None:
    """Towers that are shared out too: their positions are cut where they are whole."""
    found, expected = (gloo(2, steps, str(tmp_path / str(trimmed)), trimmed, way) for trimmed in (True, False))
    assert [rank.lengths for rank in found] == [[8, 8, 8], [16, 16, 16]]
    assert [rank.lengths for rank in expected] == [[20, 20, 20]] * 2
    for rank, whole in zip(found, expected, strict=True):
        assert_same(rank, whole)
