"""Temperature networks: τ of every anchor predicted from its own feature (TempNet, arXiv 2404.04575).

Shapes: b local rows, B global rows, D width, M prototypes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from disttempnet.losses.objective import ObjectiveContext, as_numbers, as_tensor, exact_arithmetic
from disttempnet.losses.own_parameters import refuse_second_gradient
from disttempnet.losses.temperature.lead import Lead, LeadNumbers
from disttempnet.losses.temperature.scalar import AnchorBatch, Temperature, check_bounds

NetworkForm = Literal["icml24", "dist", "dist-clamped", "mlp"]
TauStart = Literal["epoch", "ahead"]
TAU_STARTS: tuple[str, ...] = ("epoch", "ahead")

KEPT_ROWS = 4096  # of a rank, up to which the networks' activations are kept for the backward pass
CHUNK_ROWS = 256


class NetworkTemperature(Temperature):
    """Temperature networks, one for images and one for texts, trained by their own Adam without weight decay.

    Args:
        context: gives D, and the seed of the initial weights and of the dropout masks.
        network: `icml24` and `dist` are the published forms; `dist-clamped` is `dist` as the first code has it, for its
            checkpoints; `mlp` is a plain one that distinguishes samples better.
        prototypes: M of the published forms; hidden units of the mlp.
        tau_min, tau_max: open bounds of τ.
        tau_initial: τ of every anchor until the mlp learns; 0 = the middle of the bounds. A network keeps it while it
            waits.
        rho: ρ of the robust objective; only the `dist` forms divide by it (in `clip-network` by the default here).
        dropout: share of the hidden (mlp: input) units that are dropped in training.
        feature_scale: factor on the unit features; 0 = √D, which gives entries of unit size. At 1, as published, the
            hidden layer hardly varies between samples, and neither does τ.
        shuffle: ablation: in training every anchor gets the τ of another, random pair of the batch. The drop measures
            what per-sample temperatures are worth.
        tau_lr, tau_lr_decay: learning rate, and the factor on it an epoch after the first.
        tau_start_epoch: the networks wait until then, at rate 0. Before the towers have moved, all similarities are
            alike and the robust objective's best τ is below tau_min; a network that follows it there hardly returns.
        tau_start: `epoch`: they wait for that epoch alone. `ahead`: also until the pairs are ahead of their hard
            negatives (`Lead`), which is safe from step 0 whatever the loop.

    Dropout masks are drawn for the global batch from (seed, step, side) and sliced: a mask belongs to a row of the
    global batch, so that world size changes nothing.

    Example:
        >>> network = NetworkTemperature(ObjectiveContext(num_samples=100, embed_dim=8), network="mlp", tau_max=0.2)
        >>> image, text = torch.randn(3, 8), torch.randn(3, 8)
        >>> tau = network.predict(image, text, ids=None)
        >>> tau.shape, bool(((tau > 0.005) & (tau < 0.2)).all())
        (torch.Size([2, 3]), True)

    Reference:
        To cool or not to cool? Temperature network meets large foundation models via DRO, arXiv 2404.04575.
    """

    kind = "network"

    def __init__(
        self,
        context: ObjectiveContext,
        *,
        network: NetworkForm = "icml24",
        prototypes: int = 256,
        tau_min: float = 0.005,
        tau_max: float = 0.05,
        tau_initial: float = 0.0,
        rho: float = 7.0,
        dropout: float = 0.5,
        feature_scale: float = 1.0,
        shuffle: bool = False,
        tau_lr: float = 3e-5,
        tau_lr_decay: float = 0.9,
        tau_start_epoch: int = 0,
        tau_start: TauStart = "epoch",
    ) -> None:
        super().__init__()
        if network not in NETWORKS:
            raise ValueError(f"unknown network '{network}'; known: {', '.join(NETWORKS)}")
        check_bounds(tau_min, tau_max)
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout must lie in [0, 1), got {dropout}")
        if prototypes < 1:
            raise ValueError(f"prototypes must be positive, got {prototypes}")
        if not (tau_lr > 0 and 0 < tau_lr_decay <= 1):
            raise ValueError(f"need tau_lr > 0 and 0 < tau_lr_decay <= 1, got {tau_lr} and {tau_lr_decay}")
        if feature_scale < 0:
            raise ValueError(f"feature_scale must not be negative, got {feature_scale}")
        self.dropout, self.shuffle, self.seed = dropout, shuffle, context.seed
        self.reads_all = shuffle
        self.width = context.embed_dim
        self.feature_scale = feature_scale or math.sqrt(context.embed_dim)
        if tau_start_epoch < 0:
            raise ValueError(f"tau_start_epoch must not be negative, got {tau_start_epoch}")
        if tau_start not in TAU_STARTS:
            raise ValueError(f"unknown tau_start '{tau_start}'; known: {', '.join(TAU_STARTS)}")
        self.lead = Lead(rho) if tau_start == "ahead" else None
        self.tau_lr, self.tau_lr_decay, self.tau_start_epoch = tau_lr, tau_lr_decay, tau_start_epoch
        generator = torch.Generator().manual_seed(context.seed)
        form = NETWORKS[network]
        self.image, self.text = (
            form(context.embed_dim, prototypes, tau_min, tau_max, rho, generator) for _ in range(2)
        )
        if tau_initial:
            self._start_at(tau_initial)
        self.prototypes_wanted = prototypes if form.starts_from_features else 0
        self.prototypes_started = 0

    def _start_at(self, tau: float) -> None:
        for network in (self.image, self.text):
            if not isinstance(network, MlpNetwork):
                raise ValueError("tau_initial is for network = 'mlp': at 0 the other forms start as published")
            network.start_at(tau)

    def learning_rate(self, epoch: float) -> float:
        if int(epoch) < self.tau_start_epoch:
            return 0.0
        start = max(self.tau_start_epoch, self.lead.epoch if self.lead is not None else 0)
        return self.tau_lr * self.tau_lr_decay ** max(0, int(epoch) - start)

    @property
    def started(self) -> bool | None:
        return None if self.lead is None else self.lead.reached

    def observe(self, log_g: Tensor, moment: Tensor, counted: Tensor, epoch: float) -> None:
        if self.lead is not None and not self.lead.reached:
            self.lead.observe(log_g, moment, counted, epoch)

    @property
    def changes(self) -> bool:
        return self.tau_start_epoch > 0 or self.tau_lr_decay < 1

    def forward(self, batch: AnchorBatch) -> tuple[Tensor, Tensor]:
        """Return τ of the local rows, image side and text side, each [b]; differentiable in the networks only."""
        image, text = batch.image, batch.text
        if self.training:
            self._start_prototypes(batch)
            if self.shuffle:
                others = self._others(batch)
                assert batch.all_image is not None
                assert batch.all_text is not None
                image, text = (side[others].to(image.dtype) for side in (batch.all_image, batch.all_text))
        return (
            self._in_chunks(self.image, image, self._mask(batch, side=0)),
            self._in_chunks(self.text, text, self._mask(batch, side=1)),
        )

    def _in_chunks(self, network: nn.Module, x: Tensor, mask: Tensor | None) -> Tensor:
        """Return τ [b]; of large batches activations live in chunks, and are recomputed in the backward pass."""
        if len(x) <= KEPT_ROWS:
            return self._tau(network, x, mask)
        learned = [p for p in network.parameters() if p.requires_grad]
        tau = _Recomputed.apply(lambda rows, kept: self._tau(network, rows, kept), x, mask, *learned)
        assert isinstance(tau, Tensor)
        return tau

    def _tau(self, network: nn.Module, x: Tensor, mask: Tensor | None) -> Tensor:
        factors = None if mask is None else mask.to(x.dtype) / (1 - self.dropout)
        tau: Tensor = network(self._scaled(x), factors)
        return tau

    def _scaled(self, x: Tensor) -> Tensor:
        if x.shape[1] != self.width:
            raise ValueError(f"features are {x.shape[1]} wide, the loss was built with embed_dim = {self.width}")
        return x * self.feature_scale

    @torch.no_grad()
    def predict(self, image: Tensor, text: Tensor, ids: Tensor | None) -> Tensor:
        """Return τ [2, n] of features [n, D], without dropout."""
        return torch.stack([self.image(self._scaled(image), None), self.text(self._scaled(text), None)])

    def _mask(self, batch: AnchorBatch, side: int) -> Tensor | None:
        """Return the units of the local rows that dropout keeps, bool [b, D]; None without dropout."""
        if not self.training or self.dropout == 0:
            return None
        seed = (self.seed * 1_000_003 + batch.step * 2 + side) % (1 << 62)
        generator = torch.Generator(batch.image.device).manual_seed(seed)
        kept = torch.empty(batch.image.shape, dtype=torch.bool, device=batch.image.device)
        own, size, width = batch.local, len(batch.all_ids), batch.image.shape[1]
        for top in range(0, size, CHUNK_ROWS):
            # numbers of all rows are drawn, and those of this rank used: float32, the same mask at every precision
            end = min(top + CHUNK_ROWS, size)
            drawn = torch.rand(end - top, width, generator=generator, device=kept.device)
            first, last = max(top, own.start), min(end, own.stop)
            if first < last:
                torch.ge(drawn[first - top : last - top], self.dropout, out=kept[first - own.start : last - own.start])
        return kept

    def _others(self, batch: AnchorBatch) -> Tensor:
        """Return the rows of the global batch that replace this rank's under `shuffle`: a random permutation."""
        device = batch.image.device
        seed = (self.seed * 1_000_003 + batch.step) % (1 << 62) + (1 << 62)  # another stream than the masks'
        generator = torch.Generator(device).manual_seed(seed)
        return torch.randperm(len(batch.all_ids), generator=generator, device=device)[batch.local]

    @torch.no_grad()
    def _start_prototypes(self, batch: AnchorBatch) -> None:
        """Fill prototypes with the first features of the other modality: they represent an anchor's negatives.

        The first min(M, B) come from the first global batch, the rest from the following ones: M and B are
        independent, and the rows are the same at every world size. A row that is not finite keeps its random start.
        """
        start = self.prototypes_started
        count = min(self.prototypes_wanted - start, len(batch.all_ids))
        if count == 0:
            return
        images, texts = batch.first(count)
        for network, first in ((self.image, texts), (self.text, images)):
            rows = network.get_parameter("prototypes")[start : start + count]
            rows.copy_(torch.where(first.isfinite().all(1, keepdim=True), first.to(rows.dtype), rows))
        self.prototypes_started = start + count

    def get_extra_state(self) -> Tensor:
        lead = self.lead.numbers if self.lead is not None else ()
        return as_tensor(self.prototypes_started, *lead)

    def set_extra_state(self, state: Tensor | Mapping[str, float]) -> None:
        if self.lead is None:
            (started,) = as_numbers(state, "prototypes_started")
        else:  # a state that was saved without begins to measure
            started, *lead = as_numbers(state, "prototypes_started", later=LeadNumbers()._asdict())
            self.lead.numbers = LeadNumbers(*lead)
        self.prototypes_started = round(started)


