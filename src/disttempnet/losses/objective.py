"""What every objective shares: its output, exact arithmetic, and a value that carries a closed-form gradient."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from disttempnet import distributed
from disttempnet.losses.own_parameters import Learner, refuse_second_gradient
from disttempnet.losses.sample_state import SampleState

SampleIds = Tensor | np.ndarray | Sequence[int]  # whole numbers of any width, on any device
INTEGER_DTYPES = (
    torch.int64, torch.int32, torch.int16, torch.int8, torch.uint64, torch.uint32, torch.uint16, torch.uint8,
)  # fmt: skip


class Features(NamedTuple):
    """This rank's rows of a global batch of pairs, all [b, D]; make one with `of` or `unit`.

    Attributes:
        image, text: unit rows, which the contrastive objectives compare.
        image_embedding, text_embedding: the same rows before normalising, which VICReg compares.
    """

    image: Tensor
    text: Tensor
    image_embedding: Tensor
    text_embedding: Tensor

    @classmethod
    def of(cls, image_embedding: Tensor, text_embedding: Tensor) -> Features:
        """Features of what the towers give, of any norm; half precision is normalised in float32."""
        image, text = (side.to(compute_dtype(side)) for side in (image_embedding, text_embedding))
        return cls(F.normalize(image, dim=-1), F.normalize(text, dim=-1), image_embedding, text_embedding)

    @classmethod
    def unit(cls, image: Tensor, text: Tensor) -> Features:
        """Features of rows that have norm 1 already; nothing is normalised again."""
        return cls(image, text, image, text)


class ObjectiveContext(NamedTuple):
    """What a run gives to every objective: N samples (ids lie in [0, N)), feature width D, the run's seed, and whether
    each rank holds the per-sample state of the samples that it owns alone."""

    num_samples: int
    embed_dim: int
    seed: int = 0
    shard_state: bool = False


class LossOutput(NamedTuple):
    """`total`: 0-d, its backward is this rank's share of the gradient; `metrics`: detached 0-d tensors."""

    total: Tensor
    metrics: dict[str, Tensor]


