"""What is made of an image before the towers see it: what open_clip makes of it."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from disttempnet.data.augment import eval_transform
from disttempnet.data.images import MAX_BYTES, UnreadableImage
from disttempnet.errors import UserError
from disttempnet.evaluation.encoder import checkpoint_hash
from disttempnet.evaluation.tasks import EvaluationSample
from disttempnet.io.files import UnfitFile
from disttempnet.models import Resizing, load_model, save_model
from disttempnet.models.towers import open_clip

# isort: split
from open_clip.transform import PreprocessCfg, image_transform_v2


@pytest.mark.parametrize("mode", ["shortest", "longest", "squash"])
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize("shape", [(37, 90), (90, 37), (20, 11), (48, 48)])
def test_pixels_are_those_of_open_clip(mode: str, interpolation: str, shape: tuple[int, int]) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (*shape, 3), dtype=np.uint8)
    image = Image.fromarray(noise).resize(shape[::-1])
    config = PreprocessCfg(size=32, mean=(0, 0, 0), std=(1, 1, 1), interpolation=interpolation, resize_mode=mode)  # type: ignore[arg-type]
    expected = image_transform_v2(config, is_train=False)(image)
    found = eval_transform(32, Resizing(mode, interpolation))(image)
    assert torch.equal(found, (expected * 255).round().to(torch.uint8))


def test_modes_differ() -> None:
    """Else the comparison above would say nothing of the mode."""
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 70, 3), dtype=np.uint8))
    ways = [Resizing(mode, how) for mode in ("shortest", "longest", "squash") for how in ("bicubic", "bilinear")]
    assert len({eval_transform(16, way)(image).numpy().tobytes() for way in ways}) == len(ways)


def test_an_unknown_mode() -> None:
    with pytest.raises(UserError, match=r"unknown resize_mode 'squahs'\. Did you mean 'squash'"):
        eval_transform(16, Resizing("squahs"))


def test_towers_know_how_their_weights_want_images(tmp_path: Path) -> None:
    """From open_clip's config of the weights, through a saved folder, and in the hash that results are known by."""
    plain = load_model("demo-vit-32")
    assert plain.resizing == Resizing("shortest", "bicubic")
    save_model(replace(plain, resizing=Resizing("squash", "bilinear")), tmp_path, 100.0)
    again = load_model("demo-vit-32", str(tmp_path))
    assert again.resizing == Resizing("squash", "bilinear")
    theirs = open_clip.create_model(f"local-dir:{tmp_path}").visual.preprocess_cfg
    assert (theirs["resize_mode"], theirs["interpolation"]) == ("squash", "bilinear")
    assert checkpoint_hash(again) != checkpoint_hash(replace(again, resizing=Resizing()))


def test_an_image_that_is_no_regular_file_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.jpg")
    for size in (-1, 0):
        with pytest.raises(UnfitFile, match="not a regular file"):
            EvaluationSample("pipe", tmp_path / "pipe.jpg", 0, size, (), "").image()
    with pytest.raises(UnreadableImage, match="over 536,870,912 bytes"):
        EvaluationSample("large", tmp_path / "large.jpg", 0, MAX_BYTES + 1, (), "").image()
