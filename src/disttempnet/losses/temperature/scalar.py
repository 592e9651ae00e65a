"""Temperatures without a network: constant, learnable, per sample.

    Constant      one τ, never changed                               SogCLR, FastCLIP-v1
    Learnable     one τ, a parameter                                 CLIP, FastCLIP-v0, FastCLIP-v3
    PerSample     a τ for every training sample and side, in a table iSogCLR, FastCLIP-v2
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
    """Batch that a temperature sees.

    Attributes:
        image, text: detached unit features of this rank [b, D].
        all_image, all_text: those of all ranks in rank order [B, D]; None where they are never gathered.
        all_ids: int64 [B].
        step: training step.
    """

    image: Tensor
    text: Tensor
    all_image: Tensor | None
    all_text: Tensor | None
    all_ids: Tensor
    step: int

    @property
    def local(self) -> slice:
        """This rank's rows of the global batch."""
        start = distributed.rank() * len(self.image)
        return slice(start, start + len(self.image))

    def first(self, count: int) -> tuple[Tensor, Tensor]:
        """Return the first images and texts of the global batch [count, D]; every rank calls this."""
        if self.all_image is not None and self.all_text is not None:
            return self.all_image[:count], self.all_text[:count]
        return distributed.first_rows(self.image, count), distributed.first_rows(self.text, count)


class Temperature(nn.Module):
    """Base class of temperatures: τ of every anchor of a batch.

    Attributes:
        kind: name for lists.
        learns: true where τ is learned; the objective then computes its gradient.
        tau_lr: learning rate of its own parameters; 0 = it has none, or they are trained at the towers' rate.
        reads_all: true where it takes rows of other ranks in every step.
    """

    kind = ""
    learns = True
    tau_lr = 0.0
    reads_all = False

    def forward(self, batch: AnchorBatch) -> tuple[Tensor, Tensor]:
        """Return τ of this rank's image and text anchors, each [b]; differentiable in the parameters."""
        raise NotImplementedError

    def learn(self, ids: Tensor, gradient: Tensor, counted: Tensor, still: bool = False) -> None:
        """Move temperatures that are no parameters along their gradient.

        Args:
            ids: int64 [B], of the global batch.
            gradient: h = ∂F_i/∂τ_i [2, B].
            counted: bool [B], false for rows without negatives, whose τ stays.
            still: move the moments alone.
        """

    def predict(self, image: Tensor, text: Tensor, ids: Tensor | None) -> Tensor | None:
        """Return τ [2, n] of pairs from unit features [n, D] or ids [n]; None where ids are needed and not given."""
        raise NotImplementedError

    def tracked(self) -> Tensor | None:
        """Return τ [2, n] of the visited training samples that this rank holds; None where τ is not per-sample."""
        return None

    def learning_rate(self, epoch: float) -> float:
        """Return the rate of its own parameters in an epoch; 0 = they wait."""
        return self.tau_lr

    @property
    def started(self) -> bool | None:
        """True from when a measure of the batches let its parameters learn, false before; None = there is none."""
        return None

    def observe(self, log_g: Tensor, moment: Tensor, counted: Tensor, epoch: float) -> None:
        """Measure a training step, where the parameters wait for it.

        Args:
            log_g, moment: ℓ and m = Σ_j softmax_ij d_ij / τ of the global batch [2, B].
            counted: bool [B], false for rows without negatives.
            epoch: the current one.
        """

    @property
    def changes(self) -> bool:
        """True where `learning_rate` depends on the epoch."""
        return False

    def set_epoch(self, epoch: float) -> None:
        """Begin an epoch."""


def check_bounds(tau_min: float, tau_max: float, temperature: float | None = None) -> None:
    """Raise ValueError unless 0 < tau_min < tau_max, and tau_min <= temperature <= tau_max where one is given."""
    if not 0 < tau_min < tau_max:
        raise ValueError(f"need 0 < tau_min < tau_max, got tau_min {tau_min} and tau_max {tau_max}")
    if temperature is not None and not tau_min <= temperature <= tau_max:
        raise ValueError(f"temperature {temperature} must lie in [tau_min, tau_max] = [{tau_min}, {tau_max}]")


def check_start(tau: float) -> None:
    """Raise ValueError unless τ is positive."""
    if not tau > 0:
        raise ValueError(f"temperature must be positive, got {tau}")


