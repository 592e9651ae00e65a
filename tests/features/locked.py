"""Runs with locked towers: a small timm ResNet and a small DistilBERT, or open_clip's own ViT, frozen as a whole."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from disttempnet.config import CONFIG_FOLDER, Config, load_config
from disttempnet.training.run_folder import list_checkpoints
from tests import parts

RANDOM_HEADS = 5  # seed of torch, so that two runs begin with the same heads
CACHED = "train.cache_features=true"


@dataclass(frozen=True)
class Towers:
    """Files of towers, and where features are cached."""

    folder: Path
    name: str
    image: Path
    text: Path

    @property
    def cache(self) -> Path:
        return self.folder / "features"

    def config(self, out: Path, *overrides: str) -> Config:
        """The debug run with both towers locked, on the evaluation transform."""
        own = {
            "out": str(out),
            "model.name": self.name,
            "model.image_pretrained": str(self.image),
            "model.text_pretrained": str(self.text),
            "data.transform": "evaluation",
        }
        if CACHED in overrides:
            own["train.cache_folder"] = str(self.cache)
        given = [f"{key}={json.dumps(value)}" for key, value in own.items()]
        locks = ["model.lock_image=true", "model.lock_text=true", "eval.tasks=[]"]
        return load_config(CONFIG_FOLDER / "debug.toml", [*given, *locks, *overrides])


def write_towers(folder: Path) -> Towers:
    return Towers(
        folder,
        parts.write_architecture(folder / "architecture"),
        parts.write_image_weights(folder / "resnet.safetensors"),
        parts.write_text_folder(folder / "distilbert"),
    )


def final_weights(run: Path) -> dict[str, Tensor]:
    """The towers of a run's last checkpoint."""
    return load_file(list_checkpoints(run)[-1] / "open_clip_model.safetensors")


def same_weights(first: Path, second: Path) -> bool:
    one, other = final_weights(first), final_weights(second)
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)
