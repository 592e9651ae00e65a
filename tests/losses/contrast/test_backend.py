"""Choice of the implementation that contrasts: the setting, the device and half precision."""

from __future__ import annotations

import pytest
import torch

from disttempnet.errors import UserError
from disttempnet.losses.contrast import backend


class OnAGpu(torch.Tensor):
    is_cuda = True
    device = torch.device("cuda:0")  # type: ignore[assignment]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("reason", ["", "an old GPU"])
def test_the_kernel_is_chosen_on_a_gpu_in_half_precision(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, autocast: bool, reason: str
) -> None:
    monkeypatch.delenv(backend.KERNEL_SETTING, raising=False)
    monkeypatch.setattr(backend, "_unusable", lambda _: reason)
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda kind: autocast and kind == "cuda")
    embeddings = torch.zeros(2, 4, dtype=dtype).as_subclass(OnAGpu)
    assert backend.use_kernel(embeddings) == (not reason and (autocast or dtype == torch.bfloat16))
    monkeypatch.setenv(backend.KERNEL_SETTING, "torch")
    assert not backend.use_kernel(embeddings)
    monkeypatch.setenv(backend.KERNEL_SETTING, "triton")
    if reason:
        with pytest.raises(UserError, match="DISTTEMPNET_KERNEL=triton: an old GPU"):
            backend.use_kernel(embeddings)
    else:
        assert backend.use_kernel(embeddings)


def test_the_setting_of_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    features = torch.zeros(2, 4)
    for setting in ("auto", "torch"):
        monkeypatch.setenv(backend.KERNEL_SETTING, setting)
        assert not backend.use_kernel(features)
    monkeypatch.setenv(backend.KERNEL_SETTING, "cuda")
    with pytest.raises(UserError, match="must be auto, torch or triton, got 'cuda'"):
        backend.use_kernel(features)
