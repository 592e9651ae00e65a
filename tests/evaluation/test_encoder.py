"""Precisions of the encoder, and the hash that features are kept by."""

from __future__ import annotations

import torch

from disttempnet.evaluation.encoder import checkpoint_hash, make_encoder
from tests.evaluation.toy import meaning_towers


def test_precisions() -> None:
    towers, cpu, gpu = meaning_towers(), torch.device("cpu"), torch.device("cuda")

    def dtypes(device: torch.device, name: str, matching: bool) -> tuple[torch.dtype | None, torch.dtype | None]:
        encoder = make_encoder(towers, device, name, matching, 1)
        return encoder.image_dtype, encoder.text_dtype

    half, brain = torch.float16, torch.bfloat16
    assert dtypes(gpu, "fp32", True) == (None, None)
    assert dtypes(gpu, "bf16", False) == (brain, brain)
    assert dtypes(gpu, "datacomp", False) == (None, half), "texts of a classifier in half, images in full precision"
    assert dtypes(gpu, "datacomp", True) == (half, half)
    assert dtypes(cpu, "datacomp", False) == (None, brain), "what torch's autocast means on a CPU"


def test_a_checkpoint_is_known_by_what_features_depend_on() -> None:
    from disttempnet.models import load_model

    torch.manual_seed(0)
    towers = load_model("demo-vit-32")
    before = checkpoint_hash(towers)
    with torch.no_grad():
        towers.module.logit_scale.add_(1)
        assert checkpoint_hash(towers) == before
        next(towers.module.visual.parameters()).flatten()[0] += 1
    assert checkpoint_hash(towers) != before
