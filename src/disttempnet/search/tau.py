"""τ of a classification: the one that the model was trained with, of each image where it has one of its own."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import normalize

from disttempnet.losses import Objective
from disttempnet.models import Towers

SAME_TAU = 1e-6  # a smaller relative range of τ is one temperature


class ImageTau:
    """τ that divides the cosines of an image, and the range of those that were given.

    A run's objective gives τ of every image: one number, or what its temperature network predicts from the image. An
    objective with a τ for each training sample has none for other images: the checkpoint's logit scale stands in, as
    it does for a model that is no run.

    Args:
        towers: with open_clip's logit scale, one over τ.
        loss: of a run, on the CPU.
        objective: its name.
    """

    def __init__(self, towers: Towers, loss: Objective | None = None, objective: str = "") -> None:
        self.loss, self.objective = loss, objective
        self.scale = float(towers.module.logit_scale.detach().double().exp().flatten()[0])
        one = normalize(torch.ones(1, towers.embed_dim), dim=1)
        self.of_objective = loss is not None and loss.temperatures(one, one) is not None
        self.low, self.high, self.total, self.count = math.inf, 0.0, 0.0, 0

    def __call__(self, image: Tensor) -> Tensor:
        """Return τ, float64 [n], of unit features [n, D]."""
        tau = torch.full((len(image),), 1 / self.scale, dtype=torch.float64)
        if self.loss is not None and self.of_objective:
            found = self.loss.temperatures(image, image)
            assert found is not None, "an objective has a τ of all images or of none"
            tau = found[0].double()
        if len(tau):
            self.low, self.high = min(self.low, float(tau.min())), max(self.high, float(tau.max()))
            self.total, self.count = self.total + float(tau.sum()), self.count + len(tau)
        return tau

    def describe(self) -> str:
        """Say in one line which τ was used."""
        if self.high - self.low > SAME_TAU * self.high:
            mean = self.total / self.count
            network = f"the temperature network of the run ({self.objective})"
            return f"τ of each image by {network}: {self.low:.4g} to {self.high:.4g}, mean {mean:.4g}"
        return f"τ = {self.high:.4g}, {self._origin()}"

    def _origin(self) -> str:
        if self.loss is None:
            return "one over the model's logit scale"
        if self.of_objective:
            return f"the run's ({self.objective})"
        if self.loss.tracked_temperatures() is not None:
            return f"the mean of the run's last batch: {self.objective} has a τ for each training sample alone"
        return f"CLIP's first value: {self.objective} has none"
