"""Embeddings of a reference model, computed once a sample, for objectives that are steered by one."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import torch

from disttempnet.config import Config
from disttempnet.data.augment import train_transform
from disttempnet.data.builtin.cache import cache_folder
from disttempnet.data.held_out import HeldOut
from disttempnet.data.source import Source
from disttempnet.features.batches import FOLDER
from disttempnet.features.build import Build, Pass, build, width_of
from disttempnet.features.cache_key import facts_of
from disttempnet.features.store import FeatureStore, store_in
from disttempnet.models import Towers
from disttempnet.models.trunk import TOWER_SIDES, trunk_of

REFERENCE_ELSEWHERE = "name another folder with reference.cache_folder"


class ReferenceStores(NamedTuple):
    """Embeddings of both towers of a reference model, by sample id."""

    image: FeatureStore
    text: FeatureStore


def reference_stores(
    config: Config, source: Source, towers: Towers, device: torch.device, autocast: torch.dtype | None
) -> ReferenceStores:
    """Return the embeddings of a run's samples, computed where they are not on disk yet; every rank calls this.

    Images are seen as evaluation sees them. Runs with other references, sizes or precisions have stores of their own.

    Args:
        config: of the run.
        source: its training samples.
        towers: the reference, frozen, on `device`.
        device: of this rank.
        autocast: dtype of the arithmetic; None = that of the weights.

    Raises:
        UserError: no room on the disk, or a damaged file.
    """
    limit = config.data.limit
    end = int(source.usable[limit - 1]) + 1 if 0 < limit < source.usable_counts.sum() else len(source)
    whole = source.base if isinstance(source, HeldOut) else source
    how = Build(whole, device, config.eval.batch, config.data.workers, autocast, end)
    trunks = {side: trunk_of(towers, side) for side in TOWER_SIDES}
    facts: dict[str, dict[str, Any]] = facts_of(trunks, source, autocast)
    facts["image"]["transform"] = {"name": "evaluation"}
    folder = config.reference.cache_folder
    parent = Path(folder) if folder else cache_folder() / FOLDER
    transform = train_transform("evaluation", towers.image_size, False, towers.resizing)
    passes = [
        Pass(
            store_in(parent, facts[side], len(source), width_of(trunk, how), "float32", REFERENCE_ELSEWHERE),
            trunk,
            transform if side == "image" else None,
        )
        for side, trunk in trunks.items()
    ]
    build(passes, how, REFERENCE_ELSEWHERE)
    return ReferenceStores(passes[0].store, passes[1].store)
