"""Activation checkpointing: blocks of the towers are computed again in the backward pass, in place of being kept."""

from __future__ import annotations

from typing import Any

import open_clip
from open_clip.hf_model import HFTextEncoder
from open_clip.modified_resnet import ModifiedResNet
from open_clip.timm_model import TimmModel
from torch.nn.modules.batchnorm import _BatchNorm

from disttempnet.errors import UserError
from disttempnet.models.batch_norm import GlobalBatchNorm, keeps_statistics


def checkpoint_activations(module: open_clip.CLIP) -> None:
    """Keep only the inputs of blocks for the backward pass, of every tower that is trained, in place.

    Args:
        module: the towers, locked and prepared (models/locks.py).

    Raises:
        UserError: a tower that cannot, or BatchNorm, which would count a batch twice.
    """
    text = getattr(module, "text", None)
    for tower in (module.visual, text if text is not None else module.transformer):
        if any(p.requires_grad for p in tower.parameters()):
            _checkpoint(tower)


def _checkpoint(tower: Any) -> None:
    if any(isinstance(m, (_BatchNorm, GlobalBatchNorm)) and not keeps_statistics(m) for m in tower.modules()):
        raise UserError(
            "train.checkpoint_activations computes blocks twice, and their BatchNorm would count a batch twice: "
            "model.batch_norm=frozen, or leave it out"
        )
    try:
        if isinstance(tower, TimmModel):
            tower.trunk.set_grad_checkpointing(True)  # open_clip's own method hides a refusal
        elif isinstance(tower, HFTextEncoder):
            encoder = tower.transformer
            enable = getattr(encoder, "activation_checkpointing_enable", encoder.gradient_checkpointing_enable)  # v5's
            enable({"use_reentrant": False})
        elif isinstance(tower, ModifiedResNet):
            raise ValueError("open_clip's ResNets have none")
        elif isinstance(tower, open_clip.transformer.Transformer):
            tower.grad_checkpointing = True
        else:
            tower.set_grad_checkpointing(True)
    except (AssertionError, AttributeError, NotImplementedError, ValueError) as error:
        raise UserError(
            f"train.checkpoint_activations: {type(getattr(tower, 'trunk', tower)).__name__} cannot recompute its "
            f"blocks ({error}): leave the key out; train.accumulate saves memory too"
        ) from None
