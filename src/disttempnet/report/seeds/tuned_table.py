"""The table of settings that `compare` chose by trials: how many, by what, and which values."""

from __future__ import annotations

from disttempnet.report.seeds.comparison import GroupComparison
from disttempnet.report.seeds.tau_tables import NotedTable

NOT_TUNED = "–"
AT_EDGE = " *"


def tuned_table(comparison: GroupComparison) -> NotedTable | None:
    """Return a row for each group; None where no setting was chosen by trials."""
    tuned = [group.results[0].tuned for group in comparison.groups]
    found = [one for one in tuned if one is not None]
    if not found:
        return None
    keys = list(dict.fromkeys(key for one in found for key in one.chosen))
    rows = []
    for group, one in zip(comparison.groups, tuned, strict=True):
        values = [NOT_TUNED] * len(keys)
        if one is not None:
            edge = [AT_EDGE if key in one.at_edge else "" for key in keys]
            values = [
                f"{one.chosen[key]}{mark}" if key in one.chosen else NOT_TUNED
                for key, mark in zip(keys, edge, strict=True)
            ]
        rows.append([group.title, str(one.trials) if one else "0", *values])
    by = ", ".join(dict.fromkeys(f"{one.metric}, seed {one.seed}" for one in found))
    note = f"settings with the highest {by}, before the seeds of the table were trained"
    if any(one.at_edge for one in found):
        note += "; * the lowest or highest value that was tried"
    return NotedTable(["settings chosen by trials", "trials", *keys], rows, note)
