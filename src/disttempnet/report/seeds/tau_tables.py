"""τ over seeds as rows of words or cells: where it ends, how it came there, how it goes with concept frequency.

Shown are groups whose τ differs between pairs.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from disttempnet.report.seeds.groups import Cell, Comparison, Group, cell_of

SIDES = ("image", "text")
OF_PAIRS = ("mean", "min", "max", "std")  # of `Result.tau`, over the pairs of a run
SHARES = (0.0, 0.25, 0.5, 0.75, 1.0)  # of the run, at which its trajectory is told
SHARE_HEADS = ("at the start", "after a quarter", "half", "three quarters", "at the end")


class TauTable(NamedTuple):
    """A head, rows of as many words, and what the numbers are."""

    head: list[str]
    rows: list[list[str]]
    note: str


def groups_with_tau(comparison: Comparison) -> list[Group]:
    """The groups whose τ differs between pairs."""
    return [group for group in comparison.groups if any(result.tau_by_frequency for result in group.results)]


def tau_tables(comparison: Comparison) -> list[TauTable]:
    """The final τ, and the trajectory; empty where no τ differs between pairs."""
    shown = groups_with_tau(comparison)
    if not shown:
        return []
    final = TauTable(
        ["τ at the end", "image side", "text side", "rank correlation with frequency, image", "text"],
        [[group.title, *final_tau(group), *correlations(group)] for group in shown],
        "τ of the first task's pairs: mean ± std over the pairs, range; then Spearman's correlation with how often the "
        "concept was trained on, mean (standard deviation) over the seeds",
    )
    trained = [group for group in shown if any(result.tau_curve for result in group.results)]
    if not trained:
        return [final]
    trajectory = TauTable(
        ["τ in training", *SHARE_HEADS],
        [[group.title, *(_words(cell, 4) for cell in trajectory_cells(group))] for group in trained],
        "mean τ of the image side's training batches after that share of the run, mean (standard deviation) over the "
        "seeds",
    )
    return [final, trajectory]


def final_tau(group: Group) -> list[str]:
    """For each side: mean, least, greatest and spread of the final τ, averaged over the seeds but for the bounds."""
    words = []
    for side in SIDES:
        known = [result.tau[side] for result in group.results if side in result.tau]
        if not known:
            words.append("–")
            continue
        mean, low, high, std = zip(*known, strict=True)
        average = [sum(values) / len(values) for values in (mean, std)]
        words.append(f"{average[0]:.4f} ± {average[1]:.4f}, {min(low):.4f} to {max(high):.4f}")
    return words


def correlations(group: Group) -> list[str]:
    """For each side: Spearman's correlation of τ with the frequency of the concept, mean (std) over the seeds."""
    return [_words(cell, 2) for cell in _correlation_cells(group)]


def tau_series(group: Group) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Epochs, mean over the seeds, least and greatest τ: at every epoch that some seed logged and all have reached.

    Between the epochs that a seed logged, its curve is a straight line.
    """
    curves = [result.tau_curve for result in group.results if result.tau_curve]
    every = np.unique(np.concatenate([curve["epoch"] for curve in curves]))
    first, last = (f(curve["epoch"][end] for curve in curves) for f, end in ((max, 0), (min, -1)))
    x = every[(every >= first) & (every <= last)]
    mean, low, high = (
        np.array([np.interp(x, curve["epoch"], curve[key]) for curve in curves]) for key in ("mean", "min", "max")
    )
    return x, mean.mean(0), low.min(0), high.max(0)


def trajectory_cells(group: Group) -> list[Cell]:
    """Mean τ in the training batches after each of `SHARES` of the run; at its ends what was logged nearest to them."""
    curves = [result.tau_curve for result in group.results if result.tau_curve]
    epochs = group.results[0].config["train"]["epochs"]
    at = [np.interp(np.array(SHARES) * epochs, curve["epoch"], curve["mean"]) for curve in curves]
    return [_cell(values) for values in zip(*at, strict=True)]


def tau_cells(group: Group) -> Iterator[tuple[str, Cell]]:
    """Every number of a group by name; here the bounds, too, are averaged over the seeds."""
    for side in SIDES:
        known = [result.tau[side] for result in group.results if side in result.tau]
        for name, values in zip(OF_PAIRS, zip(*known, strict=True), strict=False):
            yield f"tau_{side}_{name}", _cell(values)
    for side, cell in zip(SIDES, _correlation_cells(group), strict=False):
        yield f"tau_{side}_rank_correlation_with_frequency", cell
    if any(result.tau_curve for result in group.results):
        for share, cell in zip(SHARES, trajectory_cells(group), strict=True):
            yield f"training_tau_image_mean@{share:g}", cell


def _cell(values: Sequence[float]) -> Cell:
    cell = cell_of(values)
    assert cell is not None
    return cell


def _correlation_cells(group: Group) -> list[Cell]:
    known = [result.tau_by_frequency["spearman"] for result in group.results if result.tau_by_frequency]
    return [_cell(values) for values in zip(*known, strict=True)]


def _words(cell: Cell, digits: int) -> str:
    spread = "" if cell.std is None else f" ({cell.std:.{digits}f})"
    return f"{cell.mean:.{digits}f}{spread}"
