"""Ranges of numbers, for config keys, flags and arguments of objectives.

A `Range` stands in an annotation (`Annotated[int, integers(1, 9)]`): pydantic validates with it, `train --help` prints
it. Beside a flag it is `type=integers(1, 9).parse`.
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
        low, high: bounds, inclusive.
        integer: only integers.
        above: exclude `low`.
        below: exclude `high`.
    """

    low: float
    high: float
    integer: bool = False
    above: bool = False
    below: bool = False

    def __str__(self) -> str:
        low, high = _number(self.low), _number(self.high)
        if not self.above and not self.below:
            return f"from {low} to {high}"
        return f"{'above' if self.above else 'at least'} {low} and {'below' if self.below else 'at most'} {high}"

    def check(self, value: Any) -> int | float:
        """Return the value as a Python number.

        Raises:
            ValueError: not a number (a boolean is none), or out of range; the message names the range.
        """
        fits = isinstance(value, numbers.Real) and not isinstance(value, bool) and self._holds(value)
        if fits and not self.integer:
            return float(value)
        if fits and value == math.floor(value):
            return int(value)
        raise ValueError(f"must be a {'whole ' if self.integer else ''}number {self}")

    def _holds(self, value: Any) -> bool:
        """Return whether the value lies in the range; NaN and the infinities never do."""
        low = self.low < value if self.above else self.low <= value
        return low and (value < self.high if self.below else value <= self.high)

    @property
    def kind(self) -> Range:
        """Return the range without its bounds: what a value that an older version wrote has to satisfy."""
        return replace(self, low=-sys.float_info.max, high=sys.float_info.max, above=False, below=False)

    def validated(self, value: Any, info: Any) -> int | float:
        """Return the value as `check` does, inside a pydantic validator; without bounds where `bounded` says so."""
        return (self if bounded(info) else self.kind).check(value)

    def parse(self, text: str) -> Any:
        """Return the value of a flag, for argparse's `type`."""
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


TYPES_ALONE = {"bounds": False}  # pydantic's context for configs that an older version wrote


def bounded(info: Any) -> bool:
    """Return whether ranges and the rules between keys are checked: not so where the context is TYPES_ALONE."""
    return info.context is not TYPES_ALONE


def integers(low: int, high: int) -> Range:
    """Return the range of the integers from low to high, both inclusive."""
    return Range(low, high, integer=True)


def _number(value: float) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:g}"


BATCH = integers(1, 65_536)  # images of a forward pass
WORKERS = integers(0, 1024)  # processes; the flag says what 0 means
SEEDS = integers(0, 2**63 - 1)  # what NumPy and torch both take
SAMPLES = integers(0, 10**12)
GIGABYTES = Range(0, 10**6, above=True)
