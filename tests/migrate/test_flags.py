"""A command line is read as argparse reads it; nothing on it is lost."""

from __future__ import annotations

import argparse

import pytest

from disttempnet.errors import UserError
from disttempnet.migrate.flags import SEVERAL, Flag, Values, read_flags, switch, table_of
from disttempnet.migrate.script import Word

TABLE = table_of(
    Flag("--lr", kind=float, default=1.0),
    Flag("--name"),
    Flag("--batch-size", kind=int, default=64),
    Flag("--batch-norm"),
    Flag("--sizes", kind=int, words=SEVERAL),
    switch("--fast"),
)


def read(*words: str) -> Values:
    return read_flags([Word(word) for word in words], TABLE, {})


def test_values_are_those_of_argparse() -> None:
    words = ["--lr=-1e-3", "--batch-s", "32", "--fast", "--name", "a b", "--sizes", "1", "2", "--lr", "3"]
    parser = argparse.ArgumentParser()
    parser.add_argument("--lr", type=float, default=1.0)
    parser.add_argument("--name")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--batch-norm")
    parser.add_argument("--sizes", nargs="+")
    parser.add_argument("--fast", action="store_true")
    expected = parser.parse_args(words)
    values = read(*words)
    for flag in TABLE:
        assert values[flag] == getattr(expected, flag[2:].replace("-", "_")), flag
    assert values.repeated == ["--lr"]
    assert not values.has("--batch-norm")


def test_unknown_flags_keep_their_values() -> None:
    values = read("--new", "1", "2", "--lr", "3", "--other=x", "--batch", "stray")
    assert [[word.text for word in words] for words in values.unknown] == [
        ["--new", "1", "2"],
        ["--other", "x"],
        ["--batch", "stray"],  # the beginning of two flags
    ]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--lr"], "--lr has no value"),
        (["--lr", "--fast"], "--lr has no value"),
        (["--fast=1"], "--fast is a switch"),
        (["--lr", "fast"], "--lr fast: not a number"),
        (["--batch-size", "1.5"], "--batch-size 1.5: not a whole number"),
    ],
)
def test_what_the_program_would_refuse_is_refused(words: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        _ = [read(*words)[flag] for flag in TABLE]


def test_a_number_that_the_script_does_not_say_asks_for_it() -> None:
    values = read_flags([Word("--lr"), Word("$rate", ("$rate",))], TABLE, {"rate": "set by a loop"})
    with pytest.raises(UserError, match="rate is set by a loop: add rate=VALUE"):
        _ = values["--lr"]
    values = read_flags([Word("--lr"), Word("$(f)", ("$(f)",))], TABLE, {})
    with pytest.raises(UserError, match="known only where the script runs"):
        _ = values["--lr"]
