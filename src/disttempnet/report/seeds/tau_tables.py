"""Tables of τ over seeds: final values, trajectory, correlation with concept frequency.

Only groups whose τ differs between pairs are shown.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from disttempnet.report.seeds.comparison import GroupComparison
from disttempnet.report.seeds.groups import Cell, SeedGroup, cell_of

TAU_SIDES = ("image", "text")
OF_PAIRS = ("mean", "min", "max", "std")  # of `CompactResult.tau`, over the pairs of a run
SHARES = (0.0, 0.25, 0.5, 0.75, 1.0)  # of the run, where the trajectory is sampled
SHARE_HEADS = ("at the start", "after a quarter", "half", "three quarters", "at the end")


class NotedTable(NamedTuple):
    """A table of texts: head, rows of equal length, and a note about them."""

    head: list[str]
    rows: list[list[str]]
    note: str


def groups_with_tau(comparison: GroupComparison) -> list[SeedGroup]:
    """Return the groups whose τ differs between pairs."""
    return [group for group in comparison.groups if any(result.tau_by_frequency for result in group.results)]


def tau_tables(comparison: GroupComparison) -> list[NotedTable]:
    """Return tables of the final τ and of the trajectory; empty where no τ differs between pairs."""
    shown = groups_with_tau(comparison)
    if not shown:
        return []
    final = NotedTable(
        ["τ at the end", "image side", "text side", "rank correlation with frequency, image", "text"],
        [[group.title, *final_tau(group), *correlations(group)] for group in shown],
        "τ of the first task's pairs: mean ± std over the pairs, range; then Spearman's correlation with the training "
        "frequency of the concept, mean (standard deviation) over the seeds",
    )
    trained = [group for group in shown if any(result.tau_curve for result in group.results)]
    if not trained:
        return [final]
    trajectory = NotedTable(
        ["τ in training", *SHARE_HEADS],
        [[group.title, *(_words(cell, 4) for cell in trajectory_cells(group))] for group in trained],
        "mean τ of the image side's training batches after that share of the run, mean (standard deviation) over the "
        "seeds",
    )
    return [final, trajectory]


def final_tau(group: SeedGroup) -> list[str]:
    """Return for each side mean ± std and range of the final τ; mean and std are averaged over the seeds."""
    words = []
    for side in TAU_SIDES:
        known = [result.tau[side] for result in group.results if side in result.tau]
        if not known:
            words.append("–")
            continue
        mean, low, high, std = zip(*known, strict=True)
        average = [sum(values) / len(values) for values in (mean, std)]
        words.append(f"{average[0]:.4f} ± {average[1]:.4f}, {min(low):.4f} to {max(high):.4f}")
    return words


def correlations(group: SeedGroup) -> list[str]:
    """Return for each side Spearman's correlation of τ with concept frequency, mean (std) over the seeds."""
    return [_words(cell, 2) for cell in _correlation_cells(group)]


def tau_series(group: SeedGroup) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Return epochs, and mean, minimum and maximum of τ over the seeds: float arrays of equal length.

    The epochs are all that some seed logged and every seed covers; curves are interpolated linearly.
    """
    curves = [result.tau_curve for result in group.results if result.tau_curve]
    every = np.unique(np.concatenate([curve["epoch"] for curve in curves]))
    first = max(curve["epoch"][0] for curve in curves)
    last = min(curve["epoch"][-1] for curve in curves)
    x = every[(every >= first) & (every <= last)]
    mean, low, high = (
        np.array([np.interp(x, curve["epoch"], curve[key]) for curve in curves]) for key in ("mean", "min", "max")
    )
    return x, mean.mean(0), low.min(0), high.max(0)


def trajectory_cells(group: SeedGroup) -> list[Cell]:
    """Return mean τ of the training batches at each of `SHARES` of the run; ends take the nearest logged value."""
    curves = [result.tau_curve for result in group.results if result.tau_curve]
    epochs = group.results[0].config["train"]["epochs"]
    at = [np.interp(np.array(SHARES) * epochs, curve["epoch"], curve["mean"]) for curve in curves]
    return [_cell(values) for values in zip(*at, strict=True)]


def tau_cells(group: SeedGroup) -> Iterator[tuple[str, Cell]]:
    """Yield every number of a group by name; minimum and maximum are averaged over the seeds as well."""
    for side in TAU_SIDES:
        known = [result.tau[side] for result in group.results if side in result.tau]
        for name, values in zip(OF_PAIRS, zip(*known, strict=True), strict=False):
            yield f"tau_{side}_{name}", _cell(values)
    for side, cell in zip(TAU_SIDES, _correlation_cells(group), strict=False):
        yield f"tau_{side}_rank_correlation_with_frequency", cell
    if any(result.tau_curve for result in group.results):
        for share, cell in zip(SHARES, trajectory_cells(group), strict=True):
            yield f"training_tau_image_mean@{share:g}", cell


def _cell(values: Sequence[float]) -> Cell:
    cell = cell_of(values)
    assert cell is not None
    return cell


def _correlation_cells(group: SeedGroup) -> list[Cell]:
    known = [result.tau_by_frequency["spearman"] for result in group.results if result.tau_by_frequency]
    return [_cell(values) for values in zip(*known, strict=True)]


def _words(cell: Cell, digits: int) -> str:
    spread = "" if cell.std is None else f" ({cell.std:.{digits}f})"
    return f"{cell.mean:.{digits}f}{spread}"
