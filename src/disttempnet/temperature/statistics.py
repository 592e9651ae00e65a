"""Statistics of a data set for the page: about 40 bytes a sample, and the features of an even share of them."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from disttempnet.report.bins import evenly_spread
from disttempnet.report.items import PAIR, Item, Items
from disttempnet.temperature.measure import TemperatureChunk
from disttempnet.temperature.table import fact_text

FEATURES_KEPT = 20_000  # samples whose features are kept


@dataclass
class TemperatureStatistics:
    """Columns over the n items that could be read; m of them with features.

    Attributes:
        items: where they come from.
        frequency_by: the fact whose values are counted.
        skipped: keys of items that could not be read.
    """

    items: Items
    frequency_by: str
    skipped: list[str] = field(default_factory=list)
    _columns: dict[str, list[np.ndarray]] = field(default_factory=dict)
    _features: dict[str, list[Tensor]] = field(default_factory=dict)
    _codes: dict[str, dict[str, int]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._chosen = evenly_spread(len(self.items), FEATURES_KEPT)
        self._codes = {"label": {}, self.frequency_by: {}}

    def add(self, chunk: TemperatureChunk) -> None:
        self.skipped += chunk.skipped
        chosen = np.isin(chunk.positions, self._chosen)
        columns: dict[str, np.ndarray] = {
            "position": chunk.positions,
            "image": chunk.tau[0],
            "text": chunk.tau[1],
            "log_u_image": chunk.log_u[0],
            "log_u_text": chunk.log_u[1],
            "embedded": chosen,
            "caption": np.array([_hash(item.captions[0]) for item in chunk.items], dtype=np.uint64),
            "ambiguity": np.array([_number(item.facts.get("ambiguity")) for item in chunk.items], dtype=np.float32),
        }
        for name, codes in self._codes.items():
            values = [fact_text(item.facts.get(name)) for item in chunk.items]
            coded = [-1 if value is None else codes.setdefault(value, len(codes)) for value in values]
            columns["fact:" + name] = np.array(coded, dtype=np.int32)
        for name, column in columns.items():
            self._columns.setdefault(name, []).append(column)
        mask = torch.from_numpy(chosen)
        for side, rows in chunk.features.items():
            self._features.setdefault(side, []).append(rows.cpu()[mask])

    def column(self, name: str) -> np.ndarray:
        """Return a column [n]: position, image, text (τ), log_u_image or _text, caption (hash), ambiguity, embedded."""
        parts = self._columns[name]
        if len(parts) > 1:
            self._columns[name] = [np.concatenate(parts)]
        return self._columns[name][0]

    @property
    def sides(self) -> tuple[str, ...]:
        return tuple(side for side in PAIR if side in self.items.sides)

    def __len__(self) -> int:
        return sum(map(len, self._columns.get("position", [])))

    def features(self, side: str) -> Tensor:
        """Return unit rows [m, D] of the embedded items, in order."""
        return torch.cat(self._features[side])

    def embedded(self, name: str) -> np.ndarray:
        """Return a column [m] of the embedded items."""
        return self.column(name)[self.column("embedded")]

    def frequency(self) -> np.ndarray:
        """Return float [n]: how many items share an item's value of the fact `frequency_by`; NaN where it has none."""
        codes = self.column("fact:" + self.frequency_by)
        counts = np.bincount(codes[codes >= 0], minlength=1).astype(float)
        return np.where(codes >= 0, counts[codes], np.nan)

    def ambiguity(self) -> tuple[np.ndarray, str]:
        """Return float [n] and its meaning: the .json's `ambiguity`, else how many labels share the exact caption."""
        given = self.column("ambiguity")
        if np.isfinite(given).any():
            return given.astype(float), "the `ambiguity` that the data set gives"
        labels, captions = self.column("fact:label"), self.column("caption")
        known = (labels >= 0) & (captions != _hash(""))
        pairs = np.unique(np.stack([captions[known], labels[known].astype(np.uint64)]), axis=1)
        distinct, counts = np.unique(pairs[0], return_counts=True)
        values = np.full(len(labels), np.nan)
        values[known] = counts[np.searchsorted(distinct, captions[known])]
        return values, "how many labels share the exact caption"

    def extremes(self, side: str, most: int) -> dict[str, list[int]]:
        """Return `lowest` and `highest` → rows, the most extreme τ first; on the text side each caption once."""
        order = np.argsort(self.column(side), kind="stable")
        return {"lowest": self._distinct(side, order, most), "highest": self._distinct(side, order[::-1], most)}

    def _distinct(self, side: str, order: np.ndarray, most: int) -> list[int]:
        captions, seen, rows = self.column("caption"), set[int](), list[int]()
        for row in order:
            if len(rows) == most:
                break
            if side == "text" and int(captions[row]) in seen:
                continue
            seen.add(int(captions[row]))
            rows.append(int(row))
        return rows

    def read(self, rows: Sequence[int] | np.ndarray) -> list[Item]:
        """Read the items of these rows, with captions and images."""
        return self.items.read(self.column("position")[list(rows)])


def _hash(caption: str) -> int:
    return int.from_bytes(hashlib.blake2b(caption.encode(), digest_size=8).digest())


def _number(value: Any) -> float:
    return float(value) if isinstance(value, (int, float)) else float("nan")
