"""Objectives: a new one is a row of OBJECTIVES in registry.py.

    registry.py             OBJECTIVES: name → spec, the one list; build_loss
    objective.py            what every objective shares: Features, LossOutput, exact arithmetic
    global_contrastive.py   the estimator and its exact surrogate: CLIP, SogCLR … DistTempNet-v1
    sample_state.py         tables of log u, τ … of every sample, sharded over the ranks
    distillation.py         cross-entropy with a reference model
    popularity.py           a learned offset of every sample as a negative
    drift.py                how far the normalisers have moved since a visit
    schedule.py             the inner learning rate γ
    contrast/               statistics and gradients of all pairs
    temperature/            constant, learnable, per sample, by a network
    normaliser/             predicted normalisers, in place of a table
    normaliser_error.py     the error of normalisers, measured over a sample
    minibatch/              siglip, cyclip, vicreg, onlineclr, amorlip
    own_parameters.py       an objective's parameters, in any loop

The mathematics: docs/objectives.md.
"""

from __future__ import annotations

from disttempnet.losses.global_contrastive import GlobalContrastiveLoss
from disttempnet.losses.normaliser_error import has_normalisers, normaliser_errors
from disttempnet.losses.objective import Features, LossOutput, Objective
from disttempnet.losses.registry import (
    ARGUMENT_RANGES,
    OBJECTIVES,
    ObjectiveSpec,
    build_loss,
    rebuild_loss,
    with_later_arguments,
)
from disttempnet.losses.sample_state import gather_state

__all__ = [
    "ARGUMENT_RANGES",
    "OBJECTIVES",
    "Features",
    "GlobalContrastiveLoss",
    "LossOutput",
    "Objective",
    "ObjectiveSpec",
    "build_loss",
    "gather_state",
    "has_normalisers",
    "normaliser_errors",
    "rebuild_loss",
    "with_later_arguments",
]
