"""The table of normaliser errors: what each objective keeps or predicts, and what a batch alone would give."""

from __future__ import annotations

from statistics import mean, stdev

from disttempnet.report.seeds.comparison import GroupComparison
from disttempnet.report.seeds.groups import SeedGroup
from disttempnet.report.seeds.tau_tables import NotedTable

NOT_MEASURED = "–"
MOST_PERCENT = 1000  # a mean above it is that of a few samples; the logarithm tells more


def normaliser_table(comparison: GroupComparison) -> NotedTable | None:
    """Return a row for each group whose runs measured errors (eval.normaliser_samples); None where none did."""
    groups = [group for group in comparison.groups if any(result.normaliser_error for result in group.results)]
    if not groups:
        return None
    return NotedTable(
        ["error of the normalisers", "kept or predicted, image", "text", "rms of log, image", "text", "batch alone"],
        [
            [
                group.title,
                *(_words(group, f"{side}_mean", percent=True) for side in ("image", "text")),
                *(_words(group, name) for name in ("image_log_rms", "text_log_rms", "batch_log_rms")),
            ]
            for group in groups
        ],
        "mean of exact/kept − 1 in per cent, then root mean square of log(kept/exact) in nats. Kept is what the "
        "objective tracks or predicts at the end, exact is over the pairs that were measured. Last the same of the "
        "normaliser that a batch alone gives. Mean (standard deviation) over the seeds",
    )


def _words(group: SeedGroup, name: str, percent: bool = False) -> str:
    found = [result.normaliser_error[name] for result in group.results if name in result.normaliser_error]
    if not found:
        return NOT_MEASURED
    factor, digits = (100, 0) if percent else (1, 2)
    if percent and factor * mean(found) > MOST_PERCENT:
        return f"over {MOST_PERCENT:,}"
    spread = f" ({factor * stdev(found):.{digits}f})" if len(found) > 1 else ""
    return f"{factor * mean(found):.{digits}f}{spread}".replace("-", "−")
