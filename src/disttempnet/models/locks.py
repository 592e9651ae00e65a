"""Locked towers: parameters that are not trained (LiT, arXiv 2111.07991)."""

from __future__ import annotations

import open_clip
from open_clip.hf_model import HFTextEncoder
from open_clip.timm_model import TimmModel
from timm.models import group_parameters
from torch import nn

from disttempnet.config import ModelConfig
from disttempnet.models.batch_norm import prepare_batch_norm


def prepare_towers(module: open_clip.CLIP, config: ModelConfig, chunks: int = 1) -> None:
    """Lock what `[model]` locks, then fix the statistics of every BatchNorm, in place.

    Args:
        module: the towers.
        config: `[model]`.
        chunks: of a batch (train.accumulate).

    Raises:
        UserError: a BatchNorm that cannot be trained this way (see `prepare_batch_norm`).
    """
    lock_towers(module, config)
    prepare_batch_norm(module, config, chunks)


def lock_towers(module: open_clip.CLIP, config: ModelConfig) -> None:
    """Lock what `[model]` locks, in place."""
    if config.lock_image:
        lock_image_tower(module, config.unlocked_image_groups)
    if config.lock_text:
        lock_text_tower(module, config.unlocked_text_layers)


def lock_image_tower(module: open_clip.CLIP, unlocked_groups: int = 0) -> None:
    """Lock the image tower except its last layer groups, as timm and open_clip group them.

    The projection on top of a timm tower is always trained.
    """
    if not isinstance(module.visual, TimmModel):
        module.lock_image_tower(unlocked_groups=unlocked_groups)
        return
    trunk = module.visual.trunk
    groups = group_parameters(trunk, trunk.group_matcher())
    for group in sorted(groups)[: max(0, len(groups) - unlocked_groups)]:
        for name in groups[group]:
            trunk.get_parameter(name).requires_grad_(False)


def lock_text_tower(module: open_clip.CLIP, unlocked_layers: int = 0) -> None:
    """Lock the text tower except its last layers. The projection on a Hugging Face encoder is always trained."""
    text = getattr(module, "text", None)
    if not isinstance(text, HFTextEncoder):
        module.lock_text_tower(unlocked_layers=unlocked_layers)
        return
    text.transformer.requires_grad_(False)
    layers = max((m for m in text.transformer.modules() if isinstance(m, nn.ModuleList)), key=len)
    for layer in list(layers)[max(0, len(layers) - unlocked_layers) :]:
        layer.requires_grad_(True)
