"""Features of samples and captions that belong to no task: for examples, temperatures and tools."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import torch
from torch import Tensor

from disttempnet import distributed
from disttempnet.errors import UserError
from disttempnet.evaluation.encoder import (
    FeatureEncoder,
    ProgressCallback,
    batches_of_this_rank,
    evaluation_mode,
)
from disttempnet.evaluation.loader import DecodeRequest, decoded
from disttempnet.evaluation.tasks import EvaluationSample
from disttempnet.models import Towers

AnySample = TypeVar("AnySample", bound=EvaluationSample)


def features_of_samples(
    encoder: FeatureEncoder,
    samples: Sequence[EvaluationSample],
    workers: int = 0,
    progress: ProgressCallback | None = None,
    name: str = "",
) -> tuple[Tensor, Tensor]:
    """Return unit features [n, D] of samples, zeros where one cannot be decoded, and which could be: bool [n].

    Every rank calls this with the same samples and gets the same result.

    Args:
        workers: processes that decode for a rank; 0 = threads.
        progress: called with (`name`, batches embedded by this rank, batches of this rank).
    """
    # A rank fills its rows of a table of zeros; the sum over ranks is the whole table.
    images = torch.zeros(len(samples), encoder.width, device=encoder.device)
    valid = torch.zeros(len(samples), dtype=torch.int64, device=encoder.device)
    mine = batches_of_this_rank(len(samples), encoder.batch)
    requests = (DecodeRequest(0, rows.start, samples[rows.start : rows.stop]) for rows in mine)

    def fill() -> None:
        done = 0
        for part in decoded(requests, encoder.towers, workers):
            if not len(part.valid):
                continue
            images[part.rows] = encoder.images(part.pixels)
            valid[part.rows] = part.valid.to(encoder.device, torch.int64)
            done += 1
            if progress:
                progress(name, done, len(mine))

    with evaluation_mode(encoder.towers.module):
        distributed.together(fill)
    images, good = distributed.all_sum(images), distributed.all_sum(valid) == 1
    if not images[good].isfinite().all():
        raise UserError("the towers give features that are not finite")
    return images * good.unsqueeze(1), good


def embed_samples(
    towers: Towers, samples: Sequence[AnySample], *, device: torch.device | str, batch: int = 256
) -> tuple[Tensor, Tensor, list[AnySample]]:
    """Return unit features (images [n, D], first captions [n, D]) of the decodable samples, and these samples.

    Every rank calls this with the same samples and gets the same result. Nothing is kept in memory.
    """
    images, valid = features_of_samples(FeatureEncoder(towers, torch.device(device), batch), samples)

    # Captions of those that could be decoded.
    kept = [sample for sample, good in zip(samples, valid.tolist(), strict=True) if good]
    texts = embed_captions(towers, [sample.captions[0] for sample in kept], device=device, batch=batch)
    return images[valid], texts, kept


def embed_captions(towers: Towers, captions: Sequence[str], *, device: torch.device | str, batch: int = 256) -> Tensor:
    """Return unit features [n, D] of n captions, equal ones embedded once; every rank calls this and gets the same."""
    texts = list(dict.fromkeys(captions))
    row = {text: i for i, text in enumerate(texts)}
    with evaluation_mode(towers.module):
        features = distributed.all_sum(FeatureEncoder(towers, torch.device(device), batch).texts(texts))
    return features[torch.tensor([row[caption] for caption in captions], dtype=torch.int64, device=features.device)]
