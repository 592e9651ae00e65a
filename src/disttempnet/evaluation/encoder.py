"""Pixels and texts → unit features, in a chosen precision, with the batches sharded over the ranks.

Batches, not rows, are sharded: every batch is the same at any world size, and so are the numbers, to the last bit on
like devices. A rank fills its rows of a table of zeros, and the sum over ranks is the whole table.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from disttempnet import distributed
from disttempnet.data.loader import CAPTION_CHARACTERS
from disttempnet.models import Towers, encode_images, encode_texts
from disttempnet.models.text import trimming
from disttempnet.models.trunk import LEAST_BATCH, filled

ProgressCallback = Callable[[str, int, int], None]


@dataclass(frozen=True)
class FeatureEncoder:
    """Towers on a device.

    Attributes:
        towers: with their module on `device`.
        batch: images or texts embedded at once.
        image_dtype, text_dtype: of autocast; None = compute in the weights' own precision.
    """

    towers: Towers
    device: torch.device
    batch: int = 256
    image_dtype: torch.dtype | None = None
    text_dtype: torch.dtype | None = None

    @property
    def width(self) -> int:
        return self.towers.embed_dim

    @property
    def least_batch(self) -> int:
        """Rows that a last batch is filled up to, so that features do not depend on how many are left."""
        return min(self.batch, LEAST_BATCH)

    def images(self, pixels: Tensor) -> Tensor:
        """uint8 [b, 3, s, s] → unit float32 [b, D]."""
        rows = filled(pixels, self.least_batch)
        with self._autocast(self.image_dtype):
            return encode_images(self.towers, rows.to(self.device, non_blocking=True)).float()[: len(pixels)]

    def texts(self, texts: Sequence[str], progress: ProgressCallback | None = None) -> Tensor:
        """Texts → this rank's rows of a table of unit float32 features [t, D]; `distributed.all_sum` gives all."""
        table = torch.zeros(len(texts), self.width, device=self.device)
        if not texts:
            return table
        trim = trimming(self.towers.module)
        tokens, order = self.towers.tokenizer([text[:CAPTION_CHARACTERS] for text in texts]), torch.arange(len(texts))
        if trim:  # batches of like lengths: no text waits for a long one
            order = torch.argsort(trim.lengths(tokens), stable=True)
        mine = batches_of_this_rank(len(texts), self.batch)
        for done, batch in enumerate(mine, 1):
            rows = order[batch.start : batch.stop]
            part = filled(trim(tokens[rows]) if trim else tokens[rows], self.least_batch)
            with self._autocast(self.text_dtype):
                features = encode_texts(self.towers, part.to(self.device))
            table[rows.to(self.device)] = features.float()[: len(rows)]
            if progress:
                progress("texts", done, len(mine))
        return table

    @contextmanager
    def _autocast(self, dtype: torch.dtype | None) -> Iterator[None]:
        with torch.autocast(self.device.type, dtype=dtype, enabled=dtype is not None):
            yield


def make_encoder(towers: Towers, device: torch.device, precision: str, matching: bool, batch: int) -> FeatureEncoder:
    """Return an encoder of a precision.

    Args:
        precision: `fp32`; `bf16`, everything under autocast; `datacomp`, as DataComp's evaluation computes: texts
            under fp16 autocast (on a CPU bf16, as torch has it there), images in fp32 unless `matching`.
        matching: whether the task compares images with texts of their own: retrieval and WinoGAViL.
    """
    half = torch.float16 if device.type == "cuda" else torch.bfloat16
    image, text = {
        "fp32": (None, None),
        "bf16": (torch.bfloat16, torch.bfloat16),
        "datacomp": (half if matching else None, half),
    }[precision]
    return FeatureEncoder(towers, device, batch, image, text)


def checkpoint_hash(towers: Towers) -> str:
    """Return a hex digest of what features depend on: architecture, resizing and normalisation of images, weights."""
    digest = hashlib.blake2b(digest_size=16)
    facts = [towers.architecture, towers.image_size, towers.mean, towers.std, towers.resizing]
    digest.update(json.dumps(facts, sort_keys=True, default=str).encode())
    for name, value in sorted(towers.module.state_dict().items()):
        if name not in ("logit_scale", "logit_bias"):
            digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
            digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def batches_of_this_rank(n: int, batch: int) -> list[range]:
    """Return the rows of each batch that is this rank's."""
    starts = range(distributed.rank() * batch, n, distributed.world_size() * batch)
    return [range(start, min(start + batch, n)) for start in starts]


@contextmanager
def evaluation_mode(module: nn.Module) -> Iterator[None]:
    """Turn off gradients, dropout and batch statistics inside; every submodule's own mode is restored after."""
    modes = {part: part.training for part in module.modules()}
    module.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for part, training in modes.items():
            part.training = training
