"""Patterns of names: braces, expanded as in a shell, and wildcards.

Names are counted before they are built: a pattern of a billion names is refused at once.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterator, Sequence
from itertools import product
from pathlib import Path
from typing import NamedTuple, TypeAlias

from disttempnet.errors import UserError

MOST_NAMES = 1_000_000  # the largest public data sets have some 200,000 shards
MOST_NESTED = 50
WILDCARDS = "*?["
BRACES_HINT = "braces hold a range of numbers, such as {00000..01242} or {00..98..2}, or names, as {a,b}"


class _Range(NamedTuple):
    """Range of numbers, zero-padded to `width`, or of code points of letters."""

    first: int
    last: int
    step: int
    width: int
    letters: bool


_Choice: TypeAlias = "str | _Range | list[_Names]"  # text, a range, or alternatives
_Names: TypeAlias = "list[_Choice]"  # one of each, joined


def expand_braces(pattern: str) -> Iterator[str]:
    """Yield the names of a pattern, expanded as in a shell: `a{08..10}` → a08, a09, a10; `{a,b{1..2}}` → a, b1, b2.

    Several braces multiply, the last varies fastest. Numbers are padded to the longer end if one begins with 0. A range
    may have a step, `{0..8..2}`, and may be of letters, `{a..d}`.

    Raises:
        UserError: other content in braces, a range that runs backwards, or over a million names.
    """
    names, end = _parse(pattern, 0, 0)
    if end < len(pattern):
        raise UserError(f"'{pattern}': a brace has no partner")
    if _count(names) > MOST_NAMES:
        raise UserError(f"'{pattern[:80]}' expands to over {MOST_NAMES:,} names: narrow its ranges")
    return _expanded(names)


def _parse(pattern: str, at: int, depth: int) -> tuple[_Names, int]:
    """Parse from `at` to the end, or to the comma or brace that ends an alternative; return names and end."""
    if depth > MOST_NESTED:
        raise UserError(f"'{pattern[:80]}': braces are nested over {MOST_NESTED} deep")
    names: _Names = []
    while at < len(pattern):
        if pattern[at] == "{":
            choice, at = _braces(pattern, at, depth + 1)
            names.append(choice)
        elif pattern[at] == "}" or (depth and pattern[at] == ","):
            break
        else:
            text = re.compile(r"[^{},]+" if depth else r"[^{}]+").match(pattern, at)
            assert text is not None
            names.append(text.group())
            at = text.end()
    return names, at


def _braces(pattern: str, begin: int, depth: int) -> tuple[_Choice, int]:
    """Parse the brace at `begin`; return its choices and the position after its partner."""
    alternatives: list[_Names] = []
    at = begin
    while at == begin or (at < len(pattern) and pattern[at] == ","):
        names, at = _parse(pattern, at + 1, depth)
        alternatives.append(names)
    if at == len(pattern):
        raise UserError(f"'{pattern}': a brace has no partner")
    if len(alternatives) > 1:
        return alternatives, at + 1
    return _range(pattern, pattern[begin : at + 1]), at + 1


def _range(pattern: str, braces: str) -> _Range:
    limits = re.fullmatch(r"\{(\d{1,18}|[a-z]|[A-Z])\.\.(\d{1,18}|[a-z]|[A-Z])(?:\.\.(\d{1,18}))?\}", braces)
    if limits is None or limits[1].isdigit() != limits[2].isdigit():
        raise UserError(f"'{pattern}': {braces} is no range and no list of names: {BRACES_HINT}")
    letters, step = not limits[1].isdigit(), int(limits[3] or 1)
    first, last = (ord(end) if letters else int(end) for end in limits.group(1, 2))
    if first > last:
        raise UserError(f"'{pattern}': the range {braces} runs backwards")
    if not step:
        raise UserError(f"'{pattern}': the range {braces} has step 0")
    padded = any(len(end) > 1 and end.startswith("0") for end in limits.group(1, 2))
    return _Range(first, last, step, max(map(len, limits.group(1, 2))) if padded else 0, letters)


def _count(names: _Names) -> int:
    return math.prod(map(_choices, names))


def _choices(choice: _Choice) -> int:
    if isinstance(choice, str):
        return 1
    if isinstance(choice, _Range):
        return (choice.last - choice.first) // choice.step + 1
    return sum(map(_count, choice))


def _expanded(names: _Names) -> Iterator[str]:
    return map("".join, product(*map(_texts, names)))


def _texts(choice: _Choice) -> Iterator[str]:
    if isinstance(choice, str):
        yield choice
    elif isinstance(choice, _Range):
        for number in range(choice.first, choice.last + 1, choice.step):
            yield chr(number) if choice.letters else f"{number:0{choice.width}d}"
    else:
        for names in choice:
            yield from _expanded(names)


def is_pattern(name: str) -> bool:
    """Tell whether a name has braces or wildcards."""
    return any(character in name for character in "{}" + WILDCARDS)


def matching(folder: Path, name: str) -> Sequence[Path]:
    """Return the paths in a folder that match a name without braces, sorted.

    A name with wildcards that exists as a file is that file. Hidden files match no wildcard.
    """
    path = folder / name
    if not any(character in name for character in WILDCARDS) or os.path.exists(path):
        return [path]
    found = folder.glob(name)
    return sorted(one for one in found if not any(part.startswith(".") for part in one.relative_to(folder).parts))
