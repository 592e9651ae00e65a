"""Flags of training scripts: tables of what each becomes, and the reading of a command line as argparse does it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from disttempnet.errors import UserError
from disttempnet.migrate.script import Word

SEVERAL = -1  # words behind a flag, up to the next flag
Value = Any  # of a flag: bool, int, float, str, or a list of words


@dataclass(frozen=True)
class Flag:
    """A flag of a training script.

    Attributes:
        name: as on the command line.
        becomes: config keys, or a command; empty: it has no counterpart.
        about: how it becomes them, or why it has none; may be empty for a plain copy.
        default: its value where the command leaves it out; None: it has none.
        kind: type of its value; bool: a switch without a value.
        words: how many words follow it; SEVERAL: up to the next flag.
    """

    name: str
    becomes: str = ""
    about: str = ""
    default: Value = None
    kind: type = str
    words: int = 1


def switch(name: str, becomes: str = "", about: str = "") -> Flag:
    """Return a flag without a value, which is false where it is left out."""
    return Flag(name, becomes, about, default=False, kind=bool, words=0)


def table_of(*flags: Flag) -> dict[str, Flag]:
    """Return name → flag."""
    table = {flag.name: flag for flag in flags}
    assert len(table) == len(flags), "a flag is listed twice"
    return table


@dataclass
class Values:
    """Values of a command's flags; reading one marks it as used.

    Attributes:
        given: flag → its words on the command line.
        unknown: words that belong to no known flag, by the flag that they follow.
        repeated: flags that are given more than once; the last one counts.
    """

    table: Mapping[str, Flag]
    given: dict[str, tuple[Word, ...]]
    unknown: list[tuple[Word, ...]]
    repeated: list[str]
    why_unset: Mapping[str, str] = field(default_factory=dict)

    def has(self, name: str) -> bool:
        """Return whether the command has a flag."""
        assert name in self.table, name
        return name in self.given

    def __getitem__(self, name: str) -> Value:
        """Return the value of a flag, or its default.

        Raises:
            UserError: a number that the script does not say, or no number.
        """
        flag = self.table[name]
        if name not in self.given:
            return flag.default
        words = self.given[name]
        if flag.kind is bool:
            return True
        if flag.words == SEVERAL:
            return [word.text for word in words]
        if flag.kind is str:
            return words[0].text
        if words[0].unset:
            raise UserError(f"{name} {words[0].text}: {self.explain(words[0])}")
        try:
            return flag.kind(words[0].text)
        except ValueError:
            kind = {int: "a whole number", float: "a number"}[flag.kind]
            raise UserError(f"{name} {words[0].text}: not {kind}") from None

    def as_written(self, name: str) -> str:
        """Return a flag with its words, as on the command line."""
        return " ".join([name, *(word.text for word in self.given.get(name, ()))])

    def explain(self, word: Word) -> str:
        """Return why a word could not be filled in, and what to do."""
        part = word.unset[0]
        name = part.strip("${}").partition(":")[0]
        if not name.isidentifier():
            return f"{part} is known only where the script runs: put the value into the script"
        why = self.why_unset.get(name, "set nowhere in the script")
        return f"{name} is {why}: add {name}=VALUE to the command"


def read_flags(words: Sequence[Word], table: Mapping[str, Flag], why_unset: Mapping[str, str]) -> Values:
    """Sort the words behind a program into the values of its flags.

    As argparse does: `--flag value` or `--flag=value`, a flag may be shortened to a beginning that only it has, and the
    last of several counts.

    Raises:
        UserError: a flag without its value.
    """
    given: dict[str, tuple[Word, ...]] = {}
    unknown: list[tuple[Word, ...]] = []
    repeated: list[str] = []
    rest = list(words)
    while rest:
        word = rest.pop(0)
        name, equals, attached = word.text.partition("=")
        flag = _named(name, table) if name.startswith("-") else None
        follows = [Word(attached, word.unset)] if equals else []
        if flag is None or flag.words == SEVERAL:
            # up to the next flag: a number below zero is a value
            while rest and not _is_flag(rest[0].text):
                follows.append(rest.pop(0))
        elif not follows:
            for _ in range(flag.words):
                if not rest or _is_flag(rest[0].text):
                    raise UserError(f"{flag.name} has no value in the script")
                follows.append(rest.pop(0))
        if flag is None:
            unknown.append((Word(name, word.unset), *follows) if equals else (word, *follows))
            continue
        if flag.kind is bool and equals:
            raise UserError(f"{word.text}: {flag.name} is a switch and takes no value")
        if flag.name in given and flag.name not in repeated:
            repeated.append(flag.name)
        given[flag.name] = tuple(follows)
    return Values(table, given, unknown, repeated, why_unset)


def _named(name: str, table: Mapping[str, Flag]) -> Flag | None:
    if name in table:
        return table[name]
    longer = [flag for known, flag in table.items() if name.startswith("--") and known.startswith(name)]
    return longer[0] if len(longer) == 1 and len(name) > 2 else None


def _is_flag(text: str) -> bool:
    return text.startswith("-") and not text[1:2].isdigit() and text[1:2] != "."
