"""Drift of the normalisers: a tracked u follows the features that have moved since its sample was visited.

u of a sample that was visited long ago belongs to older features. The normalisers of all samples move together as the
towers learn, so one number a side describes most of that: M, the running mean of log g. The table keeps log u minus
what M has moved so far, and a read adds what it has moved by now. A sample that waited is so shifted with the mean.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from disttempnet.losses.sample_state import NEVER


class Numbers(NamedTuple):
    """M at the first step and now, of image and text side; −inf before the first."""

    image_first: float = NEVER
    text_first: float = NEVER
    image: float = NEVER
    text: float = NEVER


class Drift:
    """Running mean M of log g of each side, and how far it has moved since its first step.

    Args:
        rate: share of M that a step replaces, in (0, 1].

    Example:
        >>> drift = Drift(rate=0.5)
        >>> drift.follow(torch.tensor([[1.0, 3.0], [0.0, 0.0]])).T  # M = 2 and 0: nothing has moved yet
        tensor([[0., 0.]])
        >>> drift.follow(torch.tensor([[4.0, 4.0], [1.0, 1.0]])).T  # M = 3 and .5
        tensor([[1.0000, 0.5000]])
    """

    def __init__(self, rate: float) -> None:
        self.rate = rate
        self._numbers: Numbers | None = Numbers()  # to begin with, as loaded; None: they are in the tensors
        self._first = self._mean = torch.empty(0)

    def follow(self, log_g: Tensor) -> Tensor:
        """Move M towards the mean of log g [2, B] and return how far it has moved since its first step [2, 1].

        Rows that are not finite do not count. The host never waits for the device.
        """
        if self._numbers is not None:
            image_first, text_first, image, text = (log_g.new_full((), number) for number in self._numbers)
            self._first, self._mean = torch.stack([image_first, text_first]), torch.stack([image, text])
            self._numbers = None
        elif self._mean.dtype != log_g.dtype or self._mean.device != log_g.device:
            self._first, self._mean = self._first.to(log_g), self._mean.to(log_g)

        # mean over the rows that count [2]; M starts there, or moves a share of the way
        finite = log_g.isfinite()
        count = finite.sum(1)
        mean = torch.where(finite, log_g, 0.0).sum(1) / count.clamp(min=1)
        begun = self._mean.isfinite()
        moved = torch.where(begun, self._mean + self.rate * (mean - self._mean), mean)
        self._mean = torch.where(count > 0, moved, self._mean)
        self._first = torch.where(begun, self._first, self._mean)
        return torch.where(self._mean.isfinite(), self._mean - self._first, 0.0)[:, None]

    @property
    def moved(self) -> Tensor:
        """Distance of M from its first value [2, 1]. Reading it may wait for the device."""
        first_image, first_text, image, text = self.numbers
        moved = torch.tensor([[image - first_image], [text - first_text]], dtype=torch.float64)
        return torch.where(moved.isfinite(), moved, 0.0)  # −inf before the first

    @property
    def numbers(self) -> Numbers:
        """M at the first step and now, for a saved state."""
        if self._numbers is not None:
            return self._numbers
        return Numbers(*self._first.tolist(), *self._mean.tolist())

    @numbers.setter
    def numbers(self, numbers: Numbers) -> None:
        self._numbers = numbers
