"""A world of solid colours in which zero-shot evaluation can be done by hand; needs torch alone.

A text means the sum of the colours that it names, an image its mean colour, and both towers answer with that as it is.
So the similarity of an image and a text is the cosine of two small vectors: red and yellow, (1, 0, 0) and (1, 1, 0),
are at .707.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import torch
from torch import Tensor, nn

COLOURS = {
    "red": (255, 0, 0),
    "green": (0, 255, 0),
    "blue": (0, 0, 255),
    "yellow": (255, 255, 0),
    "pink": (255, 120, 120),
    "grey": (128, 128, 128),
}


def meaning(text: str) -> tuple[int, int, int]:
    """The sum of the colours that a text names, as often as it names them; dark grey where it names none."""
    named = [COLOURS[word] for word in re.findall(rf"\b({'|'.join(COLOURS)})\b", text.lower())] or [(1, 1, 1)]
    return tuple(sum(channel) for channel in zip(*named, strict=True))  # type: ignore[return-value]


def shown(text: str) -> tuple[int, int, int]:
    """The brightest RGB colour in the direction of a text's meaning, for an image of it."""
    total = meaning(text)
    return tuple(round(255 * channel / max(total)) for channel in total)  # type: ignore[return-value]


def tokenize_meaning(texts: str | Sequence[str]) -> Tensor:
    """Texts → int64 [n, 3]."""
    return torch.tensor([meaning(text) for text in ([texts] if isinstance(texts, str) else texts)], dtype=torch.int64)


class MeaningTowers(nn.Module):
    """Pixels or tokens → their colour, of unit norm if asked for."""

    def encode_image(self, pixels: Tensor, normalize: bool = False) -> Tensor:
        return self._answer(pixels.mean((2, 3)), normalize)

    def encode_text(self, tokens: Tensor, normalize: bool = False) -> Tensor:
        return self._answer(tokens.float() / 255, normalize)

    @staticmethod
    def _answer(colour: Tensor, normalize: bool) -> Tensor:
        return nn.functional.normalize(colour, dim=-1) if normalize else colour
