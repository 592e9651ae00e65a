"""The one list of objectives: name → what it minimises, where it comes from, and how it is built.

To add an objective, add a row to `OBJECTIVES` (and a file, where it is no member of the family).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from disttempnet.errors import unknown_name
from disttempnet.losses.clip import ClipLoss
from disttempnet.losses.core import LossOutput, Objective
from disttempnet.losses.global_contrastive import GlobalContrastiveLoss, TauGradient
from disttempnet.losses.schedule import ConstantGamma, CosineGamma, Gamma
from disttempnet.losses.temperature import ConstantTemperature, NetworkForm, NetworkTemperature

__all__ = ["OBJECTIVES", "ClipLoss", "GlobalContrastiveLoss", "LossOutput", "Objective", "Recipe", "build_loss"]


@dataclass(frozen=True)
class Recipe:
    """A row of the list: `build` takes num_samples, embed_dim, seed and the objective's own arguments."""

    title: str
    formula: str
    source: str
    build: Callable[..., Objective]

    @property
    def arguments(self) -> dict[str, Any]:
        """The objective's own arguments and their defaults."""
        parameters = inspect.signature(self.build).parameters.values()
        return {p.name: p.default for p in parameters if p.default is not inspect.Parameter.empty}


def _clip(
    num_samples: int, embed_dim: int, seed: int, *, temperature: float = 0.07, learnable: bool = True
) -> Objective:
    return ClipLoss(temperature, learnable)


def _sogclr(num_samples: int, embed_dim: int, seed: int, *, temperature: float = 0.05, gamma: float = 0.8) -> Objective:
    return GlobalContrastiveLoss(num_samples, ConstantTemperature(temperature), ConstantGamma(gamma))


def _network_objective(
    num_samples: int,
    embed_dim: int,
    seed: int,
    schedule: Gamma,
    rho: float,
    tau_gradient: TauGradient,
    network: NetworkForm,
    **shape: Any,
) -> Objective:
    temperature = NetworkTemperature(embed_dim, form=network, rho=rho, seed=seed, **shape)
    return GlobalContrastiveLoss(num_samples, temperature, schedule, rho, tau_gradient)


def _tempnet(
    num_samples: int,
    embed_dim: int,
    seed: int,
    *,
    rho: float = 7.0,
    gamma: float = 0.8,
    tau_min: float = 0.005,
    tau_max: float = 0.05,
    network: NetworkForm = "icml24",
    prototypes: int = 256,
    dropout: float = 0.5,
    feature_scale: float = 1.0,
    tau_gradient: TauGradient = "fcco",
) -> Objective:
    return _network_objective(
        num_samples, embed_dim, seed, ConstantGamma(gamma), rho, tau_gradient, network,
        tau_min=tau_min, tau_max=tau_max, prototypes=prototypes, dropout=dropout, feature_scale=feature_scale,
    )  # fmt: skip


def _disttempnet_v1(
    num_samples: int,
    embed_dim: int,
    seed: int,
    *,
    rho: float = 7.0,
    gamma_min: float = 0.8,
    gamma_decay_epochs: float = 20.0,
    tau_min: float = 0.005,
    tau_max: float = 0.05,
    network: NetworkForm = "icml24",
    prototypes: int = 256,
    dropout: float = 0.5,
    feature_scale: float = 1.0,
    tau_gradient: TauGradient = "fcco",
) -> Objective:
    return _network_objective(
        num_samples, embed_dim, seed, CosineGamma(gamma_min, gamma_decay_epochs), rho, tau_gradient, network,
        tau_min=tau_min, tau_max=tau_max, prototypes=prototypes, dropout=dropout, feature_scale=feature_scale,
    )  # fmt: skip


_RGCL = "½ mean_i Σ_sides τ_i (log E_j exp(d_ij/τ_i) + ρ)"

OBJECTIVES: dict[str, Recipe] = {
    "clip": Recipe("CLIP", "½ mean_i Σ_sides log Σ_{j in batch} exp(d_ij/τ)", "arXiv 2103.00020", _clip),
    "sogclr": Recipe("SogCLR", "½ mean_i Σ_sides τ log E_j exp(d_ij/τ)", "arXiv 2202.12387", _sogclr),
    "tempnet": Recipe("TempNet", _RGCL + ", τ from a network, γ constant", "arXiv 2404.04575", _tempnet),
    "disttempnet": Recipe("DistTempNet", _RGCL + ", τ from a network, γ constant", "arXiv 2404.04575", _tempnet),
    "disttempnet-v1": Recipe(
        "DistTempNet-v1", _RGCL + ", τ from a network, γ on a cosine", "arXiv 2404.04575, 2407.01445", _disttempnet_v1
    ),
}


def build_loss(name: str, *, num_samples: int, embed_dim: int, seed: int = 0, **arguments: Any) -> Objective:
    """Build an objective by name.

    Args:
        name: a key of `OBJECTIVES`.
        num_samples: N, the size of the data set; sample ids lie in [0, N).
        embed_dim: D, width of the features.
        seed: of the temperature network's start and dropout.
        arguments: the objective's own; see `OBJECTIVES[name].arguments`.

    Returns:
        A module called as `loss(image_features, text_features, ids)` with this rank's rows; build it after
        torch.distributed is initialised. It has `set_epoch(epoch)` and `temperatures(image, text)`.

    Raises:
        ValueError: unknown name or argument (the message lists what exists), or a value out of range.
    """
    if name not in OBJECTIVES:
        raise ValueError(unknown_name("objective", name, OBJECTIVES))
    recipe = OBJECTIVES[name]
    for argument in arguments:
        if argument not in recipe.arguments:
            raise ValueError(unknown_name(f"argument of objective {name}:", argument, recipe.arguments))
    try:
        return recipe.build(num_samples, embed_dim, seed, **arguments)
    except ValueError as error:
        raise ValueError(f"objective {name}: {error}") from None
    except TypeError as error:
        raise ValueError(f"objective {name}: wrong type of an argument: {error}") from None