class Objective(Learner):
    """What training, evaluation and reports ask of an objective.

    Attributes:
        arguments: what it was built with, in words; equal on all ranks.
        steps_per_epoch: training steps after which an epoch is over; 0 = `set_epoch` tells.
    """

    arguments = ""
    steps_per_epoch = 0
    step = 0  # of training so far, where the objective counts them
    epoch = 0.0
    _is_accelerate_prepared = False
    _told: tuple[float, ...] | None = None  # what this rank has told the others in the step before
    _told_tensor: Tensor  # the same, on the features' device
    _agreed = False  # the ranks have found that they hold the same objective
    _loaded = False  # a state, since then

    def set_epoch(self, epoch: float) -> None:
        """Called at the start of every epoch; objectives with schedules override it."""

    def forward(self, features: Features, ids: SampleIds | None = None) -> LossOutput:
        """This rank's rows and their sample ids → loss and metrics; see `checked` for what is refused.

        In evaluation (`eval()`) nothing is borrowed from training samples: normalisers are the batch's own, a τ kept a
        sample is the mean of those that were learned, and ids are only compared with each other (None: all differ).
        """
        raise NotImplementedError

    def checked(self, features: Features, ids: SampleIds | None) -> Tensor:
        """The ids as int64 [b] on the features' device, once this rank's rows are a batch and fit those of the others.

        Raises:
            ValueError: no batch of pairs, no rows, no ids where they are needed; or another rank has other rows, has
                refused its own, or holds another objective. Every rank raises.
            IndexError: an id outside the data set.
        """
        trouble = result = None
        try:
            result = self._checked_alone(features, ids)
        except (ValueError, IndexError) as error:  # said below, when the other ranks know
            trouble = error
        unsettled = False
        if distributed.world_size() > 1:
            unsettled = self._check_step(-1 if trouble else len(features.image), features.image.device)
        if result is None:
            raise trouble or AssertionError
        if unsettled:
            self._check_equal_on_all_ranks()
        return result

    def _checked_alone(self, features: Features, ids: SampleIds | None) -> Tensor:
        image, text = features.image, features.text
        if image.ndim != 2 or image.shape != text.shape:
            raise ValueError(f"features must both be [b, D], got {tuple(image.shape)} and {tuple(text.shape)}")
        if not len(image):
            raise ValueError("a batch of 0 rows has no loss: leave it out, on every rank")
        tables = [module for module in self.modules() if isinstance(module, SampleState)]
        homes = [held.device for held in (*self.parameters(), *self.buffers())] + [table.device for table in tables]
        if homes and homes[0] != image.device:
            raise ValueError(f"the loss is on {homes[0]}, the features are on {image.device}: move it with loss.to()")
        if ids is not None:
            given = int64_ids(ids, len(image))
        elif self.training and tables:
            raise ValueError(f"ids are needed in training: the numbers of the samples, int64 [{len(image)}]")
        else:
            start = distributed.rank() * len(image)
            given = torch.arange(start, start + len(image), device=image.device)
        if self.training:
            for table in tables:
                table.check_ids(given)
        return given.to(image.device, non_blocking=True)

    def _check_step(self, rows: int, device: torch.device) -> bool:
        """Raise ValueError unless every rank has as many rows and is in the same epoch; -1 is what a rank gives that
        has refused its own. Returns whether the ranks have to compare their objectives: all of them do, or none.

        On a GPU the answer is looked at only by ranks whose numbers have changed: it would cost a synchronisation a
        step. There the ranks with other numbers than before end with this message, and the launcher ends the others.
        """
        mine = (float(rows), self.epoch, float(not self._agreed))
        changed = mine != self._told
        if changed or self._told_tensor.device != device:
            self._told, self._told_tensor = mine, torch.tensor([mine], dtype=torch.float64, device=device)
        gathered = distributed.all_gather(self._told_tensor)
        if device.type != "cpu" and not changed and self._agreed:
            return False
        counts, epochs, unsettled = gathered.T.tolist()
        refused = [rank for rank, count in enumerate(counts) if count < 0]
        if refused and rows >= 0:
            raise ValueError(f"rank {refused[0]} has refused its batch: its own message says why")
        if refused:
            return False
        if len(set(counts)) > 1:
            raise ValueError(
                f"every rank needs as many rows, got {_listed(counts)} of ranks 0 to {len(counts) - 1}: drop "
                "the last batch of an epoch, or let the sampler fill it up"
            )
        if any(unsettled) and not all(unsettled) and device.type != "cpu":  # the others do not look, and would not come
            rank = unsettled.index(0)
            raise ValueError(f"rank {rank} has not loaded the state that rank {unsettled.index(1)} has: load it on all")
        if not any(unsettled) and len(set(epochs)) > 1:
            raise ValueError(
                f"the ranks are in epochs {_listed(epochs)}: call set_epoch with the same number on every rank"
            )
        return any(unsettled)

    def _check_equal_on_all_ranks(self) -> None:
        """Raise ValueError unless all ranks have built the same objective, loaded the same state and are as far."""
        tables = {name: module for name, module in self.named_modules() if isinstance(module, SampleState)}
        inside = tuple(f"{name}." for name in tables)
        parameters = dict(self.named_parameters())
        rest = {k: v for k, v in self.state_dict().items() if k not in parameters and not k.startswith(inside)}
        own = {
            "arguments": self.arguments,
            "parameters": _checksum(parameters.values()),
            # a sharded state cannot be compared: all ranks have loaded one, or none
            "per-sample state": [self._loaded if table.sharded else table.checksum() for table in tables.values()],
            "step or epoch": [self.step, self.epoch],
            "running state": _checksum(rest.values()),
        }
        held = distributed.gather_objects(own)
        for what, mine in held[0].items():
            others = [rank for rank, theirs in enumerate(held) if theirs[what] != mine]
            if others:
                raise ValueError(
                    f"the loss of rank {others[0]} has other {what} than that of rank 0: build it with the same "
                    "arguments and the same seed on every rank, and load the same state"
                )
        self._agreed, self._loaded = True, False

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._agreed, self._loaded = False, True  # the next step compares

    def temperatures(self, image: Tensor, text: Tensor, ids: SampleIds | None = None) -> Tensor | None:
        """τ of image and text anchors [2, n] as in evaluation, without gradient.

        Args:
            image, text: unit features [n, D] of any pairs.
            ids: int64 [n], where the pairs are training samples. Every rank gives the same ones.

        Returns:
            None where there is no τ, or where only training samples have one (of their own) and ids are not given.
        """
        return None

    def tracked_temperatures(self) -> Tensor | None:
        """τ [2, n] that this rank keeps for training samples it has seen; None where τ is not kept a sample."""
        return None


def as_tensor(*numbers: float) -> Tensor:
    """Numbers as an extra state: a `state_dict()` that holds tensors alone is saved by every tool."""
    whole = all(isinstance(number, int) for number in numbers)
    return torch.tensor(numbers, dtype=torch.int64 if whole else torch.float64)


def as_numbers(state: Tensor | Mapping[str, float], *names: str) -> list[float]:
    """The numbers of an extra state; before they were a tensor they were a dict, in the same order.

    Raises:
        ValueError: they are not those of `names`.
    """
    numbers = list(state.values()) if isinstance(state, Mapping) else torch.as_tensor(state).flatten().tolist()
    if len(numbers) != len(names):
        raise ValueError(
            f"_extra_state holds {len(numbers)} numbers, expected {len(names)} ({', '.join(names)}): the state of "
            "another objective?"
        )
    return numbers


