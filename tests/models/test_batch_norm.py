"""BatchNorm with the statistics of the global batch knows no world size."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from disttempnet import distributed
from disttempnet.errors import UserError
from disttempnet.models.batch_norm import GlobalBatchNorm
from tests.gloo import Pools


def network(dtype: torch.dtype) -> nn.Sequential:
    """Two BatchNorms, one behind the other, so that gradients cross ranks and come back."""
    torch.manual_seed(5)
    layers = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Tanh(), nn.Conv2d(4, 5, 3), nn.BatchNorm2d(5, momentum=0.3)
    )
    for p in layers.parameters():
        nn.init.normal_(p)
    return layers.to(dtype)


def outcome(layers: nn.Sequential, x: Tensor, target: Tensor) -> dict[str, Tensor]:
    """Loss that couples features within a rank only, gradients averaged over ranks as DDP does, and statistics."""
    loss = ((layers(x) - target) ** 3).mean()
    loss.backward()
    grads = {k: distributed.all_sum(p.grad) / distributed.world_size() for k, p in layers.named_parameters()}
    state = {k: v.clone() for k, v in layers.state_dict().items() if "running" in k or "tracked" in k}
    return {"loss": distributed.all_sum(loss) / distributed.world_size(), **grads, **state}


def on_a_rank(dtype: torch.dtype, memory_format: torch.memory_format) -> dict[str, Tensor]:
    layers = network(dtype)
    for place in (1, 4):
        layers[place] = GlobalBatchNorm(layers[place])
    x, target = rows(dtype)
    b = len(x) // distributed.world_size()
    mine = slice(distributed.rank() * b, (distributed.rank() + 1) * b)
    result = outcome(layers, x[mine].contiguous(memory_format=memory_format), target[mine])
    layers.eval()
    return result | {"eval": layers(x).detach()}


def rows(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(6)
    scale = torch.arange(1, 9).view(8, 1, 1, 1)  # the ranks' rows differ much
    return (
        (torch.randn(8, 3, 7, 6, generator=generator) * scale + scale).to(dtype),
        torch.randn(8, 5, 3, 2, generator=generator).to(dtype),
    )


@pytest.mark.parametrize("world_size", [2, 4])
def test_batch_norm_over_ranks_is_that_of_one_process(world_size: int, gloo: Pools) -> None:
    layers = network(torch.float64)
    expected = outcome(layers, *rows(torch.float64))
    expected["eval"] = layers.eval()(rows(torch.float64)[0]).detach()
    for result in gloo(world_size, on_a_rank, torch.float64, torch.channels_last):
        assert result.keys() == expected.keys()
        for key, value in expected.items():
            torch.testing.assert_close(result[key], value, rtol=1e-10, atol=1e-10, msg=key)


def test_batch_norm_over_ranks_in_single_precision(gloo: Pools) -> None:
    expected = outcome(network(torch.float32), *rows(torch.float32))
    for result in gloo(2, on_a_rank, torch.float32, torch.contiguous_format):
        for key, value in expected.items():
            torch.testing.assert_close(result[key], value, rtol=1e-3, atol=1e-4, msg=key)


def test_a_batch_norm_without_statistics_is_refused() -> None:
    with pytest.raises(UserError, match=r"BatchNorm1d cannot take .* model.batch_norm"):
        GlobalBatchNorm(nn.BatchNorm1d(3))
