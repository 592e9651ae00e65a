"""Place of each parameter in its tower: how many layers lie below and above it."""

from __future__ import annotations

import re
from typing import NamedTuple

import open_clip
from open_clip.hf_model import HFTextEncoder
from open_clip.modified_resnet import ModifiedResNet
from open_clip.timm_model import TimmModel
from timm.models import group_parameters
from torch import nn

# Matchers in timm's form: embeddings come first, then the blocks in order; what no pattern matches is the top.
TRANSFORMER = {
    "stem": r"^(?:conv1|class_embedding|positional_embedding|ln_pre|patchnorm_pre_ln|token_embedding|cls_emb)",
    "blocks": r"^transformer\.resblocks\.(\d+)",
}
RESNET = {"stem": r"^(?:conv|bn)\d", "blocks": r"^layer(\d+)\.(\d+)"}
TEXT_PARTS = ("token_embedding", "positional_embedding", "transformer", "ln_final", "text_projection", "cls_emb")


class Depth(NamedTuple):
    """Layers of a tower `below` (towards the input) and `above` (towards the features); (0, 0) outside of towers."""

    below: int
    above: int


def depths(module: open_clip.CLIP) -> dict[str, Depth]:
    """Return parameter name → its depth.

    Each tower counts its own layers. timm's image towers say themselves what a layer is. In transformers it is a block;
    all embeddings together are the first layer, norm and projection on top are the last.
    """
    found = {name: Depth(0, 0) for name, _ in module.named_parameters()}
    text = [name for name in found if name.startswith("text.")]
    text = text or [name for name in found if name.partition(".")[0] in TEXT_PARTS]
    for tower, prefix, own in (
        (module.visual, "visual.", [name for name in found if name.startswith("visual.")]),
        (getattr(module, "text", module), "text.", text),
    ):
        layers = _layers(tower)
        numbers = {name: layers[name.removeprefix(prefix)] for name in own}
        found |= {name: Depth(number, max(numbers.values()) - number) for name, number in numbers.items()}
    return found


def _layers(tower: nn.Module) -> dict[str, int]:
    """Return parameter name → number of its layer, from 0 at the input."""
    layers: dict[str, int]
    if isinstance(tower, TimmModel):
        layers = group_parameters(tower.trunk, tower.trunk.group_matcher(), reverse=True)
        head = max(layers.values()) + 1
        return {name: layers.get(name.removeprefix("trunk."), head) for name, _ in tower.named_parameters()}
    matcher = RESNET if isinstance(tower, ModifiedResNet) else TRANSFORMER
    if isinstance(tower, HFTextEncoder):
        matcher = _encoder_matcher(tower)
    layers = group_parameters(tower, matcher, reverse=True)
    return layers


def _encoder_matcher(tower: HFTextEncoder) -> dict[str, str]:
    """Return the matcher of a Hugging Face encoder: its longest list of modules holds the blocks."""
    lists = [(name, part) for name, part in tower.named_modules() if isinstance(part, nn.ModuleList)]
    blocks = re.escape(max(lists, key=lambda one: len(one[1]))[0])
    return {"stem": r"^transformer\.(?:\w+\.)*(?:\w*embeddings?|shared)\b", "blocks": rf"^{blocks}\.(\d+)"}
