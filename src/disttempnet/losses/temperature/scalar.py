"""Temperatures: where τ of every anchor comes from, and how it is learned.

    Constant      one τ, never changed                               SogCLR, FastCLIP-v1
    Learnable     one τ, a parameter                                 CLIP, FastCLIP-v0, FastCLIP-v3
    PerSample     one τ a training sample and side, in a table       iSogCLR, FastCLIP-v2
    Network       predicted from the anchor's feature                TempNet, DistTempNet     (network.py)

Shapes: b local rows, B global rows, D width, N samples.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from disttempnet import distributed
from disttempnet.losses.objective import ObjectiveContext, as_numbers, as_tensor
from disttempnet.losses.sample_state import SampleState, mean_over_equal_ids


class AnchorBatch(NamedTuple):
    """Detached unit features of this rank [b, D] and of all ranks [B, D] in rank order, all ids [B], and the step."""

    image: Tensor
    text: Tensor
    all_image: Tensor
    all_text: Tensor
    all_ids: Tensor
    step: int

    @property
    def mine(self) -> slice:
        """This rank's rows among all."""
        start = distributed.rank() * len(self.image)
        return slice(start, start + len(self.image))


class Temperature(nn.Module):
    """What the contrastive objectives ask of a temperature.

    Attributes:
        kind: in words, for lists.
        learns: whether τ is learned; the objective then computes its gradient.
        tau_lr: learning rate of an optimizer of its own; 0 = it has no parameters, or they are trained with the
            towers and at their rate.
    """

    kind = ""
    learns = True
    tau_lr = 0.0

    def forward(self, batch: AnchorBatch) -> tuple[Tensor, Tensor]:
        """τ of this rank's image and text anchors, each [b]; differentiable in the parameters."""
        raise NotImplementedError

    def learn(self, ids: Tensor, gradient: Tensor, counted: Tensor) -> None:
        """∂F_i/∂τ_i [2, B] of the global batch, for temperatures that are no parameters.

        counted: bool [B], False for a row that had no negatives and so says nothing.
        """

    def predict(self, image: Tensor, text: Tensor, ids: Tensor | None) -> Tensor | None:
        """τ [2, n] of pairs from unit features [n, D] or sample ids [n]; None where it takes ids and there are none."""
        raise NotImplementedError

    def tracked(self) -> Tensor | None:
        """τ [2, n] of the seen training samples that this rank keeps; None where τ is not kept a sample."""
        return None

    def learning_rate(self, epoch: float) -> float:
        """Of the parameters, where it is their own; 0 = they wait."""
        return self.tau_lr

    @property
    def changes(self) -> bool:
        """Whether `learning_rate` depends on the epoch."""
        return False

    def set_epoch(self, epoch: float) -> None:
        """Called when an epoch begins."""


def check_bounds(tau_min: float, tau_max: float, temperature: float | None = None) -> None:
    """Raise ValueError unless 0 < tau_min < tau_max, with the temperature, where one is given, between them."""
    if not 0 < tau_min < tau_max:
        raise ValueError(f"need 0 < tau_min < tau_max, got tau_min {tau_min} and tau_max {tau_max}")
    if temperature is not None and not tau_min <= temperature <= tau_max:
        raise ValueError(f"temperature {temperature} must lie in [tau_min, tau_max] = [{tau_min}, {tau_max}]")


def check_start(tau: float) -> None:
    """Raise ValueError unless τ is positive."""
    if not tau > 0:
        raise ValueError(f"temperature must be positive, got {tau}")


class ConstantTemperature(Temperature):
    """One τ for every sample and both sides.

    Args:
        context: not needed.
        temperature: τ.
    """

    kind = "constant"
    learns = False

    def __init__(self, context: ObjectiveContext, *, temperature: float = 0.05) -> None:
        super().__init__()
        check_start(temperature)
        self.tau = temperature

    def forward(self, batch: AnchorBatch) -> tuple[Tensor, Tensor]:
        tau = batch.image.new_full((len(batch.image),), self.tau)
        return tau, tau

    def predict(self, image: Tensor, text: Tensor, ids: Tensor | None) -> Tensor:
        return image.new_full((2, len(image)), self.tau)


