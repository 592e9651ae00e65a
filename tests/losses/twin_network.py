"""The temperature networks of a loss, read out as plain tensors and evaluated by the twin."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tests.losses.oracle import mlp_temperature, tempnet

MODES = ("fcco", "batch")
SYMBOLS = {  # ending of the parameter's name → symbol in oracle.tempnet and .mlp_temperature
    "weight": "W",
    "bias": "b",
    "prototypes": "P",
    "scaler": "scaler",
    "out_weight": "v",
    "out_bias": "v0",
}


@dataclass
class Weights:
    """Copies with gradient of both networks' parameters: symbols → tensors, and the names they have in the loss."""

    image: dict[str, Tensor]
    text: dict[str, Tensor]
    names: dict[tuple[str, str], str]

    def named(self) -> Iterator[tuple[str, Tensor]]:
        for (side, symbol), name in self.names.items():
            yield name, getattr(self, side)[symbol]


def weights_of(loss: nn.Module) -> Weights:
    weights = Weights({}, {}, {})
    for name, parameter in loss.named_parameters():
        *_, side, ending = name.split(".")
        symbol = SYMBOLS[ending]
        getattr(weights, side)[symbol] = parameter.detach().double().clone().requires_grad_()
        weights.names[side, symbol] = name
    return weights


def twin_taus(
    weights: Weights, x: Tensor, y: Tensor, recipe: dict, masks: tuple[Tensor, Tensor] | None = None
) -> Tensor:
    """τ [2, B] of the ICML'24 networks, or of the mlp where the recipe says so: images on side 0, texts on side 1."""
    masks = masks or (torch.ones_like(x), torch.ones_like(y))
    bounds = recipe["tau_min"], recipe["tau_max"]
    scale = recipe.get("feature_scale", 1.0) or math.sqrt(x.shape[1])
    tau = mlp_temperature if recipe.get("network") == "mlp" else tempnet
    return torch.stack(
        [
            tau(weights.image, x.detach().double() * scale, *bounds, masks[0].double()),
            tau(weights.text, y.detach().double() * scale, *bounds, masks[1].double()),
        ]
    )
