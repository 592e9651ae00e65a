"""Ranges of numbers: of config keys, of flags and of objectives' arguments. One type, so that one line tells of all.

A `Range` stands in an annotation (`Annotated[int, whole(1, 9)]`), where pydantic validates with it and `train --help`
prints it, and beside a flag (`type=whole(1, 9).parse`).
"""

from __future__ import annotations

import argparse
import math
import numbers
import sys
from dataclasses import dataclass, replace
from typing import Any


@dataclass(frozen=True)
class Range:
    """The numbers from `low` to `high`.

    Attributes:
        low, high: bounds.
        whole: only whole numbers.
        above, below: `low`, or `high`, itself is not one of them.
    """

    low: float
    high: float
    whole: bool = False
    above: bool = False
    below: bool = False

    def __str__(self) -> str:
        low, high = _number(self.low), _number(self.high)
        if not self.above and not self.below:
            return f"from {low} to {high}"
        return f"{'above' if self.above else 'at least'} {low} and {'below' if self.below else 'at most'} {high}"

    def check(self, value: Any) -> int | float:
        """The value as a Python number.

        Raises:
            ValueError: no number (a boolean is none), or out of the range; the message says which range it is.
        """
        fits = isinstance(value, numbers.Real) and not isinstance(value, bool) and self._holds(value)
        if fits and not self.whole:
            return float(value)
        if fits and value == math.floor(value):
            return int(value)
        raise ValueError(f"must be a {'whole ' if self.whole else ''}number {self}")

    def _holds(self, value: Any) -> bool:
        """NaN and the infinities are in no range."""
        low = self.low < value if self.above else self.low <= value
        return low and (value < self.high if self.below else value <= self.high)

    @property
    def kind(self) -> Range:
        """All numbers of the same kind, whole or not: what is asked of a number that an older version allowed."""
        return replace(self, low=-sys.float_info.max, high=sys.float_info.max, above=False, below=False)

    def validated(self, value: Any, info: Any) -> int | float:
        """`check`, in a pydantic validator; where the bounds are not asked for (see `bounded`) of the kind alone."""
        return (self if bounded(info) else self.kind).check(value)

    def parse(self, text: str) -> Any:
        """The value of a flag, for argparse's `type`."""
        value: Any = text
        for kind in (int, float):
            try:
                value = kind(text)
                break
            except ValueError:
                continue
        try:
            return self.check(value)
        except ValueError as error:
            raise argparse.ArgumentTypeError(f"{error} (got {text})") from None

    def __get_pydantic_core_schema__(self, source: Any, handler: Any) -> Any:
        from pydantic_core import PydanticCustomError, core_schema

        def validate(value: Any, info: Any) -> int | float:
            try:
                return self.validated(value, info)
            except ValueError as error:
                raise PydanticCustomError("range", "{why}", {"why": str(error)}) from None

        return core_schema.with_info_plain_validator_function(validate)


TYPES_ALONE = {"bounds": False}  # pydantic's context, for what an older version has written


def bounded(info: Any) -> bool:
    """Whether values are to lie in their ranges and to fit each other: not so where TYPES_ALONE is the context."""
    return info.context is not TYPES_ALONE


def whole(low: int, high: int) -> Range:
    """The whole numbers from low to high."""
    return Range(low, high, whole=True)


def _number(value: float) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:g}"


BATCH = whole(1, 65_536)  # images of a forward pass
WORKERS = whole(0, 1024)  # processes; what 0 means is said beside the flag
SEED = whole(0, 2**63 - 1)  # what NumPy and torch both take
SAMPLES = whole(0, 10**12)
GIGABYTES = Range(0, 10**6, above=True)