class _Recomputed(torch.autograd.Function):
    """tau(x, mask) in chunks of rows, whose activations are recomputed in the backward pass.

    torch.utils.checkpoint takes 3 to 15 % more time here, and recomputes outside of `exact_arithmetic`.
    """

    @staticmethod
    def forward(ctx: Any, tau: Callable[..., Tensor], x: Tensor, mask: Tensor | None, *parameters: Tensor) -> Tensor:
        ctx.tau = tau
        ctx.save_for_backward(x, mask, *parameters)
        return torch.cat([tau(*chunk) for chunk in _chunks(x, mask)])

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        refuse_second_gradient()
        x, mask, *parameters = ctx.saved_tensors
        total = [torch.zeros_like(p) for p in parameters]
        with exact_arithmetic(x.device), torch.enable_grad():
            for chunk, given in zip(_chunks(x, mask), upstream.split(CHUNK_ROWS), strict=True):
                for sum_, gradient in zip(total, torch.autograd.grad(ctx.tau(*chunk), parameters, given), strict=True):
                    sum_ += gradient
        return (None, None, None, *total)


def _chunks(x: Tensor, mask: Tensor | None) -> list[tuple[Tensor, Tensor | None]]:
    rows = x.split(CHUNK_ROWS)
    return list(zip(rows, [None] * len(rows) if mask is None else mask.split(CHUNK_ROWS), strict=True))


