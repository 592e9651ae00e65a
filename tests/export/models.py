"""A small CLIP with weights that are not near zero, so that activations and softmaxes bend."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from disttempnet.models import Towers, load_model

ARCHITECTURE: dict[str, Any] = {
    "embed_dim": 24,
    "vision_cfg": {"image_size": 32, "patch_size": 8, "width": 32, "layers": 2, "head_width": 8, "mlp_ratio": 2.3},
    "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 48, "heads": 4, "layers": 3},
}


def architecture(**changes: Any) -> dict[str, Any]:
    """`ARCHITECTURE` with keys changed: `vision_cfg__pool_type="avg"`."""
    table = json.loads(json.dumps(ARCHITECTURE))
    for key, value in changes.items():
        *sections, name = key.split("__")
        place = table
        for section in sections:
            place = place[section]
        place[name] = value
    return table


def small_towers(folder: Path, preprocess: dict[str, Any] | None = None, **changes: Any) -> Towers:
    """Towers of `architecture(**changes)` with wide random weights."""
    folder.mkdir(parents=True, exist_ok=True)
    config = {"model_cfg": architecture(**changes), "preprocess_cfg": preprocess or {}}
    (folder / "small.json").write_text(json.dumps(config))
    towers = load_model(str(folder / "small.json"))
    generator = torch.Generator().manual_seed(7)
    for parameter in towers.module.parameters():
        if parameter.ndim:
            torch.nn.init.normal_(parameter.data, std=0.2, generator=generator)
    towers.module.eval()
    return towers
