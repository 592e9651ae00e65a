"""Paths of flags and configs: `~` is expanded wherever a path is read, and an empty path is an error."""

from __future__ import annotations

import argparse
import os
import re
from dataclasses import dataclass
from typing import Any

PREFIXED = re.compile(r"((?:[A-Za-z][\w-]*:)*)(~.*)", re.DOTALL)  # folder:~/photos, local-dir:~/model


def expand_home(text: str) -> str:
    """Return a path, or a name of data that holds one (`folder:PATH`, `A::B`), with `~` and `~NAME` expanded.

    Raises:
        ValueError: an unknown home folder.
    """
    return "::".join(_expanded(part) for part in text.split("::"))


def _expanded(text: str) -> str:
    found = PREFIXED.fullmatch(text)
    if found is None:
        return text
    path = os.path.expanduser(found[2])
    if path.startswith("~"):
        raise ValueError(f"'{text}': unknown home folder: write the full path (./~… is a file of that name)")
    return found[1] + path


def path_argument(text: str) -> str:
    """Return the path of a flag, for argparse's `type`: `~` expanded, never empty or blank."""
    if not text.strip():
        raise argparse.ArgumentTypeError("must name a file or folder (got nothing; . is the current folder)")
    try:
        return expand_home(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


@dataclass(frozen=True)
class Home:
    """Annotation of a path in a config: `~` is expanded; blank strings are refused (`empty` allows "")."""

    empty: bool = False

    def __get_pydantic_core_schema__(self, source: Any, handler: Any) -> Any:
        from pydantic_core import PydanticCustomError, core_schema

        def check(text: str) -> str:
            try:
                if not text.strip() and not (self.empty and not text):
                    raise ValueError("must not be empty")
                if "\0" in text:
                    raise ValueError("must not hold a null byte")
                return expand_home(text)
            except ValueError as error:
                raise PydanticCustomError("path", "{why}", {"why": str(error)}) from None

        return core_schema.no_info_after_validator_function(check, handler(source))
