"""Check for NaN and infinity: a run ends at such a loss or gradient, and names the samples."""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from disttempnet import distributed
from disttempnet.errors import UserError
from disttempnet.io.files import write_atomically
from disttempnet.losses import LossOutput


class _Step(NamedTuple):
    number: int
    output: LossOutput
    norm: Tensor
    ids: Tensor
    finite: Tensor  # on the CPU, once `arrived`
    arrived: torch.cuda.Event | None


class NanCheck:
    """Check of every step, one step later, so that the host never waits for a GPU.

    On a GPU the answer is queued with the step, and copied to the host when it is there. Asking for it later would wait
    for everything queued since.

    Args:
        folder: of the run.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._last: _Step | None = None

    def note(self, step: int, output: LossOutput, norm: Tensor, ids: Tensor) -> None:
        """Remember a step for `look`.

        Args:
            step: its number, from 1.
            output: its loss.
            norm: gradient norm, 0-d.
            ids: of its samples [b].
        """
        finite = torch.isfinite(output.total.detach()) & torch.isfinite(norm)
        arrived = None
        if finite.is_cuda:
            told = torch.empty((), dtype=torch.bool, pin_memory=True)
            finite, arrived = told.copy_(finite, non_blocking=True), torch.cuda.Event()
            arrived.record()
        self._last = _Step(step, output, norm, ids, finite, arrived)

    def look(self) -> None:
        """Raise UserError if the last noted step is not finite; its terms and ids are written to a file."""
        if self._last is None:
            return
        step, output, norm, ids, finite, arrived = self._last
        self._last = None
        if arrived is not None:
            arrived.synchronize()
        if bool(finite):
            return
        terms = {name: float(value) for name, value in output.metrics.items()} | {"grad_norm": float(norm)}
        report = {"step": step, "terms": {k: str(v) for k, v in terms.items()}, "ids": ids.tolist()}
        path = self.folder / f"nonfinite-rank{distributed.rank()}.json"
        write_atomically(path, json.dumps(report) + "\n")
        raise UserError(
            f"step {step} is not finite: loss {terms['loss']}, grad_norm {terms['grad_norm']}; all terms and the ids "
            f"of its samples are in {path}. Lower optim.lr or set optim.grad_clip, then --resume auto"
        )
