"""Classes in words: text files of names and templates as people have them, and what the names of folders mean.

ImageNet's folders are called after synsets of WordNet (n01440764). Their names are those that open_clip's numbers are
made with; timm lists the synsets in the order of ImageNet's labels, which is that of open_clip's names.
"""

from __future__ import annotations

import codecs
import io
import re
from collections import Counter
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import disttempnet.models  # noqa: F401 (makes torchvision importable, which timm and open_clip want)
from disttempnet.data.source import MAX_TEXT
from disttempnet.errors import UserError
from disttempnet.io.files import read_regular
from disttempnet.sanitize import one_line

DEFAULT_TEMPLATE = "a photo of a {c}."
SYNSET = re.compile(r"n\d{8}")
NUMBER_PREFIX = re.compile(r"(n\d{8}|\d+)[-_. ]+(?=\D)")  # n02085620-Chihuahua of Stanford Dogs, 001.Albatross of CUB
NAMES_SHOWN = 5  # names in a note
BOMS = {codecs.BOM_UTF8: "utf-8-sig", codecs.BOM_UTF16_LE: "utf-16", codecs.BOM_UTF16_BE: "utf-16"}


def read_lines(path: Path) -> tuple[list[str], list[str]]:
    """Return the stripped lines of a text file, blank ones too, and notes on its encoding.

    Raises:
        UserError: it cannot be read.
    """
    try:
        data = read_regular(path, MAX_TEXT)
        codec = next((codec for bom, codec in BOMS.items() if data.startswith(bom)), "utf-8")
        text, notes = data.decode(codec), []
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        text, notes = data.decode("latin-1"), [f"{path.name} is not UTF-8: read as Latin-1"]
    return [line.strip() for line in io.StringIO(text, newline=None)], notes


def without_trailing_blanks(lines: Sequence[str]) -> list[str]:
    """Return the lines up to the last that is not blank."""
    last = max((number for number, line in enumerate(lines, 1) if line), default=0)
    return list(lines[:last])


def templates_of(path: Path) -> list[str]:
    """Return templates, a line each, of a file that may be missing. Raises UserError where one has no {c}."""
    templates = [line for line in read_lines(path)[0] if line] if path.is_file() else []
    for template in templates:
        if "{c}" not in template:
            raise UserError(f"{path}: '{template}' has no {{c}} for the class name")
    return templates or [DEFAULT_TEMPLATE]


def names_of(keys: Sequence[str]) -> tuple[list[str], list[str]]:
    """Return class names for keys (names of folders, or labels of samples), and notes.

    A synset becomes ImageNet's name of it. A number or synset before a name is removed, unless that makes two names
    equal. _ becomes a space.
    """
    imagenet = imagenet_names() if any(SYNSET.fullmatch(key) for key in keys) else {}
    bare = [key[match.end() :] if (match := NUMBER_PREFIX.match(key)) else key for key in keys]
    times = Counter(map(_spaced, bare))
    kept = [name if times[_spaced(name)] == 1 else key for key, name in zip(keys, bare, strict=True)]
    names, notes = [imagenet.get(key) or _spaced(name) for key, name in zip(keys, kept, strict=True)], []
    known = [f"{key} = {name}" for key, name in zip(keys, names, strict=True) if key in imagenet]
    if known:
        notes.append(f"{len(known)} synsets take ImageNet's class names: {first_few(known)}")
    if unknown := [key for key in keys if SYNSET.fullmatch(key) and key not in imagenet]:
        notes.append(
            f"{len(unknown)} synsets are not in ImageNet-1k and make no class names: {first_few(unknown)}: "
            "name them in classnames.txt"
        )
    if stripped := [f"{key} = {_spaced(name)}" for key, name in zip(keys, kept, strict=True) if key != name]:
        notes.append(f"numbers before class names are removed: {first_few(stripped)}")
    if numbers := [key for key in keys if key.strip().isdecimal()]:
        notes.append(
            f"{len(numbers)} classes are named by numbers, which mean nothing to a text tower: {first_few(numbers)}: "
            "name them in classnames.txt"
        )
    return names, notes + about_equal(names)


def about_equal(names: Sequence[str]) -> list[str]:
    """Return notes on classes with equal names."""
    equal = [f"'{name}' {count} times" for name, count in Counter(names).items() if count > 1]
    return [f"classes with equal names, which no prompt can distinguish: {first_few(equal)}"] if equal else []


def _spaced(name: str) -> str:
    return name.replace("_", " ")


@cache
def imagenet_names() -> dict[str, str]:
    """Return synset → class name of ImageNet-1k's 1,000 classes, in the order of their labels."""
    from open_clip import IMAGENET_CLASSNAMES
    from timm.data import ImageNetInfo

    return dict(zip(ImageNetInfo("imagenet-1k").label_names(), IMAGENET_CLASSNAMES, strict=True))


def first_few(names: Sequence[str]) -> str:
    """Return the first few names in one line."""
    return ", ".join(map(one_line, names[:NAMES_SHOWN])) + (", …" if len(names) > NAMES_SHOWN else "")