class ConstantTemperature(Temperature):
    """Constant τ for every sample and both sides (SogCLR, arXiv 2202.12387).

    Args:
        context: not used.
        temperature: τ.

    Example:
        >>> temperature = ConstantTemperature(ObjectiveContext(num_samples=100, embed_dim=4), temperature=0.05)
        >>> temperature.predict(torch.ones(3, 4), torch.ones(3, 4), ids=None)  # [2, n]
        tensor([[0.0500, 0.0500, 0.0500],
                [0.0500, 0.0500, 0.0500]])
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
    """Learnable τ = exp(−logit_scale), one parameter, clamped to its bounds before every step (CLIP, arXiv 2103.00020).

    Args:
        context: not used.
        temperature: τ at the start.
        tau_min, tau_max: bounds; (.01, 1) are CLIP's logit scale in [1, 100].
        tau_lr: learning rate of an Adam of its own; 0 = trained with the towers, at their rate.
        tau_threshold: tau_lr is divided by 3 in epochs that begin with τ below this (FastCLIP-v3, arXiv 2407.01445);
            0 = never.

    Example:
        >>> temperature = LearnableTemperature(ObjectiveContext(num_samples=100, embed_dim=4), temperature=0.07)
        >>> round(1 / temperature.logit_scale.exp().item(), 4)
        0.07
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
        # once an epoch, not every step as published: reading a number from a GPU would make every step wait for it
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
    """Per-sample τ of every training sample and side, moved along its own gradient h at each visit of the sample.

    `momentum` (iSogCLR, arXiv 2305.11965): m ← β m + (1 − β) h, τ ← τ − η m.
    `adam` (FastCLIP-v2, arXiv 2407.01445): Adam with the visits of the sample as its step count.
    Both clamp τ to its bounds.

    Args:
        context: gives N.
        temperature: τ of every sample at the start.
        tau_min, tau_max: bounds.
        tau_lr: η.
        tau_optimizer: `momentum` or `adam`.
        tau_beta: β of `momentum`, β1 of `adam`.
        tau_beta2: β2 of `adam`.

    State: τ and the optimizer's moments, in a table. A row whose gradient is not finite keeps both.

    Example:
        >>> context = ObjectiveContext(num_samples=100, embed_dim=4)
        >>> temperature = PerSampleTemperature(context, temperature=0.03, tau_lr=0.01)
        >>> features, ids = torch.ones(2, 4), torch.tensor([7, 9])
        >>> tau = temperature(AnchorBatch(features, features, features, features, ids, step=0))
        >>> temperature.learn(ids, gradient=torch.ones(2, 2), counted=torch.tensor([True, True]))
        >>> temperature.predict(features, features, ids)  # one step of Adam from .03
        tensor([[0.0200, 0.0200],
                [0.0200, 0.0200]])
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
        self._rows: Tensor | None = None  # the table's rows of the current batch: one all-reduce a step

    def forward(self, batch: AnchorBatch) -> tuple[Tensor, Tensor]:
        if not self.training:
            image, text = self._typical().to(batch.image.dtype).expand(2, len(batch.image))
            return image, text
        self._rows = self.state.read(batch.all_ids, checked=True).to(batch.image.dtype)
        image, text = self._rows[:2, batch.local]
        return image, text

    def _typical(self) -> Tensor:
        """Return the mean of the learned τ over all ranks [2, 1]; the start value before any was learned.

        Pairs outside the training set are evaluated with it. The host does not wait for the device.
        """
        seen = self._seen()
        tau = torch.where(seen, self.state.local("tau"), 0.0)
        *total, count = distributed.all_sum(torch.stack([*tau.sum(1, dtype=torch.float64), seen.sum().double()]))
        mean = torch.stack(total) / count.clamp(min=1)
        return torch.where(count > 0, mean, self.start)[:, None]

    @torch.no_grad()
    def learn(self, ids: Tensor, gradient: Tensor, counted: Tensor, still: bool = False) -> None:
        # rows of the batch before this step: τ [2, B] and the moments, each [2, B]
        assert self._rows is not None, "learn follows forward"
        gradient = mean_over_equal_ids(ids, gradient)
        tau, *moments = self._rows.unflatten(0, (-1, 2))

        # moments and the step of τ [2, B]
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

        # rows without negatives keep their values
        if not still:
            tau = (tau - self.rate * step).clamp(self.tau_min, self.tau_max)
        self.state.write(ids, torch.where(counted, torch.cat([tau, *moments]), self._rows))

    def predict(self, image: Tensor, text: Tensor, ids: Tensor | None) -> Tensor | None:
        return None if ids is None else self.state.read(ids)[:2].to(image.dtype)

    def tracked(self) -> Tensor:
        return self.state.local("tau")[:, self._seen()]

    def _seen(self) -> Tensor:
        last = list(self.state.columns)[-1]  # the momentum, or the number of visits: 0 until a sample is seen
        return (self.state.local(last) != 0).any(0)