def _checksum(tensors: Iterable[Tensor]) -> int:
    checksum = 0
    for tensor in tensors:
        checksum = zlib.crc32(tensor.detach().double().cpu().numpy().tobytes(), checksum)
    return checksum


@contextmanager
def exact_arithmetic(device: torch.device) -> Iterator[None]:
    """Autocast off and float32 products in float32 (no TF32): at τ = .01 a bf16 similarity errs by 0.27 nat."""
    precision = torch.get_float32_matmul_precision()
    if precision != "highest":
        torch.set_float32_matmul_precision("highest")
    try:
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        if precision != "highest":
            torch.set_float32_matmul_precision(precision)


def compute_dtype(features: Tensor) -> torch.dtype:
    """float64 stays float64; everything narrower is computed in float32."""
    return torch.float64 if features.dtype == torch.float64 else torch.float32


def int64_ids(ids: SampleIds, rows: int) -> Tensor:
    """The ids of a batch as int64 [rows], on the device where they are.

    Raises:
        ValueError: they are no whole numbers, or not as many.
    """
    given = ids if isinstance(ids, Tensor) else np.asarray(ids)
    whole = given.dtype in INTEGER_DTYPES if isinstance(given, Tensor) else given.dtype.kind in "iu"
    if not whole or tuple(given.shape) != (rows,):
        raise ValueError(f"ids must be whole numbers [{rows}], got {given.dtype} {list(given.shape)}")
    return given.to(torch.int64) if isinstance(given, Tensor) else torch.from_numpy(given.astype(np.int64))


def _listed(numbers: list[float]) -> str:
    return ", ".join(f"{number:.12g}" for number in numbers[:16]) + (" …" if len(numbers) > 16 else "")


LaterGradient = Callable[..., tuple[Tensor, Tensor]]


class _WithGradient(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, value: Tensor, image: Tensor, text: Tensor, image_gradient: Tensor, text_gradient: Tensor
    ) -> Tensor:
        ctx.save_for_backward(image_gradient, text_gradient)
        return value.clone()

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        refuse_second_gradient()
        image_gradient, text_gradient = ctx.saved_tensors
        return (
            None,
            (upstream * image_gradient).to(image_gradient.dtype),
            (upstream * text_gradient).to(text_gradient.dtype),
            None,
            None,
        )


def with_gradient(value: Tensor, image: Tensor, text: Tensor, image_gradient: Tensor, text_gradient: Tensor) -> Tensor:
    """`value`, with the given gradients with respect to `image` and `text` [b, D] (cast to their dtype)."""
    result = _WithGradient.apply(value, image, text, image_gradient.to(image.dtype), text_gradient.to(text.dtype))
    assert isinstance(result, Tensor)
    return result


class _WithLaterGradient(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, value: Tensor, image: Tensor, text: Tensor, gradient: LaterGradient, *kept: Tensor | None
    ) -> Tensor:
        ctx.gradient = gradient
        ctx.save_for_backward(image, text, *kept)
        return value.clone()

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        refuse_second_gradient()
        image, text, *kept = ctx.saved_tensors
        with exact_arithmetic(image.device):
            image_gradient, text_gradient = ctx.gradient(upstream, image.detach(), text.detach(), *kept)
        given = image_gradient.to(image.dtype), text_gradient.to(text.dtype)
        return (None, *given, None, *(None for _ in kept))


def with_later_gradient(
    value: Tensor, image: Tensor, text: Tensor, gradient: LaterGradient, *kept: Tensor | None
) -> Tensor:
    """`value`, whose gradient is computed in the backward pass, so that memory for it is taken only there.

    gradient(upstream, image, text, *kept) gives those with respect to `image` and `text` [b, D], times `upstream`; it
    holds no tensors of its own: what it needs is `kept`, which autograd frees.
    """
    result = _WithLaterGradient.apply(value, image, text, gradient, *kept)
    assert isinstance(result, Tensor)
    return result


def tau_metrics(tau: Tensor) -> dict[str, Tensor]:
    """mean, min, max and std of τ [2, B] of image and text anchors."""
    metrics: dict[str, Tensor] = {}
    for side, name in zip(tau.detach(), ("image", "text"), strict=True):
        metrics |= {
            f"tau/{name}_mean": side.mean(),
            f"tau/{name}_min": side.amin(),
            f"tau/{name}_max": side.amax(),
            f"tau/{name}_std": side.std(correction=0),
        }
    return metrics
