"""Activation checkpointing keeps the gradient to the bit and far fewer tensors; what cannot do it is refused."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from disttempnet.config import ModelConfig
from disttempnet.errors import UserError
from disttempnet.models import load_model
from disttempnet.models.activations import checkpoint_activations
from disttempnet.models.locks import prepare_towers
from disttempnet.training.trainer import train
from tests import parts
from tests.gloo import Pools
from tests.training.test_trainer import debug, losses

RESNET = {"layers": [1, 1, 1, 1], "width": 8, "image_size": 32, "patch_size": None}
TEXT = {"context_length": 12, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 2}


def gradients(module: nn.Module, tokens: Tensor) -> tuple[dict[str, Tensor], int]:
    """Gradients of a sum of squares, and how many bytes the graph keeps besides parameters."""
    own = {p.data_ptr() for p in module.parameters()}
    kept: dict[int, int] = {}

    def keep(value: Tensor) -> Tensor:
        storage = value.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return value

    module.zero_grad(set_to_none=True)
    images = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(2))
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda value: value):
        total = module.encode_image(images).square().sum() + module.encode_text(tokens).square().sum()
    total.backward()
    return {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}, sum(kept.values())


@pytest.mark.parametrize("kind", ["demo-vit-32", "demo-convnext-32", "timm-and-hf"])
def test_gradients_are_the_same_and_less_is_kept(kind: str, tmp_path: Path) -> None:
    if kind == "timm-and-hf":
        parts.write_text_folder(tmp_path)
        kind = parts.write_architecture(tmp_path, "test_vit")
    torch.manual_seed(1)
    towers = load_model(kind)
    module = towers.module.train()
    tokens = towers.tokenizer(["a red apple sits on the cat", "two dogs"])
    expected, before = gradients(module, tokens)
    checkpoint_activations(module)
    found, after = gradients(module, tokens)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value), name
    assert after < before / 2


def test_locked_layers_are_left_alone() -> None:
    module = load_model("demo-vit-32").module
    module.lock_image_tower()
    checkpoint_activations(module)
    assert not module.visual.transformer.grad_checkpointing
    assert module.transformer.grad_checkpointing


def some_steps(out: str, *overrides: str) -> None:
    train(debug(Path(out), "eval.tasks=[]", "train.stop_after_steps=4", *overrides))


def test_runs_are_the_same_in_chunks_and_sharded(gloo: Pools, tmp_path: Path) -> None:
    """And a run may go on without it."""
    some_steps(str(tmp_path / "plain"))
    own = ["train.checkpoint_activations=true", "train.accumulate=2"]
    some_steps(str(tmp_path / "own"), *own)
    gloo(2, some_steps, str(tmp_path / "shard"), *own, "train.shard=true")
    expected = list(losses(tmp_path / "plain" / "debug").values())
    for way in ("own", "shard"):
        np.testing.assert_allclose(list(losses(tmp_path / way / "debug").values()), expected, rtol=2e-4, err_msg=way)
    assert train(debug(tmp_path / "own", "eval.tasks=[]", "train.stop_after_steps=5"), resume="auto")


def test_what_cannot_recompute_is_refused(tmp_path: Path) -> None:
    config = {"embed_dim": 16, "vision_cfg": RESNET, "text_cfg": TEXT}
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": {}}))
    module = load_model(f"{tmp_path}/open_clip_config.json").module
    with pytest.raises(UserError, match=r"their BatchNorm would count a batch twice: model.batch_norm=frozen"):
        checkpoint_activations(module)
    prepare_towers(module, ModelConfig(name="RN", batch_norm="frozen"))
    with pytest.raises(UserError, match="ModifiedResNet cannot recompute its blocks"):
        checkpoint_activations(module)

    config["vision_cfg"] = {"timm_model_name": "convit_tiny", "timm_proj": "linear", "image_size": 224}
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": {}}))
    with pytest.raises(UserError, match="ConVit cannot recompute its blocks \\(gradient checkpointing not supported"):
        checkpoint_activations(load_model(f"{tmp_path}/open_clip_config.json").module)
    with pytest.raises(UserError, match="checkpoint_activations is for trained towers: leave it out with freeze"):
        debug(tmp_path, "train.freeze=towers", "train.checkpoint_activations=true")
