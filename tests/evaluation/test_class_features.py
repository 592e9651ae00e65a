"""Class features: what is embedded once, and what is kept on disk."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from torch import Tensor

from disttempnet.evaluation.class_features import ClassFeatures
from disttempnet.evaluation.encoder import FeatureEncoder, ProgressCallback
from disttempnet.evaluation.tasks import Head
from tests.evaluation.toy import meaning_towers


@dataclass(frozen=True)
class CountingEncoder(FeatureEncoder):
    """Counts the prompts that it embeds."""

    counts: list[int] = field(default_factory=list)

    def texts(self, texts: Sequence[str], progress: ProgressCallback | None = None) -> Tensor:
        self.counts.append(len(texts))
        return super().texts(texts, progress)

    @property
    def embedded(self) -> int:
        return sum(self.counts)


def test_class_texts_are_embedded_once(tmp_path: Path) -> None:
    encoder = CountingEncoder(meaning_towers(), torch.device("cpu"), batch=3)
    texts = ClassFeatures(tmp_path / "text")
    few = texts.features(Head(("red", "green", "red"), ("{c}", "a {c} thing")), encoder)
    assert encoder.embedded == 4
    assert torch.equal(few[0], few[2]), "classes of one name are one"
    texts.features(Head(("green", "blue"), ("{c}", "a {c} thing")), encoder)
    assert encoder.embedded == 6
    texts.features(Head(("green",), ("{c}",)), encoder)
    assert encoder.embedded == 7, "other templates are another class"
    kept = ClassFeatures(tmp_path / "text")
    assert torch.equal(kept.features(Head(("red", "green", "red"), ("{c}", "a {c} thing")), encoder), few)
    assert encoder.embedded == 7
    assert len(list((tmp_path / "text").iterdir())) == 2
    for path in (tmp_path / "text").iterdir():
        path.write_bytes(path.read_bytes()[:50])
    damaged = ClassFeatures(tmp_path / "text")
    assert torch.equal(damaged.features(Head(("red", "green", "red"), ("{c}", "a {c} thing")), encoder), few)
    assert encoder.embedded == 11


def test_class_texts_go_on_without_a_disk(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "text").write_text("in the way")
    texts = ClassFeatures(tmp_path / "text")
    texts.features(Head(("red",), ("{c}",)), FeatureEncoder(meaning_towers(), torch.device("cpu")))
    assert "text features are not kept" in capsys.readouterr().err
