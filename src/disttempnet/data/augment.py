"""Image bytes → uint8 tensors: training augmentations by name, and the evaluation transform.

Scaling and normalising happen later, on the device. A training transform takes encoded bytes and a seed. The seed alone
decides the augmentation. The crop is drawn from the header, so that only the crop has to be decoded and resized.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from random import Random

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn

from disttempnet.data.images import SCALES, EncodedImage, decode
from disttempnet.errors import UserError, unknown_name
from disttempnet.models import AS_CLIP, Resizing  # first: it makes torchvision importable beside a CPU-only torch

# isort: split
from open_clip.transform import CenterCropOrPad, ResizeKeepRatio
from torchvision.transforms import InterpolationMode, v2
from torchvision.transforms.v2 import functional as F

TrainTransform = Callable[[bytes, int], Tensor]
EvalTransform = Callable[[Image.Image], Tensor]
Box = tuple[int, int, int, int]  # left, top, right, bottom
BICUBIC = InterpolationMode.BICUBIC
FILL_COLOUR = (128, 128, 128)


class SmallRandAugment:
    """Two random operations of ten, each applied with probability ½ at magnitude 7 of 10.

    The usual choice of image-text pre-training: no colour inversion or posterising, as captions may name colours.
    Strengths: enhancement 1.36, shear 0.21, shift 7 pixels of 224, rotation 21°; the direction is random. Uncovered
    borders are filled with grey.
    """

    OPERATIONS = (
        "identity",
        "autocontrast",
        "equalize",
        "brightness",
        "sharpness",
        "shear_x",
        "shear_y",
        "translate_x",
        "translate_y",
        "rotate",
    )

    def __call__(self, pixels: Tensor, draw: Random) -> Tensor:
        """Augment uint8 [3, h, w]."""
        chosen = []
        for _ in range(2):
            name = self.OPERATIONS[int(draw.random() * len(self.OPERATIONS))]
            apply, sign = draw.random() < 0.5, 1.0 if draw.random() < 0.5 else -1.0
            if apply and name != "identity":
                chosen.append((name, sign))
        if not chosen:
            return pixels
        image = Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy())
        for name, sign in chosen:
            image = self._operate(image, name, sign)
        return torch.from_numpy(np.array(image)).permute(2, 0, 1)

    def _operate(self, image: Image.Image, name: str, sign: float) -> Image.Image:
        if name == "autocontrast":
            return F.autocontrast(image)
        if name == "equalize":
            return F.equalize(image)
        if name == "brightness":
            return F.adjust_brightness(image, 1.36)
        if name == "sharpness":
            return F.adjust_sharpness(image, 1.36)
        if name == "rotate":
            return image.rotate(21.0 * sign, Image.Resampling.BILINEAR, fillcolor=FILL_COLOUR)
        if name.startswith("translate"):  # by whole pixels: a copy, which costs a tenth of a bilinear transform
            shifted = Image.new("RGB", image.size, FILL_COLOUR)
            x, y = (-int(sign) * round(side / 32) for side in image.size)
            shifted.paste(image, (x, 0) if name == "translate_x" else (0, y))
            return shifted
        matrix = (1.0, 0.21 * sign, 0.0, 0.0, 1.0, 0.0) if name == "shear_x" else (1.0, 0.0, 0.0, 0.21 * sign, 1.0, 0.0)
        return image.transform(
            image.size, Image.Transform.AFFINE, matrix, Image.Resampling.BILINEAR, fillcolor=FILL_COLOUR
        )


class CropTransform:
    """Random crop resized to a square, then optionally a flip and SmallRandAugment.

    Resizing is torch's antialiased bicubic on uint8, five times as fast as Pillow's. docs/data.md gives the difference
    in pixels.

    Args:
        image_size: side of the result in pixels.
        scale: the crop's smallest share of the image's area.
        augment: flip and SmallRandAugment.
        draft: decode JPEGs at the smallest scale that still covers the crop.
    """

    def __init__(self, image_size: int, scale: float, augment: bool, draft: bool) -> None:
        self.image_size, self.scale, self.draft = image_size, scale, draft
        self.augment = SmallRandAugment() if augment else None

    def __call__(self, data: bytes, seed: int) -> Tensor:
        """Return uint8 [3, s, s] from encoded bytes. Raises UnreadableImage."""
        draw, image = Random(seed), EncodedImage(data)
        box = random_box(image.width, image.height, self.scale, draw)
        flip = self.augment is not None and draw.random() < 0.5
        pixels = resized_crop(self._decoded(image, box), (image.width, image.height), box, self.image_size)
        if flip:
            pixels = pixels.flip(2)
        return pixels if self.augment is None else self.augment(pixels, draw)

    def _decoded(self, image: EncodedImage, box: Box) -> NDArray[np.uint8]:
        left, top, right, bottom = box
        room = min(right - left, bottom - top) / self.image_size
        return image.pixels(next((scale for scale in SCALES if scale <= room), 1) if self.draft else 1)


def random_box(width: int, height: int, scale: float, draw: Random) -> Box:
    """Draw a crop of scale to 1 of the area and aspect ratio 3:4 to 4:3, as torchvision's RandomResizedCrop does."""
    for _ in range(10):
        area = width * height * (scale + (1 - scale) * draw.random())
        ratio = math.exp((2 * draw.random() - 1) * math.log(4 / 3))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            left, top = int(draw.random() * (width - w + 1)), int(draw.random() * (height - h + 1))
            return left, top, left + w, top + h
    w, h = min(width, round(height * 4 / 3)), min(height, round(width * 4 / 3))
    left, top = (width - w) // 2, (height - h) // 2
    return left, top, left + w, top + h


