"""Lead of the pairs over their hard negatives: the measure that tells when a temperature network may start.

While all similarities are alike, the best τ of the robust objective lies below any bound, and a network that follows it
there hardly returns. It may start once the pairs are ahead of the negatives that the objective will look at.

With Gaussian d_ij / τ of an anchor's negatives j, of mean μ and variance σ², the statistics of the batch are
KL(softmax ‖ uniform) = σ²/2 and m = Σ_j softmax_ij d_ij / τ = μ + σ². At the best τ, where KL = ρ, the softmax lies
around μ + √(2ρ) σ: about the hardest share e^−ρ of the negatives. A pair is ahead of those where

    m − 2 KL + 2 √(ρ KL) ≤ 0

which does not depend on τ.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from disttempnet.losses.sample_state import NEVER

SMOOTHING = 0.95  # share of the running means of m and KL that a step keeps
FIRST_STEPS = 20  # that are measured at least


class LeadNumbers(NamedTuple):
    """State of a `Lead`.

    Attributes:
        reached, epoch: as of `Lead`.
        ahead: the decision of the last step, which the next one reads.
        steps: that were measured.
        moment, divergence: running means of m and KL; −inf before the first.
    """

    reached: float = 0.0
    epoch: float = 0.0
    ahead: float = 0.0
    steps: float = 0.0
    moment: float = NEVER
    divergence: float = NEVER


class Lead:
    """Running means of m and KL over the global batch and both sides, until the pairs are ahead of hard negatives.

    The decision is read one step after it was made: the device has it by then, and the host does not wait.

    Args:
        rho: ρ of the robust objective.

    Attributes:
        reached: true from the step after the rule first held, for good.
        epoch: in which it was reached; 0 before.
    """

    def __init__(self, rho: float) -> None:
        self.rho = rho
        self.reached = False
        self.epoch = 0
        self.steps = 0
        self._means = torch.full((2,), NEVER)  # of m and KL
        self._ahead: Tensor | None = None  # 0-d bool on the CPU, of the previous step
        self._copied: torch.cuda.Event | None = None  # when it is there

    def observe(self, log_g: Tensor, moment: Tensor, counted: Tensor, epoch: float) -> None:
        """Read the decision of the step before, and measure this one.

        Args:
            log_g, moment: ℓ and m of the global batch [2, B].
            counted: bool [B], false for rows without negatives.
            epoch: the current one.
        """
        self._read()
        if self.reached:
            self.epoch = int(epoch)
            return

        # means over the rows that count, 0-d each; running means [2]
        divergence = moment - log_g
        finite = counted & divergence.isfinite() & moment.isfinite()
        count = finite.sum()
        totals = [torch.where(finite, part, 0.0).sum() for part in (moment, divergence)]
        means = torch.stack(totals) / count.clamp(min=1)
        old = self._means.to(means)
        new = torch.where(old.isfinite(), SMOOTHING * old + (1 - SMOOTHING) * means, means)
        self._means = torch.where(count > 0, new, old)
        self.steps += 1

        # the decision, on its way to the host
        if self.steps >= FIRST_STEPS:
            mean, spread = self._means[0], self._means[1].clamp(min=0)
            begun = self._means[0].isfinite()
            self._send(begun & (mean - 2 * spread + 2 * (self.rho * spread).sqrt() <= 0))

    def _send(self, ahead: Tensor) -> None:
        self._ahead = ahead.to("cpu", non_blocking=True)
        if ahead.is_cuda:
            self._copied = torch.cuda.Event()
            self._copied.record()

    def _read(self) -> None:
        if self._copied is not None:
            self._copied.synchronize()
        if self._ahead is not None:
            self.reached = bool(self._ahead)
        self._ahead = self._copied = None

    @property
    def numbers(self) -> LeadNumbers:
        """The state to save. Reading it waits for the device."""
        if self._copied is not None:
            self._copied.synchronize()
        ahead = self._ahead is not None and bool(self._ahead)
        return LeadNumbers(float(self.reached), self.epoch, float(ahead), self.steps, *self._means.tolist())

    @numbers.setter
    def numbers(self, numbers: LeadNumbers) -> None:
        self.reached, self.epoch, self.steps = bool(numbers.reached), round(numbers.epoch), round(numbers.steps)
        self._means = torch.tensor([numbers.moment, numbers.divergence], dtype=torch.float64)
        self._ahead, self._copied = torch.tensor(bool(numbers.ahead)), None
