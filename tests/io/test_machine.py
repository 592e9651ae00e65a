"""Memory that is not enough is one line that says what to lower."""

from __future__ import annotations

import errno
from pathlib import Path

import numpy as np
import pytest
import torch

from disttempnet.cli.main import main
from disttempnet.errors import UserError
from disttempnet.io.machine import memory_named
from disttempnet.training.trainer import Trainer

CUDA = "CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has a total capacity of 79.15 GiB.\nSee also …"


def raises(error: BaseException) -> None:
    raise error


@pytest.mark.parametrize(
    ("allocate", "whose"),
    [
        (lambda: torch.empty(10**15), "main"),
        (lambda: np.empty(10**15), "main"),
        (lambda: raises(MemoryError()), "main"),
        (lambda: raises(OSError(errno.ENOMEM, "Cannot allocate memory")), "main"),
        (lambda: raises(torch.OutOfMemoryError(CUDA)), "GPU"),
        (lambda: raises(RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate`")), "GPU"),
    ],
    ids=["torch", "numpy", "python", "fork", "cuda", "cublas"],
)
def test_every_kind_of_full_memory_is_named(allocate, whose: str) -> None:
    with (
        pytest.raises(UserError, match=rf"^out of {whose} memory: lower --batch \(.+\)$"),
        memory_named("lower --batch"),
    ):
        allocate()


@pytest.mark.parametrize(
    "error", [RuntimeError("shape '[2]' is invalid"), OSError(errno.ENOSPC, "full"), KeyError("x")]
)
def test_other_errors_stay_as_they_are(error: Exception) -> None:
    with pytest.raises(type(error)) as caught, memory_named("lower --batch"):
        raise error
    assert caught.value is error


def test_training_says_what_to_lower(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(Trainer, "train_step", lambda *_: raises(torch.OutOfMemoryError(CUDA)))
    assert main(["train", "debug", f"out={tmp_path}", "data.limit=64", "eval.tasks=[]"]) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith(
        "disttempnet: out of GPU memory: set train.checkpoint_activations=true, raise train.accumulate (the same batch "
        "in chunks), or lower "
    )
    assert line.endswith("(CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has a total capacity of 79.15 GiB)")
