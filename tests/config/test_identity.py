"""Identity of a run: the keys that matter, and the differences between two configs."""

from __future__ import annotations

from disttempnet.config import Config, defaults
from disttempnet.config.identity import (
    MAY_CHANGE_ON_RESUME,
    NO_EFFECT_ON_RESULT,
    config_differences,
    value_at,
)


def test_differences_name_key_and_both_values() -> None:
    old = {"name": "a", "data": {"train": "x", "limit": 0}, "loss": {"name": "clip"}}
    new = {"name": "b", "data": {"train": "y", "limit": 0}, "loss": {"name": "clip", "tau": 0.1}, "eval": {"batch": 2}}
    assert config_differences(old, new) == [
        ("data.train", "x", "y"),
        ("eval", None, {"batch": 2}),
        ("loss.tau", None, 0.1),
        ("name", "a", "b"),
    ]
    assert config_differences(old, new, {"name", "loss", "eval", "data.train"}) == []
    assert config_differences(old, old) == []


def test_a_value_is_found_by_its_dotted_key() -> None:
    table = {"name": "a", "data": {"train": "x"}}
    assert [value_at(table, key) for key in ("name", "data", "data.train")] == ["a", {"train": "x"}, "x"]


def test_ignored_keys_are_keys_of_a_config() -> None:
    known = {*Config.model_fields, *defaults(), "data.train", "data.index"}  # data.index is of earlier versions
    assert known >= MAY_CHANGE_ON_RESUME > NO_EFFECT_ON_RESULT
