"""Images by class: the two most probable classes of each, and what a page shows of a million of them."""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from disttempnet.errors import UserError
from disttempnet.evaluation.datasets.class_names import DEFAULT_TEMPLATE, read_lines, templates_of

DEFAULT_TEMPLATES = (DEFAULT_TEMPLATE, "{c}")
CELLS = 1 << 22  # probabilities that exist at a time
DOUBTFUL = 0.5  # an image whose class has less than this


class Classified(NamedTuple):
    """Some images with their two most probable classes.

    Attributes:
        ids: int64 [n].
        classes: int64 [n, 2], the more probable first.
        probabilities: float64 [n, 2].
    """

    ids: NDArray[np.int64]
    classes: Tensor
    probabilities: Tensor


def read_classes(given: str) -> tuple[tuple[str, ...], list[str]]:
    """Return the classes that a user names, a file with a line a class or names between commas, and notes on the file.

    Raises:
        UserError: fewer than two, an empty name, or a name given twice.
    """
    path, notes = Path(given), list[str]()
    if path.is_file():
        (lines, notes), where = read_lines(path), given
        lines = [line for line in lines if line]
    else:
        lines, where = [name.strip() for name in given.split(",")], "--classes"
    if not all(lines):
        raise UserError(f"{where}: an empty name between commas: '{given}'")
    if len(lines) < 2:
        what = "fewer than two classes" if path.is_file() else f"no file, and one class: '{given}'"
        raise UserError(f"{where}: {what}: name two or more, A,B,C, or a file with one a line")
    for name, times in Counter(lines).items():
        if times > 1:
            raise UserError(f"{where}: class '{name}' is given {times} times")
    return tuple(lines), notes


def read_templates(given: Sequence[str]) -> tuple[str, ...]:
    """Return the templates that a user names, texts or a file with one a line; where there are none, the default ones.

    Raises:
        UserError: a template without {c}.
    """
    if len(given) == 1 and Path(given[0]).is_file():
        return tuple(templates_of(Path(given[0])))
    for template in given:
        if "{c}" not in template:
            raise UserError(f"--templates: '{template}' has no {{c}} for the class name, and is no file")
    return tuple(given) or DEFAULT_TEMPLATES


def classify(
    parts: Iterable[tuple[NDArray[np.int64], Tensor]], classes: Tensor, tau: Callable[[Tensor], Tensor]
) -> Iterator[Classified]:
    """Yield images with their two most probable classes: softmax of cosine over τ, over the given classes alone.

    Args:
        parts: ids, int64 [n], and unit features [n, D].
        classes: unit features [C, D], C ≥ 2.
        tau: unit features [n, D] → τ, float64 [n].
    """
    columns = classes.double().T
    for ids, features in parts:
        step = max(1, CELLS // len(classes))
        for start in range(0, len(ids), step):
            rows = features[start : start + step]
            logits = rows.double() @ columns / tau(rows)[:, None]
            top = logits.softmax(dim=1).topk(2, dim=1)
            yield Classified(ids[start : start + step], top.indices, top.values)


class ClassTally:
    """Counts and confidence of every class, and its surest and least sure images.

    Args:
        classes: C.
        shown: how many images of a class are kept at either end.
    """

    def __init__(self, classes: int, shown: int) -> None:
        self.shown = shown
        self.count = np.zeros(classes, np.int64)
        self.doubtful = np.zeros(classes, np.int64)
        self._total = np.zeros(classes)
        self._surest: list[list[tuple[float, int]]] = [[] for _ in range(classes)]
        self._least: list[list[tuple[float, int]]] = [[] for _ in range(classes)]

    def add(self, part: Classified) -> None:
        """Count some images."""
        first, probability = part.classes[:, 0].numpy(), part.probabilities[:, 0].numpy()
        self.count += np.bincount(first, minlength=len(self.count))
        self.doubtful += np.bincount(first[probability < DOUBTFUL], minlength=len(self.count))
        self._total += np.bincount(first, probability, minlength=len(self.count))
        for number in np.unique(first).tolist():
            inside = np.flatnonzero(first == number)
            found = list(zip(probability[inside].tolist(), part.ids[inside].tolist(), strict=True))
            self._surest[number] = heapq.nsmallest(
                self.shown, [*self._surest[number], *found], key=lambda one: (-one[0], one[1])
            )
            self._least[number] = heapq.nsmallest(self.shown, [*self._least[number], *found])

    def mean(self, number: int) -> float:
        """Return the mean probability of the images of a class; 0 where there are none."""
        return float(self._total[number] / self.count[number]) if self.count[number] else 0.0

    def surest(self, number: int) -> list[tuple[float, int]]:
        """Return (probability, sample) of the surest images of a class."""
        return self._surest[number]

    def least_sure(self, number: int) -> list[tuple[float, int]]:
        """Return (probability, sample) of the least sure images of a class, without those of `surest`."""
        shown = {sample for _, sample in self._surest[number]}
        return [one for one in self._least[number] if one[1] not in shown]
