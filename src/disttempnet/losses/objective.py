"""Base of all objectives: input, output, checks, exact arithmetic, and values that carry a closed-form gradient."""

from __future__ import annotations

import itertools
import warnings
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from disttempnet import distributed
from disttempnet.errors import UserNotice, notice
from disttempnet.losses.own_parameters import Learner, refuse_second_gradient
from disttempnet.losses.sample_state import SampleState

SIDE_WEIGHT = 0.5  # c: image and text anchors are averaged
IdsLike = Tensor | np.ndarray | Sequence[int]  # integers of any width, on any device
INTEGER_DTYPES = (
    torch.int64, torch.int32, torch.int16, torch.int8, torch.uint64, torch.uint32, torch.uint16, torch.uint8,
)  # fmt: skip


class Features(NamedTuple):
    """Features of this rank's rows of a global batch of pairs; make one with `of` or `unit`.

    Attributes:
        image, text: unit rows [b, D], which the contrastive objectives compare.
        image_embedding, text_embedding: the same rows [b, D] before normalising, which VICReg compares.
        reference_image, reference_text: unit rows [b, R] of a reference model on the same pairs, for objectives that
            are steered by one; without gradient.

    Example:
        >>> features = Features.of(image_embedding=2 * torch.eye(3), text_embedding=torch.ones(3, 3))
        >>> features.image[0], features.image_embedding[0]
        (tensor([1., 0., 0.]), tensor([2., 0., 0.]))
        >>> round(features.text.norm(dim=1).sum().item(), 5)
        3.0
    """

    image: Tensor
    text: Tensor
    image_embedding: Tensor
    text_embedding: Tensor
    reference_image: Tensor | None = None
    reference_text: Tensor | None = None

    @classmethod
    def of(
        cls, image_embedding: Tensor, text_embedding: Tensor, reference: tuple[Tensor, Tensor] | None = None
    ) -> Features:
        """Normalise the towers' output [b, D], of any norm and floating dtype; half precision in float32.

        Args:
            image_embedding, text_embedding: of the towers.
            reference: image and text embeddings [b, R] of a reference model on the same pairs, of any norm.
        """
        image, text = (side.to(compute_dtype(side)) for side in (image_embedding, text_embedding))
        unit = cls(F.normalize(image, dim=-1), F.normalize(text, dim=-1), image_embedding, text_embedding)
        if reference is None:
            return unit
        sides = (F.normalize(side.detach().to(compute_dtype(side)), dim=-1) for side in reference)
        return unit._replace(**dict(zip(("reference_image", "reference_text"), sides, strict=True)))

    @classmethod
    def unit(cls, image: Tensor, text: Tensor) -> Features:
        """Take rows [b, D] that have norm 1 already; nothing is normalised again."""
        return cls(image, text, image, text)

    def gathered(self) -> Features:
        """Return the rows of all ranks in rank order [B, D], without gradient; every rank calls this."""
        image, text, image_embedding, text_embedding = (distributed.all_gather(side) for side in self[:4])
        theirs = (None if side is None else distributed.all_gather(side) for side in self[4:])
        return Features(image, text, image_embedding, text_embedding, *theirs)


class ObjectiveContext(NamedTuple):
    """Facts of a run that objectives are built from.

    Attributes:
        num_samples: N; sample ids lie in [0, N).
        embed_dim: D, width of the features.
        seed: seed of the run.
        shard_state: whether each rank holds the per-sample state of its own samples only.
        ring: whether the ranks hand their features round, in place of gathering all of them.
    """

    num_samples: int
    embed_dim: int
    seed: int = 0
    shard_state: bool = False
    ring: bool = False


class LossOutput(NamedTuple):
    """Result of a step.

    Attributes:
        total: the loss, 0-d; its backward pass gives this rank's share of the gradient.
        metrics: detached 0-d tensors by name.
    """

    total: Tensor
    metrics: dict[str, Tensor]


