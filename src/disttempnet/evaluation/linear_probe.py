"""Linear probe: L2-regularised logistic regression on fixed features, its strength chosen on a held-out part.

The protocol is that of CLIP (arXiv 2103.00020, appendix A.3): L-BFGS with at most 1,000 iterations, λ from 1e-6 to 1e6
by a search that halves its steps down to an eighth of a decade, then one fit on the whole train split. Every fit starts
from zero and depends on features and λ alone, so that ranks may each take a part of the fits.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from disttempnet import distributed
from disttempnet.errors import UserError

FIRST_EXPONENTS = (-6.0, -4.0, -2.0, 0.0, 2.0, 4.0, 6.0)  # of λ = 10^exponent
SEARCH_STEPS = (1.0, 0.5, 0.25, 0.125)  # around the best so far
HELD_OUT_SHARE = 0.2  # of the samples of each class
MOST_ITERATIONS = 1000
ROWS = 65536  # whose logits are in memory at once


class FittedProbe(NamedTuple):
    """A linear classifier of features with a one appended.

    Attributes:
        weights: [C, D + 1], the last column is the bias.
        exponent: of λ = 10^exponent.
        held_out: samples that λ was chosen on; accuracy: of those classified right, with the chosen λ.
    """

    weights: Tensor
    exponent: float
    held_out: int
    accuracy: float

    def predict_with(self, features: Tensor) -> Tensor:
        """Return features [n, D] with a one appended, in the precision of the weights, for `metrics.predict`."""
        return pad(features.to(self.weights), (0, 1), value=1.0)


def fit_probe(features: Tensor, labels: Tensor, classes: int) -> FittedProbe:
    """Choose λ on a held-out part, then fit on all samples.

    Every rank calls this with the same arguments and gets the same: the fits of a search are sharded over ranks, and
    rank 0's last fit is sent to all.

    Args:
        features: [n, D].
        labels: int64 [n], below `classes`.
        classes: C.

    Raises:
        UserError: no class has two samples, so that nothing can be held out.
    """
    x = with_one(features)
    held = held_out_rows(labels.tolist())
    if not held:
        raise UserError("its train split has no class with enough samples to hold some out")
    chosen = torch.zeros(len(labels), dtype=torch.bool, device=x.device)
    chosen[held] = True
    fit_x, fit_y, held_x, held_y = x[~chosen], labels[~chosen], x[chosen], labels[chosen]

    def scores(exponents: Sequence[float]) -> list[float]:
        """Return the accuracy on the held-out part for each λ."""

        def mine() -> dict[int, float]:
            found = {}
            for i in range(distributed.rank(), len(exponents), distributed.world_size()):
                weights = fit_logistic(fit_x, fit_y, classes, 10.0 ** exponents[i])
                found[i] = float(((held_x @ weights.T).argmax(1) == held_y).double().mean())
            return found

        every: dict[int, float] = {}
        for part in distributed.gather_objects(distributed.together(mine)):
            every |= part
        return [every[i] for i in range(len(exponents))]

    exponent, accuracy = search_exponent(scores)

    # The last fit is rank 0's: a sum with zeros leaves every bit as it is.
    weights = torch.zeros(classes, x.shape[1], dtype=x.dtype, device=x.device)
    if distributed.is_main():
        weights = fit_logistic(x, labels, classes, 10.0**exponent)
    return FittedProbe(distributed.all_sum(weights), exponent, len(held), accuracy)


def with_one(features: Tensor) -> Tensor:
    """Return features [n, D] with a one appended: float64 on a CPU, where it costs little, else float32."""
    dtype = torch.float64 if features.device.type == "cpu" else torch.float32
    return pad(features.to(dtype), (0, 1), value=1.0)


def held_out_rows(labels: Sequence[int]) -> list[int]:
    """Return the rows that λ is chosen on: a fifth of each class, at least one of two, the same at every call."""
    order = np.random.default_rng(0).permutation(len(labels))
    rows: dict[int, list[int]] = {}
    for row in order.tolist():
        rows.setdefault(labels[row], []).append(row)
    held = []
    for members in rows.values():
        if len(members) > 1:
            held += members[: max(1, int(HELD_OUT_SHARE * len(members)))]
    return sorted(held)


def search_exponent(scores: Callable[[Sequence[float]], Sequence[float]]) -> tuple[float, float]:
    """Return the exponent of the best λ and its score; of equal scores the stronger regularisation.

    Args:
        scores: exponents → scores.
    """
    known = dict(zip(FIRST_EXPONENTS, scores(FIRST_EXPONENTS), strict=True))

    def best() -> float:
        return max(known, key=lambda exponent: (known[exponent], exponent))

    for step in SEARCH_STEPS:
        near = [best() - step, best() + step]
        new = [one for one in near if FIRST_EXPONENTS[0] <= one <= FIRST_EXPONENTS[-1] and one not in known]
        known |= dict(zip(new, scores(new), strict=True))
    return best(), known[best()]


def fit_logistic(x: Tensor, labels: Tensor, classes: int, strength: float) -> Tensor:
    """Return the weights [C, D + 1] that minimise Σ_i CE_i + λ/2 ‖W‖² by L-BFGS; the bias is not regularised.

    Args:
        x: features with a one as their last column [n, D + 1].
        strength: λ; scikit-learn's C is 1/λ.
    """
    weights = torch.zeros(classes, x.shape[1], dtype=x.dtype, device=x.device, requires_grad=True)
    decay = torch.ones_like(weights[0])
    decay[-1] = 0.0
    count = len(x)

    def closure() -> Tensor:
        """Write the closed-form gradient of the mean objective, in blocks of rows, and return its value."""
        with torch.no_grad():
            value = 0.5 * strength * (weights.square() * decay).sum()
            gradient = strength * weights * decay
            for start in range(0, count, ROWS):
                rows, own = x[start : start + ROWS], labels[start : start + ROWS].unsqueeze(1)
                logits = rows @ weights.T
                norm = logits.logsumexp(1, keepdim=True)
                value = value + (norm - logits.gather(1, own)).sum()
                share = (logits - norm).exp_()
                share.scatter_add_(1, own, -torch.ones_like(norm))
                gradient = gradient + share.T @ rows
            weights.grad = gradient / count
            return value / count

    optimizer = torch.optim.LBFGS(
        [weights],
        max_iter=MOST_ITERATIONS,
        tolerance_grad=1e-7,
        tolerance_change=1e-12,
        history_size=20,
        line_search_fn="strong_wolfe",
    )
    optimizer.step(closure)
    return weights.detach()