def resized_crop(pixels: NDArray[np.uint8], size: tuple[int, int], box: Box, image_size: int) -> Tensor:
    """Crop and resize to uint8 [3, image_size, image_size].

    Args:
        pixels: [h, w, 3], perhaps decoded at a reduced scale.
        size: width and height at full scale.
        box: in pixels of the full scale.
        image_size: side of the result.
    """
    if pixels.shape[:2] != size[::-1]:
        across, down = pixels.shape[1] / size[0], pixels.shape[0] / size[1]
        box = (round(box[0] * across), round(box[1] * down), round(box[2] * across), round(box[3] * down))
    left, top, right, bottom = box
    crop = torch.from_numpy(pixels)[top:bottom, left:right].permute(2, 0, 1)
    square = (image_size, image_size)
    return nn.functional.interpolate(crop.unsqueeze(0), square, mode="bicubic", antialias=True).squeeze(0)


class SeededTransform:
    """torchvision transforms of a Pillow image, with torch's default generator seeded for the call."""

    def __init__(self, *steps: nn.Module) -> None:
        self.steps = nn.Sequential(*steps, v2.PILToTensor())

    def __call__(self, data: bytes, seed: int) -> Tensor:
        """Return uint8 [3, s, s] from encoded bytes. Raises UnreadableImage."""
        image = EncodedImage(data).rgb()
        state = torch.default_generator.get_state()  # with no workers this process is the trainer's own
        try:
            torch.default_generator.manual_seed(seed)
            return self.steps(image)
        finally:
            torch.default_generator.set_state(state)


class EvaluationTransform:
    """Evaluation transform of encoded bytes: nothing is random; for `plain` see `images.decode`."""

    def __init__(self, image_size: int, resizing: Resizing, plain: bool = False) -> None:
        self.transform, self.plain = eval_transform(image_size, resizing), plain

    def __call__(self, data: bytes, seed: int) -> Tensor:
        """Return uint8 [3, s, s] from encoded bytes. Raises UnreadableImage."""
        return self.transform(decode(data, self.plain))


def train_transform(name: str, image_size: int, draft: bool = False, resizing: Resizing = AS_CLIP) -> TrainTransform:
    """Return the named augmentation: (encoded bytes, seed) → uint8 [3, image_size, image_size].

    Args:
        name: `open_clip`, `tempnet`, `emoji`, or `evaluation` (no augmentation).
        image_size: side of the square.
        draft: decode JPEGs at the smallest scale that still covers the crop; not with `emoji` and `evaluation`.
        resizing: of the towers, for `evaluation`.

    Raises:
        UserError: unknown name, or draft with `emoji`.
    """
    known: dict[str, Callable[[], TrainTransform]] = {
        "open_clip": lambda: CropTransform(image_size, 0.9, False, draft),
        "tempnet": lambda: CropTransform(image_size, 0.5, True, draft),
        "emoji": lambda: SeededTransform(
            v2.RandomResizedCrop((image_size, image_size), scale=(0.6, 1.0), ratio=(0.9, 1.1), interpolation=BICUBIC),
            v2.ColorJitter(brightness=0.2, contrast=0.2, saturation=0.2),
        ),
        "evaluation": lambda: EvaluationTransform(image_size, resizing),
    }
    if name not in known:
        raise UserError(unknown_name("transform", name, known))
    if draft and name in ("emoji", "evaluation"):
        raise UserError(f"data.draft has no effect with data.transform = '{name}'; leave it out")
    return known[name]()


def eval_transform(image_size: int, resizing: Resizing = AS_CLIP) -> EvalTransform:
    """Return open_clip's evaluation transform: an RGB image → uint8 [3, image_size, image_size].

    Raises:
        UserError: a resize mode that open_clip does not have.
    """
    how = InterpolationMode.BILINEAR if resizing.interpolation == "bilinear" else BICUBIC
    if resizing.mode == "shortest":
        steps = [v2.Resize(image_size, interpolation=how), v2.CenterCrop(image_size)]
    elif resizing.mode == "squash":
        steps = [v2.Resize((image_size, image_size), interpolation=how)]
    elif resizing.mode == "longest":
        steps = [ResizeKeepRatio(image_size, interpolation=how, longest=1), CenterCropOrPad(image_size)]
    else:
        raise UserError(unknown_name("resize_mode", resizing.mode, ("shortest", "longest", "squash")))
    return v2.Compose([*steps, v2.PILToTensor()])
