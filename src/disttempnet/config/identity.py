"""Identity of a run: the keys that make two runs different, and the differences between two configs."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

# Keys that change a result by rounding at most: runs that differ in these alone are the same run.
NO_EFFECT_ON_RESULT = {
    "name", "out", "data.workers", "train.trackers", "train.tracker_project", "train.log_every",
    "train.checkpoint_epochs", "train.checkpoint_every", "train.keep",
    "train.timeout_minutes", "train.compile", "train.accumulate", "train.checkpoint_activations", "train.shard",
    "train.ring", "train.cache_folder", "eval.batch", "eval.data_root", "reference.cache_folder",
    "data.index",  # of runs before sources had indexes of their own
}  # fmt: skip
# Keys that may also change when a run is resumed: the data may have moved (its digest is compared).
MAY_CHANGE_ON_RESUME = NO_EFFECT_ON_RESULT | {"data.train", "train.stop_after_steps", "eval"}


def config_differences(
    old: dict[str, Any], new: dict[str, Any], ignored: Collection[str] = (), prefix: str = ""
) -> list[tuple[str, Any, Any]]:
    """Return (section.key, old value, new value) for each key in which two configs differ.

    Args:
        old, new: configs as plain tables (`public_table`).
        ignored: dotted keys or sections that may differ.
        prefix: put before each key.
    """
    found = []
    for key in sorted(old.keys() | new.keys()):
        name, before, after = prefix + key, old.get(key), new.get(key)
        if name in ignored:
            continue
        if isinstance(before, dict) and isinstance(after, dict):
            found += config_differences(before, after, ignored, name + ".")
        elif before != after:
            found.append((name, before, after))
    return found


def value_at(table: dict[str, Any], key: str) -> Any:
    """Return the value or section that a dotted key names in a nested table."""
    value: Any = table
    for part in key.split("."):
        value = value[part]
    return value
