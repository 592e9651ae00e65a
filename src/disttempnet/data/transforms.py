"""Image bytes → uint8 tensors: decoding, and the augmentations that a config names.

Every transform takes an RGB PIL image to a uint8 tensor [3, s, s]; scaling and normalising happen later, on the
device. All randomness comes from torch's default CPU generator, so seeding that decides the augmentation.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

import disttempnet.models  # noqa: F401  first: it makes torchvision importable beside a CPU-only torch
from disttempnet.errors import UserError, unknown_name

# isort: split
from torchvision.transforms import InterpolationMode, v2
from torchvision.transforms.v2 import functional as F

Transform = Callable[[Image.Image], Tensor]
BICUBIC = InterpolationMode.BICUBIC


class UnreadableImage(ValueError):
    """Bytes that are no image, or none that may be decoded; the message says why."""


def decode(data: bytes) -> Image.Image:
    """Image bytes → RGB, transparency on white.

    Raises:
        UnreadableImage: not an image, cut off, or so large that it may be a decompression bomb.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # odd metadata is no concern here
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            image = Image.open(io.BytesIO(data))
            image.load()
            return to_rgb(image)
    except UnidentifiedImageError:
        raise UnreadableImage("cannot identify image") from None
    except MemoryError:  # that is the machine's fault, not the image's
        raise
    except Exception as error:  # decoders raise all kinds on damaged bytes
        raise UnreadableImage(f"cannot decode image: {' '.join(str(error).split()) or repr(error)}") from None


def to_rgb(image: Image.Image) -> Image.Image:
    """RGB from any mode: alpha is laid on white, 16 bits a channel are scaled to 8."""
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode.startswith("I"):
        # PIL clips such values at 255 when it converts them
        return Image.fromarray((np.asarray(image).clip(0, 65535) // 257).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        white = Image.new("RGBA", rgba.size, "white")
        return Image.alpha_composite(white, rgba).convert("RGB")
    return image.convert("RGB")


class SmallRandAugment(torch.nn.Module):
    """Two random operations of ten, each applied with probability ½ at magnitude 7 of 10.

    The choice that image-text pre-training uses: no colour inversion, no posterising, which captions may name.
    Strengths: enhancement 1.36, shear 0.21, shift 7 pixels of 224, rotation 21°; the direction is random. What
    moves into view is grey.
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

    def forward(self, image: Image.Image) -> Image.Image:
        for number in torch.randint(len(self.OPERATIONS), (2,)).tolist():
            apply, sign = torch.rand(2).tolist()
            if apply < 0.5:
                image = self._operate(image, self.OPERATIONS[number], 1.0 if sign < 0.5 else -1.0)
        return image

    def _operate(self, image: Image.Image, name: str, sign: float) -> Image.Image:
        if name == "autocontrast":
            return F.autocontrast(image)
        if name == "equalize":
            return F.equalize(image)
        if name == "brightness":
            return F.adjust_brightness(image, 1.36)
        if name == "sharpness":
            return F.adjust_sharpness(image, 1.36)
        if name == "identity":
            return image
        width, height = image.size
        matrix = {
            "shear_x": (1.0, 0.21 * sign, 0.0, 0.0, 1.0, 0.0),
            "shear_y": (1.0, 0.0, 0.0, 0.21 * sign, 1.0, 0.0),
            "translate_x": (1.0, 0.0, sign * width / 32, 0.0, 1.0, 0.0),
            "translate_y": (1.0, 0.0, 0.0, 0.0, 1.0, sign * height / 32),
        }.get(name)
        grey = (128, 128, 128)
        if matrix is None:
            return image.rotate(21.0 * sign, Image.Resampling.BILINEAR, fillcolor=grey)
        return image.transform(image.size, Image.Transform.AFFINE, matrix, Image.Resampling.BILINEAR, fillcolor=grey)


def train_transform(name: str, image_size: int) -> Transform:
    """The augmentation that a config names, to squares of image_size pixels.

    Raises:
        UserError: unknown name.
    """
    size = (image_size, image_size)
    known: dict[str, list[torch.nn.Module]] = {
        "open_clip": [v2.RandomResizedCrop(size, scale=(0.9, 1.0), interpolation=BICUBIC)],
        "tempnet": [
            v2.RandomResizedCrop(size, scale=(0.5, 1.0), interpolation=BICUBIC),
            v2.RandomHorizontalFlip(),
            SmallRandAugment(),
        ],
        "emoji": [
            v2.RandomResizedCrop(size, scale=(0.6, 1.0), ratio=(0.9, 1.1), interpolation=BICUBIC),
            v2.ColorJitter(brightness=0.2, contrast=0.2, saturation=0.2),
        ],
    }
    if name not in known:
        raise UserError(unknown_name("transform", name, known))
    return torch.nn.Sequential(*known[name], v2.PILToTensor())


def eval_transform(image_size: int) -> Transform:
    """Shortest side to image_size pixels, then the centre: what open_clip evaluates with."""
    return torch.nn.Sequential(
        v2.Resize(image_size, interpolation=BICUBIC), v2.CenterCrop(image_size), v2.PILToTensor()
    )