class LearnableTemperature(Temperature):
    """One τ = exp(−logit_scale), a parameter, brought back into its bounds before every step.

    Args:
        context: not needed.
        temperature: where τ starts.
        tau_min, tau_max: bounds; (.01, 1) are CLIP's logit scale in [1, 100].
        tau_lr: learning rate of an Adam of its own; 0 = trained with the towers, at their rate.
        tau_threshold: tau_lr is a third in epochs that begin with τ below this (FastCLIP-v3, arXiv 2407.01445);
            0 = never.
    """

    kind = "one, learnable"

    def __init__(
        self,
        context: ObjectiveContext,
        *,
        temperature: float = 0.07,
        tau_min: float = 0.01,
        tau_max: float = 1.0,
        tau_lr: float = 0.0,
        tau_threshold: float = 0.0,
    ) -> None:
        super().__init__()
        check_start(temperature)
        check_bounds(tau_min, tau_max)
        if tau_lr < 0 or tau_threshold < 0:
            raise ValueError(f"tau_lr {tau_lr} and tau_threshold {tau_threshold} must not be negative")
        self.logit_scale = nn.Parameter(torch.tensor(-math.log(temperature)))
        self.bounds = (-math.log(tau_max), -math.log(tau_min))
        self.tau_lr, self.tau_threshold = tau_lr, tau_threshold
        self.slowed = temperature < tau_threshold

    def forward(self, batch: AnchorBatch) -> tuple[Tensor, Tensor]:
        if self.training:
            with torch.no_grad():
                self.logit_scale.clamp_(*self.bounds)
        tau = (-self.logit_scale.clamp(*self.bounds).to(batch.image.dtype)).exp().expand(len(batch.image))
        return tau, tau

    @torch.no_grad()
    def predict(self, image: Tensor, text: Tensor, ids: Tensor | None) -> Tensor:
        return (-self.logit_scale.clamp(*self.bounds).to(image.dtype)).exp().expand(2, len(image))

    def set_epoch(self, epoch: float) -> None:
        # once an epoch, not every step as published: reading a number from a GPU would make every step wait
        self.slowed = math.exp(-float(self.logit_scale.detach())) < self.tau_threshold

    def learning_rate(self, epoch: float) -> float:
        return self.tau_lr / 3 if self.slowed else self.tau_lr

    @property
    def changes(self) -> bool:
        return self.tau_lr > 0 and self.tau_threshold > 0

    def get_extra_state(self) -> Tensor:
        return as_tensor(self.slowed)

    def set_extra_state(self, state: Tensor | Mapping[str, float]) -> None:
        (slowed,) = as_numbers(state, "slowed")
        self.slowed = bool(slowed)


TauOptimizer = Literal["momentum", "adam"]
# columns beside τ, and what they start with
_COLUMNS: dict[str, dict[str, float]] = {
    "momentum": {"momentum": 0.0},
    "adam": {"exp_avg": 0.0, "exp_avg_sq": 0.0, "visits": 0.0},
}


