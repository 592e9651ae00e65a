"""Items → features → τ and log u, in chunks of a few batches, which bounds memory."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from disttempnet import distributed
from disttempnet.errors import UserError
from disttempnet.evaluation import embed_captions, embed_samples
from disttempnet.losses.sample_state import SampleState
from disttempnet.report.items import Item, Items
from disttempnet.training.checkpoint import Run

BATCHES_PER_CHUNK = 2  # of each rank


class TemperatureChunk(NamedTuple):
    """Some items, in order.

    Attributes:
        positions: int64 [n], of the items in their data set.
        items: n items, those that could be read.
        tau: float32 [2, n], image and text side; NaN where an item has no such side.
        log_u: float32 [2, n]; NaN where it is not known.
        features: side → unit rows [n, D].
        skipped: keys of the unreadable ones.
        read: how many items were read, skipped ones among them.
    """

    positions: np.ndarray
    items: list[Item]
    tau: np.ndarray
    log_u: np.ndarray
    features: dict[str, Tensor]
    skipped: list[str]
    read: int


def refuse_without_temperatures(run: Run, training: bool) -> None:
    """Raise UserError where the objective has no τ, or τ of training samples only and these are others."""
    one = torch.nn.functional.normalize(torch.ones(1, run.towers.embed_dim), dim=1).to(_device_of(run))
    if run.loss.temperatures(one, one) is not None:
        return
    name = run.config.loss.name
    if run.loss.temperatures(one, one, torch.zeros(1, dtype=torch.int64, device=one.device)) is None:
        raise UserError(f"{run.folder}: objective {name} has no temperature")
    if not training:
        raise UserError(
            f"{run.folder}: objective {name} has temperatures of its training samples only; leave out --shards, "
            "--images and --captions, or take a run with a temperature network"
        )


def measure_temperatures(run: Run, items: Items, *, device: torch.device, batch: int) -> Iterator[TemperatureChunk]:
    """Yield τ of all items; every rank calls this and gets the same chunks.

    Args:
        run: opened, its modules on `device`.
        batch: images or captions embedded at once by a rank.

    Raises:
        UserError: features that are not finite.
    """
    step = batch * BATCHES_PER_CHUNK * distributed.world_size()
    for start in range(0, len(items), step):
        # Unit features [n, D] of a few batches; unreadable images drop out.
        positions = np.arange(start, min(start + step, len(items)))
        read = items.read(positions)
        if "image" in items.sides:
            image, text, kept = embed_samples(run.towers, read, device=device, batch=batch)
        else:
            kept = read
            image = text = embed_captions(run.towers, [i.captions[0] for i in read], device=device, batch=batch)
        there = {id(item) for item in kept}
        skipped = [item.key for item in read if id(item) not in there]
        positions = positions[[id(item) in there for item in read]]
        if not (image.isfinite().all() and text.isfinite().all()):
            raise UserError(f"{run.folder}: the towers give features that are not finite")
        if "text" not in items.sides:
            text = image
        # τ of each side [2, n], and log u [2, n] of training samples.
        features = {"image": image, "text": text}
        tau, log_u = np.full((2, 2, len(kept)), np.nan, dtype=np.float32)
        if kept:
            ids = _ids(kept, device)
            temperatures = run.loss.temperatures(image, text, ids)
            assert temperatures is not None, "see refuse_without_temperatures"
            for i, side in enumerate(features):
                if side in items.sides:
                    tau[i] = temperatures[i].float().cpu().numpy()
            if ids is not None:
                log_u = log_u_of(run, ids)
        yield TemperatureChunk(positions, kept, tau, log_u, {s: features[s] for s in items.sides}, skipped, len(read))


def log_u_of(run: Run, ids: Tensor) -> np.ndarray:
    """Return log u [2, n] of training samples; NaN where the objective keeps none, or has not seen the sample."""
    state = getattr(run.loss, "state", None)
    if not isinstance(state, SampleState) or "log_u" not in state.columns:
        return np.full((2, len(ids)), np.nan, dtype=np.float32)
    row = 2 * list(state.columns).index("log_u")
    values = state.read(ids)[row : row + 2].float().cpu().numpy()
    return np.where(np.isinf(values), np.float32(np.nan), values)


def _ids(items: Sequence[Item], device: torch.device) -> Tensor | None:
    ids = [item.id for item in items if item.id is not None]
    return torch.tensor(ids, dtype=torch.int64, device=device) if len(ids) == len(items) else None


def _device_of(run: Run) -> torch.device:
    return next(run.towers.module.parameters()).device
