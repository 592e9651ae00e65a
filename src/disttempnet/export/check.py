"""Check of an export: inputs that towers and their export are run on, and the largest difference between features."""

from __future__ import annotations

import torch
from torch import Tensor

from disttempnet.errors import UserError
from disttempnet.models import Towers, encode_images, encode_texts

TOLERANCE = 1e-4  # of unit features in float32
CAPTIONS = (
    "a red apple",
    "Two dogs on a beach, in the sun.",
    "it's 7 o'clock",
    "a photo of a small zebra that stands behind a tree and looks at something far away on the other side of the river",
)


def sample_pixels(towers: Towers, count: int = len(CAPTIONS)) -> Tensor:
    """Return random uint8 images of the towers' size [count, 3, s, s], the same at every call."""
    shape = (count, 3, towers.image_size, towers.image_size)
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def expected_features(towers: Towers) -> tuple[Tensor, Tensor]:
    """Return the towers' own unit features of `sample_pixels` and `CAPTIONS`, each [n, D], in float32 on the CPU."""
    with torch.inference_mode():
        texts = encode_texts(towers, towers.tokenizer(list(CAPTIONS)))
        return encode_images(towers, sample_pixels(towers)), texts


def largest_difference(what: str, expected: Tensor, found: Tensor) -> float:
    """Return the largest absolute difference between two [n, D].

    Raises:
        UserError: it is more than `TOLERANCE`, or no number.
    """
    if expected.shape != found.shape:
        raise UserError(f"{what}: features of shape {list(found.shape)}, not {list(expected.shape)}; nothing is kept")
    difference = float((expected.double() - found.double()).abs().max())
    if not difference <= TOLERANCE:
        raise UserError(
            f"{what}: its features differ by {difference:.2g} from those of the towers (at most {TOLERANCE:g}); "
            "nothing is kept"
        )
    return difference
