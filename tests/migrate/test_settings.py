"""Settings are written as TOML that reads back as it was, whatever stands in them."""

from __future__ import annotations

import tomllib

from hypothesis import given, settings
from hypothesis import strategies as st

from disttempnet.migrate.settings import RunSettings, toml

VALUES = st.one_of(
    st.booleans(),
    st.integers(-(2**60), 2**60),
    st.floats(allow_nan=False, allow_infinity=False),
    st.text(st.characters(exclude_categories=["Cs"])),
)


SOURCES = st.lists(st.fixed_dictionaries({"path": st.text("a\\\"'\n\x07é #"), "weight": VALUES}))


@settings(max_examples=60, deadline=None)
@given(value=st.one_of(VALUES, SOURCES), origin=st.text())
def test_every_value_and_comment_reads_back(value: object, origin: str) -> None:
    found = RunSettings()
    found.set("name", "x", origin)
    found.set("data.train", value, origin)
    found.dropped.append((origin, origin))
    text = toml(found, [f"{origin} heading"])
    assert tomllib.loads(text) == {"name": "x", "data": {"train": value}}


def test_comments_are_wrapped_and_commands_are_not() -> None:
    found = RunSettings()
    found.set("name", "n" * 90, "a long comment " * 8)
    found.commands.append("disttempnet evaluate " + "word " * 60)
    lines = toml(found, ["heading"]).splitlines()
    assert all(len(line) <= 118 for line in lines if "disttempnet" not in line)
    assert sum("word" in line for line in lines) == 1
