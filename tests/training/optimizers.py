"""Optimizers of timm on invented parameters, whole and sharded."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

import disttempnet.models  # noqa: F401 (first: it lets timm load beside a CPU-only torch)
from disttempnet import distributed
from disttempnet.config import OptimConfig
from disttempnet.distributed.fsdp import full_tensor
from disttempnet.losses import build_loss
from disttempnet.training.optim import build_optimizers, set_learning_rate

SHAPES = ((1, 9, 3), (64, 40), (7,), (8, 4, 2, 2), (1,), (33, 7))  # a layer each; rows that two ranks share unevenly


class Layers(nn.Module):
    """A tower of layers with one parameter each, from embeddings to head, and CLIP's objective beside it."""

    def __init__(self, place: Callable[[Tensor], Tensor] = lambda value: value) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(5)
        self.visual = nn.Module()
        self.visual.transformer = nn.Module()
        self.visual.transformer.resblocks = nn.ModuleList()
        for shape in SHAPES:
            layer = nn.Module()
            layer.weight = nn.Parameter(place(torch.randn(shape, generator=generator)))
            self.visual.transformer.resblocks.append(layer)
        self.loss = build_loss("clip", num_samples=1, embed_dim=4)

    def optimizer(self, name: str) -> torch.optim.Optimizer:
        return build_optimizers(self.visual_only(), self.loss, OptimConfig(name=name, lr=1e-2, weight_decay=0.1))[0]

    def visual_only(self) -> nn.Module:
        towers = nn.Module()
        towers.visual = self.visual
        return towers

    def take_steps(self, optimizer: torch.optim.Optimizer, steps: range, lr: float = 1e-2) -> None:
        """Step with gradients that depend on the number of the step alone, and another rate at each."""
        for step in steps:
            generator = torch.Generator().manual_seed(step)
            set_learning_rate(optimizer, lr / (1 + step))
            for p in self.parameters():
                p.grad = torch.randn(p.shape, generator=generator)
                if isinstance(p, DTensor):
                    p.grad = distribute_tensor(p.grad, p.device_mesh, p.placements)
            optimizer.step()

    def equals(self, other: nn.Module) -> bool:
        return all(map(torch.equal, self.parameters(), other.parameters()))


def largest_differences(names: list[str]) -> dict[str, float]:
    """Largest difference between whole and sharded parameters after four steps, for each optimizer."""
    mesh = init_device_mesh("cpu", (distributed.world_size(),))
    found = {}
    for name in names:
        whole, parts = Layers(), Layers(lambda value: distribute_tensor(value, mesh, [Shard(0)]))
        for one in (whole, parts):
            one.take_steps(one.optimizer(name), range(4))
        pairs = zip(whole.parameters(), parts.parameters(), strict=True)
        found[name] = max(float((one - full_tensor(other)).detach().abs().max()) for one, other in pairs)
    return found