class _BoundedNetwork(nn.Module):
    """Network of one modality: features [b, D] → τ [b] in (τ_min, τ_max)."""

    starts_from_features = False

    def __init__(self, tau_min: float, tau_max: float) -> None:
        super().__init__()
        self.tau_min, self.tau_max = tau_min, tau_max

    def bounded(self, o: Tensor) -> Tensor:
        """Map o smoothly onto (τ_min, τ_max); a hard clamp would stop the gradient of the whole network."""
        return (self.tau_max - self.tau_min) * o.sigmoid() + self.tau_min


class _PrototypeNetwork(_BoundedNetwork):
    """Part of both published forms: f = dropout(σ(Linear(x))), q = f · normalize(P)ᵀ, w = softmax(q / e^scaler)."""

    starts_from_features = True

    def __init__(
        self, embed_dim: int, prototypes: int, tau_min: float, tau_max: float, rho: float, generator: torch.Generator
    ) -> None:
        super().__init__(tau_min, tau_max)
        self.rho = rho
        bound = 1 / math.sqrt(embed_dim)  # torch's initialisation of a Linear, drawn from the given generator
        self.weight = nn.Parameter(torch.empty(embed_dim, embed_dim).uniform_(-bound, bound, generator=generator))
        self.bias = nn.Parameter(torch.empty(embed_dim).uniform_(-bound, bound, generator=generator))
        self.prototypes = nn.Parameter(torch.randn(prototypes, embed_dim, generator=generator))
        self.scaler = nn.Parameter(torch.tensor(math.log(0.01)))

    def attend(self, x: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return (w, σ(q)), each [b, M], of x [b, D]; in x's dtype, so that float64 stays float64."""
        dtype = x.dtype
        hidden = F.linear(x, self.weight.to(dtype), self.bias.to(dtype)).sigmoid()
        if mask is not None:
            hidden = hidden * mask
        q = hidden @ F.normalize(self.prototypes.to(dtype), dim=1).T
        return torch.softmax(q / self.scaler.to(dtype).exp(), dim=1), q.sigmoid()


class IcmlNetwork(_PrototypeNetwork):
    """Published form (arXiv 2404.04575, section 4): τ = (τ_max − τ_min) σ(v·((w − 1/M) ⊙ σ(q)) + c) + τ_min."""

    def __init__(
        self, embed_dim: int, prototypes: int, tau_min: float, tau_max: float, rho: float, generator: torch.Generator
    ) -> None:
        super().__init__(embed_dim, prototypes, tau_min, tau_max, rho, generator)
        self.out_weight = nn.Parameter(torch.ones(prototypes))
        self.out_bias = nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        w, s = self.attend(x, mask)
        o = ((w - 1 / w.shape[1]) * s) @ self.out_weight.to(x.dtype) + self.out_bias.to(x.dtype)
        return self.bounded(o)


class DistNetwork(_PrototypeNetwork):
    """Form of the first multi-node code: τ = (Linear_1(w ⊙ σ(q)) − Linear_2(σ(q) / M)) / ρ.

    That code clamped τ at .001, without an upper bound. Here the value passes through a sigmoid of slope 1 in the
    middle of (τ_min, τ_max): nearly the same inside, and the gradient never vanishes.
    """

    starts_from_features = False

    def __init__(
        self, embed_dim: int, prototypes: int, tau_min: float, tau_max: float, rho: float, generator: torch.Generator
    ) -> None:
        if not rho:
            raise ValueError("network dist divides by rho: use a number other than 0")
        super().__init__(embed_dim, prototypes, tau_min, tau_max, rho, generator)
        self.out_weight_1 = nn.Parameter(torch.ones(prototypes))
        self.out_weight_2 = nn.Parameter(torch.ones(prototypes))

    def raw(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """Return τ [b] without bounds."""
        w, s = self.attend(x, mask)
        first, second = (w * s) @ self.out_weight_1.to(x.dtype), s @ self.out_weight_2.to(x.dtype) / w.shape[1]
        return (first - second) / self.rho

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        middle, width = (self.tau_max + self.tau_min) / 2, self.tau_max - self.tau_min
        return self.bounded(4 * (self.raw(x, mask) - middle) / width)


class ClampedDistNetwork(DistNetwork):
    """The first multi-node code's network to the letter: Linear_1 has a bias, and τ is clamped at τ_min alone.

    At the clamp its gradient is 0, and there is no upper bound: for checkpoints of that code, not for new runs.
    """

    def __init__(
        self, embed_dim: int, prototypes: int, tau_min: float, tau_max: float, rho: float, generator: torch.Generator
    ) -> None:
        super().__init__(embed_dim, prototypes, tau_min, tau_max, rho, generator)
        self.out_bias = nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        return (self.raw(x, mask) + self.out_bias.to(x.dtype) / self.rho).clamp(min=self.tau_min)


class MlpNetwork(_BoundedNetwork):
    """Two layers: o = v · gelu(W x + a) + c. v starts at 0: every τ starts alike, in the middle of its range."""

    def __init__(
        self, embed_dim: int, hidden: int, tau_min: float, tau_max: float, rho: float, generator: torch.Generator
    ) -> None:
        super().__init__(tau_min, tau_max)
        self.weight = nn.Parameter(torch.randn(hidden, embed_dim, generator=generator) / math.sqrt(embed_dim))
        self.bias = nn.Parameter(torch.zeros(hidden))
        self.out_weight = nn.Parameter(torch.zeros(hidden))
        self.out_bias = nn.Parameter(torch.zeros(()))

    @torch.no_grad()
    def start_at(self, tau: float) -> None:
        """Give every anchor this τ, until the network learns.

        Raises:
            ValueError: τ is not inside the bounds.
        """
        if not self.tau_min < tau < self.tau_max:
            raise ValueError(
                f"tau_initial = {tau} must lie between tau_min = {self.tau_min} and tau_max = {self.tau_max}; "
                "0 = their middle"
            )
        share = (tau - self.tau_min) / (self.tau_max - self.tau_min)
        self.out_bias.fill_(math.log(share / (1 - share)))

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        hidden = F.gelu(F.linear(x if mask is None else x * mask, self.weight.to(x.dtype), self.bias.to(x.dtype)))
        return self.bounded(hidden @ self.out_weight.to(x.dtype) + self.out_bias.to(x.dtype))


NETWORKS: dict[str, type[_PrototypeNetwork] | type[MlpNetwork]] = {
    "icml24": IcmlNetwork,
    "dist": DistNetwork,
    "dist-clamped": ClampedDistNetwork,
    "mlp": MlpNetwork,
}
