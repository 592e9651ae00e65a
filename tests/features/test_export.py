"""`disttempnet embed`: features as files, those of the towers."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors import safe_open
from torch.testing import assert_close

from disttempnet.cli.main import main
from disttempnet.data import decode, eval_transform
from disttempnet.models import encode_images, encode_texts, load_model
from tests.data.pictures import encoded, gradient

MODEL = "open_clip:demo-vit-32"


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """A listing of forty images, the fourth broken; every third has two captions."""
    folder = tmp_path / "images"
    folder.mkdir()
    rows = []
    for number in range(40):
        (folder / f"{number:02d}.png").write_bytes(b"none" if number == 3 else encoded(gradient(40 + number), "PNG"))
        texts = [f"a picture {number}", *(["another one"] if number % 3 == 0 else [])]
        rows.append(json.dumps({"image": f"{number:02d}.png", "captions": texts}))
    (folder / "list.jsonl").write_text("\n".join(rows) + "\n", "utf-8")
    return folder / "list.jsonl"


def embed(images: Path, out: Path, *flags: str) -> int:
    return main(["embed", MODEL, str(images), "--out", str(out), "--workers", "0", *flags])


def test_files_hold_the_towers_features(images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert embed(images, tmp_path / "out") == 0
    assert "features of 39 samples of 40" in capsys.readouterr().out
    torch.manual_seed(0)
    towers = load_model("demo-vit-32")
    towers.module.eval()
    with safe_open(tmp_path / "out" / "features-00000.safetensors", "pt") as file:
        metadata = file.metadata()
        ids, image, text, text_ids = (file.get_tensor(name) for name in ("ids", "image", "text", "text_ids"))
    assert ids.tolist() == [number for number in range(40) if number != 3]
    captions, names = json.loads(metadata["captions"]), json.loads(metadata["names"])
    assert captions[0] == ["a picture 0", "another one"]
    assert captions[1] == ["a picture 1"]
    assert names[0].endswith("00.png")
    assert text_ids.tolist() == [sample for sample, own in zip(ids.tolist(), captions, strict=True) for _ in own]
    transform = eval_transform(towers.image_size, towers.resizing)
    pixels = torch.stack([transform(decode((images.parent / f"{i:02d}.png").read_bytes())) for i in ids.tolist()])
    with torch.no_grad():
        assert_close(image, encode_images(towers, pixels))
        assert_close(text, encode_texts(towers, towers.tokenizer([one for own in captions for one in own])))
    about = json.loads((tmp_path / "out" / "about.json").read_text())
    assert about["samples"] == 39
    assert about["complete"]
    assert about["digest"] == metadata["digest"]
    assert not (tmp_path / "out" / ".parts").exists()


def test_parquet_holds_the_same(images: Path, tmp_path: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    assert embed(images, tmp_path / "one") == 0
    assert embed(images, tmp_path / "two", "--format", "parquet") == 0
    table = parquet.read_table(tmp_path / "two" / "features-00000.parquet")
    with safe_open(tmp_path / "one" / "features-00000.safetensors", "pt") as file:
        image, text = file.get_tensor("image"), file.get_tensor("text")
    assert torch.equal(torch.tensor(table["image"].to_pylist()), image)
    assert torch.equal(torch.tensor([row for own in table["text"].to_pylist() for row in own]), text)
    assert table["captions"].to_pylist()[0] == ["a picture 0", "another one"]


def test_files_of_other_shards_are_removed(images: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "features-00007.safetensors").write_bytes(b"of more samples")
    assert embed(images, out) == 0
    assert [path.name for path in out.glob("features-*")] == ["features-00000.safetensors"]


def test_a_full_disk_is_one_line_about_out(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert embed(images, tmp_path / "other") == 0
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    assert embed(images, tmp_path / "out") == 2
    message = capsys.readouterr().err
    assert "free some, choose --dtype float16, or name another --out" in message
    assert "train.cache" not in message
    assert json.loads((tmp_path / "out" / "about.json").read_text())["complete"] is False
    assert embed(images, tmp_path / "out", "--dtype", "float16") == 2
    assert "holds features of another model" in capsys.readouterr().err


def test_other_features_are_refused(images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert embed(images, tmp_path / "out") == 0
    assert embed(images, tmp_path / "out", "--dtype", "float16") == 2
    assert "holds features of another model, source or format" in capsys.readouterr().err