class Objective(Learner):
    """Base class of objectives: a module from features and ids to loss and metrics.

    Attributes:
        arguments: the arguments that it was built with, as text; equal on all ranks.
        steps_per_epoch: training steps of an epoch; 0 = the loop calls `set_epoch`.
        num_samples: N, where the objective has schedules.
        ring: whether the ranks hand their features round, in place of gathering all of them.
    """

    arguments = ""
    steps_per_epoch = 0
    num_samples = 0
    ring = False
    step = 0  # training steps so far, where the objective counts them
    epoch = 0.0
    _is_accelerate_prepared = False
    _sent: tuple[float, ...] | None = None  # numbers that this rank sent to the others in the previous step
    _sent_tensor: Tensor  # the same, on the features' device
    _epoch_settled = False  # set_epoch was called, or a warning said that it was not
    _rows_unsettled = 0  # rows of the global batches before that
    _verified = False  # all ranks hold the same objective
    _state_loaded = False  # since it was verified

    def set_epoch(self, epoch: float) -> None:
        """Begin an epoch of the schedules; call it at the start of every epoch.

        After the first call the objective no longer counts `steps_per_epoch` itself.
        """
        if not epoch >= 0:
            raise ValueError(f"epoch must not be negative, got {epoch}")
        self._epoch_settled = True
        self.begin_epoch(epoch)

    def begin_epoch(self, epoch: float) -> None:
        """Begin an epoch; objectives with schedules override it."""

    @property
    def scheduled(self) -> bool:
        """True where something depends on the epoch."""
        return False

    def follow_epoch(self, batch: int) -> None:
        """Begin the epoch of this step where `set_epoch` is not called; warn once if a schedule needs it.

        Args:
            batch: rows of the global batch.
        """
        if self._epoch_settled:
            return
        if self.steps_per_epoch:
            self.begin_epoch(self.step // self.steps_per_epoch)
            return
        self._rows_unsettled += batch
        if self.scheduled and self._rows_unsettled > self.num_samples + batch:
            self._epoch_settled = True
            self.notice(
                f"more than the {self.num_samples} samples of an epoch have passed and set_epoch was never called: "
                f"the schedules of γ and of the temperature's rate stay at epoch {self.epoch:g}; call "
                "loss.set_epoch(epoch) at the start of every epoch, or build_loss(…, steps_per_epoch=len(loader))"
            )

    def notice(self, message: str) -> None:
        """Warn the line that called the module; of a helper of a step's function, on rank 0."""
        if distributed.is_main():
            warnings.warn(message, UserNotice, stacklevel=7)

    def set_still(self, still: bool) -> None:
        """Set `still` of this objective and its parts; every rank passes the same."""
        for part in self.modules():
            if isinstance(part, Learner):
                part.still = still

    def forward(self, features: Features, ids: IdsLike | None = None) -> LossOutput:
        """Return loss and metrics of this rank's rows [b, D] and their sample ids [b]; `checked` says what is refused.

        Evaluation (`eval()`) uses nothing of training samples: normalisers are the batch's own, a per-sample τ is the
        mean of the learned ones, and ids are only compared with each other (None: all differ).
        """
        raise NotImplementedError

    def checked(self, features: Features, ids: IdsLike | None) -> Tensor:
        """Check the batch on all ranks and return the ids as int64 [b] on the features' device.

        Raises:
            ValueError: no batch of pairs, no rows, no ids where they are needed; or another rank has another number of
                rows, has refused its own, or holds another objective. Every rank raises.
            IndexError: an id outside the data set.
        """
        # an error of this rank is raised below, when the other ranks know of it
        failure = result = None
        try:
            result = self._checked_alone(features, ids)
        except (ValueError, IndexError) as error:
            failure = error
        unverified = False
        if distributed.world_size() > 1:
            unverified = self._check_step(-1 if failure else len(features.image), features.image.device)
        if result is None:
            raise failure or AssertionError
        if unverified:
            self._check_equal_on_all_ranks()
            if ids is not None and self.training:
                _warn_of_equal_samples(result)
        return result

    def _checked_alone(self, features: Features, ids: IdsLike | None) -> Tensor:
        """Check this rank's batch; see `checked`."""
        image, text = features.image, features.text
        self.check_reference(features)
        if image.ndim != 2 or image.shape != text.shape:
            raise ValueError(f"features must both be [b, D], got {tuple(image.shape)} and {tuple(text.shape)}")
        if not len(image):
            raise ValueError("a batch of 0 rows has no loss: leave it out, on every rank")
        tables = [module for module in self.modules() if isinstance(module, SampleState)]
        held = next(itertools.chain(self.parameters(), self.buffers()), None)
        home = held.device if held is not None else tables[0].device if tables else image.device
        if home != image.device:
            raise ValueError(f"the loss is on {home}, the features are on {image.device}: move it with loss.to()")
        if ids is not None:
            given = int64_ids(ids, len(image))
        elif self.training and tables:
            raise ValueError(f"ids are needed in training: the ids of the samples, int64 [{len(image)}]")
        else:
            start = distributed.rank() * len(image)
            given = torch.arange(start, start + len(image), device=image.device)
        if self.training:
            for table in tables:
                table.check_ids(given)
        return given.to(image.device, non_blocking=True)

    def check_reference(self, features: Features) -> None:
        """Raise ValueError where reference features are needed and missing, or of another shape."""

    def _check_step(self, rows: int, device: torch.device) -> bool:
        """Exchange rows, epoch and state of verification; True if the ranks have to compare their objectives.

        All ranks return True, or none. On a GPU reading the answer costs a synchronisation, so only ranks whose own
        numbers changed read it. There these ranks end with the message, and the launcher ends the others.

        Args:
            rows: this rank's rows; -1 where it has refused its batch.

        Raises:
            ValueError: the ranks differ in rows or epoch, or one has refused its batch.
        """
        # three numbers a rank: [K, 3]
        own = (float(rows), self.epoch, float(not self._verified))
        changed = own != self._sent
        if changed or self._sent_tensor.device != device:
            self._sent, self._sent_tensor = own, torch.tensor([own], dtype=torch.float64, device=device)
        gathered = distributed.all_gather(self._sent_tensor)
        if device.type != "cpu" and not changed and self._verified:
            return False
        counts, epochs, unverified = gathered.T.tolist()

        # batches that were refused, and batches of different sizes
        refused = [rank for rank, count in enumerate(counts) if count < 0]
        if refused and rows >= 0:
            raise ValueError(f"rank {refused[0]} has refused its batch: its own message says why")
        if refused:
            return False
        if len(set(counts)) > 1:
            raise ValueError(
                f"every rank needs the same number of rows, got {_listed(counts)} of ranks 0 to {len(counts) - 1}: "
                "drop the last batch of an epoch, or let the sampler fill it up"
            )

        # a state or an epoch that some ranks do not have; on a GPU the verified ranks have not read the answer
        if any(unverified) and not all(unverified) and device.type != "cpu":
            without, having = unverified.index(0), unverified.index(1)
            raise ValueError(f"rank {without} has not loaded the state that rank {having} has: load it on all ranks")
        if not any(unverified) and len(set(epochs)) > 1:
            raise ValueError(
                f"the ranks are in epochs {_listed(epochs)}: call set_epoch with the same number on every rank"
            )
        return any(unverified)

    def _check_equal_on_all_ranks(self) -> None:
        """Raise ValueError unless all ranks hold the same objective, the same state, and are at the same step."""
        # checksums of everything but the shards of a table, which differ by rank
        tables = {name: module for name, module in self.named_modules() if isinstance(module, SampleState)}
        inside = tuple(f"{name}." for name in tables)
        parameters = dict(self.named_parameters())
        rest = {k: v for k, v in self.state_dict().items() if k not in parameters and not k.startswith(inside)}
        own = {
            "arguments": self.arguments,
            "parameters": _checksum(parameters.values()),
            # of a sharded state only this can be compared: all ranks have loaded one, or none
            "per-sample state": [self._state_loaded if part.sharded else part.checksum() for part in tables.values()],
            "step or epoch": [self.step, self.epoch],
            "running state": _checksum(rest.values()),
        }

        # every rank compares all of them with those of rank 0
        gathered = distributed.gather_objects(own)
        for what, expected in gathered[0].items():
            others = [rank for rank, found in enumerate(gathered) if found[what] != expected]
            if others:
                raise ValueError(
                    f"the loss of rank {others[0]} has other {what} than that of rank 0: build it with the same "
                    "arguments and the same seed on every rank, and load the same state"
                )
        self._verified, self._state_loaded = True, False

    def _replicate_for_data_parallel(self) -> Any:
        """Refuse nn.DataParallel, whose copies on other GPUs would each contrast a part of the batch.

        Raises:
            RuntimeError: always.
        """
        raise RuntimeError(
            "nn.DataParallel copies the loss to every GPU, and each copy sees a part of the batch: start one process "
            "a GPU (torchrun, accelerate launch), or leave the loss out of what DataParallel wraps"
        )

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._verified, self._state_loaded = False, True  # the next step compares

    def temperatures(self, image: Tensor, text: Tensor, ids: IdsLike | None = None) -> Tensor | None:
        """Return τ of image and text anchors [2, n] as in evaluation, without gradient.

        Args:
            image, text: unit features [n, D] of any pairs.
            ids: int64 [n], where the pairs are training samples. Every rank passes the same ones.

        Returns:
            None where there is no τ, or where τ is per-sample and ids are not given.
        """
        return None

    def tracked_temperatures(self) -> Tensor | None:
        """Return τ [2, n] of the visited training samples that this rank holds; None where τ is not per-sample."""
        return None


def _warn_of_equal_samples(ids: Tensor) -> None:
    """Warn where all ranks train on the same samples; every rank calls this, in its first step.

    Args:
        ids: int64 [b], of this rank's rows.
    """
    checksums = distributed.gather_objects(_checksum([ids]))
    if len(ids) > 1 and len(set(checksums)) == 1 and distributed.is_main():
        notice(
            f"all {len(checksums)} ranks have the same samples in their first step: give every rank its own "
            "(DistributedSampler, accelerator.prepare(loader)), or the batch is no larger than that of one rank"
        )


def as_tensor(*numbers: float) -> Tensor:
    """Return numbers as an extra state: every tool saves a `state_dict()` that holds tensors only."""
    integers = all(isinstance(number, int) for number in numbers)
    return torch.tensor(numbers, dtype=torch.int64 if integers else torch.float64)


def as_numbers(
    state: Tensor | Mapping[str, float], *names: str, later: Mapping[str, float] = MappingProxyType({})
) -> list[float]:
    """Return the numbers of an extra state: a tensor, or a dict in the same order as older versions saved it.

    Args:
        state: as saved.
        names: of the numbers.
        later: name → value of the numbers after them, where the state was saved without.

    Raises:
        ValueError: there are not as many.
    """
    numbers = list(state.values()) if isinstance(state, Mapping) else torch.as_tensor(state).flatten().tolist()
    if len(numbers) == len(names):
        numbers = [*numbers, *later.values()]
    names += tuple(later)
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
    """Switch autocast off and compute float32 products in float32, not TF32.

    At τ = .01 the rounding of a bf16 similarity moves an exponent by 0.27 nat.
    """
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
    """Return float64 for float64 features, float32 for everything narrower."""
    return torch.float64 if features.dtype == torch.float64 else torch.float32


def int64_ids(ids: IdsLike, rows: int) -> Tensor:
    """Return the ids of a batch as int64 [rows], on the device where they are.

    Raises:
        ValueError: they are no integers, or not `rows` of them.
    """
    given = ids if isinstance(ids, Tensor) else np.asarray(ids)
    integers = given.dtype in INTEGER_DTYPES if isinstance(given, Tensor) else given.dtype.kind in "iu"
    if not integers or tuple(given.shape) != (rows,):
        raise ValueError(f"ids must be integers of shape [{rows}], got {given.dtype} {list(given.shape)}")
    return given.to(torch.int64) if isinstance(given, Tensor) else torch.from_numpy(given.astype(np.int64))


def _listed(numbers: list[float]) -> str:
    return ", ".join(f"{number:.12g}" for number in numbers[:16]) + (" …" if len(numbers) > 16 else "")


class _WithGradient(torch.autograd.Function):
    """Identity of a value, with given gradients."""

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
    """Return `value` with the given gradients with respect to `image` and `text` [b, D], cast to their dtype."""
    result = _WithGradient.apply(value, image, text, image_gradient.to(image.dtype), text_gradient.to(text.dtype))
    assert isinstance(result, Tensor)
    return result


def tau_metrics(tau: Tensor) -> dict[str, Tensor]:
    """Return mean, min, max and std of τ [2, B] of image and text anchors."""
    columns = {"mean": tau.mean(1), "min": tau.amin(1), "max": tau.amax(1), "std": tau.std(1, correction=0)}
    return {
        f"tau/{side}_{name}": column[index]
        for index, side in enumerate(("image", "text"))
        for name, column in columns.items()
    }