class PerSampleTemperature(Temperature):
    """τ_i of every training sample and side, learned from its own gradient each time the sample comes.

    `momentum` (iSogCLR, arXiv 2305.11965): m ← β m + (1 − β) h, τ ← τ − η m.
    `adam` (FastCLIP-v2, arXiv 2407.01445): Adam with the visits of the sample as its step count.
    Both bring τ back into its bounds.

    Args:
        context: gives N.
        temperature: where every τ starts.
        tau_min, tau_max: bounds.
        tau_lr: η.
        tau_optimizer: `momentum` or `adam`.
        tau_beta: β of `momentum`, β1 of `adam`: the share of the past that stays.
        tau_beta2: β2 of `adam`.

    State: τ and what the optimizer keeps, in a table. A row whose gradient is not finite keeps both.
    """

    kind = "per sample"

    def __init__(
        self,
        context: ObjectiveContext,
        *,
        temperature: float = 0.03,
        tau_min: float = 0.01,
        tau_max: float = 1.0,
        tau_lr: float = 0.0133,
        tau_optimizer: TauOptimizer = "adam",
        tau_beta: float = 0.9,
        tau_beta2: float = 0.999,
    ) -> None:
        super().__init__()
        check_bounds(tau_min, tau_max, temperature)
        if tau_optimizer not in _COLUMNS:
            raise ValueError(f"unknown tau_optimizer '{tau_optimizer}'; known: {', '.join(_COLUMNS)}")
        if not (tau_lr > 0 and 0 < tau_beta < 1 and 0 < tau_beta2 < 1):
            raise ValueError(
                f"need tau_lr > 0, tau_beta in (0, 1), tau_beta2 in (0, 1): got {tau_lr}, {tau_beta}, {tau_beta2}"
            )
        self.start, self.tau_min, self.tau_max, self.rate = temperature, tau_min, tau_max, tau_lr
        self.optimizer, self.betas = tau_optimizer, (tau_beta, tau_beta2)
        columns = {"tau": temperature, **_COLUMNS[tau_optimizer]}
        self.state = SampleState(context.num_samples, columns, context.shard_state)
        self._rows: Tensor | None = None  # the table's rows of the batch under way: one all-reduce a step

    def forward(self, batch: AnchorBatch) -> tuple[Tensor, Tensor]:
        if not self.training:
            image, text = self._typical().to(batch.image.dtype).expand(2, len(batch.image))
            return image, text
        self._rows = self.state.read(batch.all_ids).to(batch.image.dtype)
        image, text = self._rows[:2, batch.mine]
        return image, text

    def _typical(self) -> Tensor:
        """The mean of the τ that were learned, over all ranks [2, 1]; where they start before any was.

        It is what pairs outside the training set are evaluated with. The host does not wait for the device.
        """
        seen = self._seen()
        tau = torch.where(seen, self.state.local("tau"), 0.0)
        *total, count = distributed.all_sum(torch.stack([*tau.sum(1, dtype=torch.float64), seen.sum().double()]))
        mean = torch.stack(total) / count.clamp(min=1)
        return torch.where(count > 0, mean, self.start)[:, None]

    @torch.no_grad()
    def learn(self, ids: Tensor, gradient: Tensor, counted: Tensor) -> None:
        assert self._rows is not None, "learn follows forward"
        gradient = mean_over_equal_ids(ids, gradient)
        tau, *moments = self._rows.unflatten(0, (-1, 2))
        if self.optimizer == "momentum":
            beta = self.betas[0]
            moments = [beta * moments[0] + (1 - beta) * gradient]
            step = moments[0]
        else:
            beta1, beta2 = self.betas
            visits = moments[2] + 1
            first = beta1 * moments[0] + (1 - beta1) * gradient
            second = beta2 * moments[1] + (1 - beta2) * gradient.square()
            moments = [first, second, visits]
            step = first / (1 - beta1**visits) / ((second / (1 - beta2**visits)).sqrt() + 1e-8)
        tau = (tau - self.rate * step).clamp(self.tau_min, self.tau_max)
        self.state.write(ids, torch.where(counted, torch.cat([tau, *moments]), self._rows))

    def predict(self, image: Tensor, text: Tensor, ids: Tensor | None) -> Tensor | None:
        return None if ids is None else self.state.read(ids)[:2].to(image.dtype)

    def tracked(self) -> Tensor:
        return self.state.local("tau")[:, self._seen()]

    def _seen(self) -> Tensor:
        last = list(self.state.columns)[-1]  # the momentum, or the number of visits: 0 until a sample is seen
        return (self.state.local(last) != 0).any(0)
