"""ONNX files give the towers' features for any batch, and nothing is kept that does not."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from disttempnet.cli.main import main
from disttempnet.errors import UserError
from disttempnet.export import onnx as export
from disttempnet.models import encode_images, encode_texts, load_model, save_model
from tests import parts
from tests.export.models import small_towers

pytest.importorskip("onnxscript")


def test_clip_from_the_command_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import onnxruntime

    monkeypatch.chdir(tmp_path)
    towers = small_towers(tmp_path / "made", {"mean": [0.5, 0.4, 0.3], "std": [0.2, 0.3, 0.4]})
    Path("model").mkdir()
    save_model(towers, Path("model"), logit_scale=20.0, logit_bias=-7.5)
    assert main(["export", "model", "--to", "onnx"]) == 0
    shown = capsys.readouterr().out.splitlines()
    assert [line.partition(":")[0] for line in shown] == ["checked", "export"], "the exporter itself is silent"
    out = Path("export", "local-dir-model-onnx")
    assert {path.name for path in out.iterdir()} == {"image.onnx", "text.onnx", "about.json", ".export"}
    about = json.loads((out / "about.json").read_text())
    assert (about["image_size"], about["context_length"], about["embed_dim"]) == (32, 16, 24)
    assert (about["logit_scale"], about["logit_bias"]) == pytest.approx((20.0, -7.5))

    # files of the same name in another process's hands: plain numpy in, features out
    pixels = np.random.default_rng(3).integers(0, 256, (5, 3, 32, 32), dtype=np.uint8)
    tokens = towers.tokenizer(["a photo of a cat", "two"] * 6)
    image = onnxruntime.InferenceSession(str(out / "image.onnx")).run(None, {"pixels": pixels})[0]
    text = onnxruntime.InferenceSession(str(out / "text.onnx")).run(None, {"tokens": tokens.numpy()})[0]
    with torch.no_grad():
        np.testing.assert_allclose(image, encode_images(towers, torch.from_numpy(pixels)).numpy(), atol=1e-5)
        np.testing.assert_allclose(text, encode_texts(towers, tokens).numpy(), atol=1e-5)
    assert image.std() > 0.1
    assert not list(Path("export").glob(".*")), "nothing is left of the work"


@pytest.mark.slow
def test_timm_and_hugging_face_towers(tmp_path: Path) -> None:
    name = parts.write_architecture(tmp_path / "architecture")
    weights, text = parts.write_image_weights(tmp_path / "resnet.safetensors"), parts.write_text_folder(tmp_path / "hf")
    towers = load_model(name, image_pretrained=str(weights), text_pretrained=str(text))
    towers.module.eval()
    (tmp_path / "out").mkdir()
    assert "run by onnxruntime" in export.write_onnx(towers, tmp_path / "out", 20.0)
    assert (tmp_path / "out" / "tokenizer.json").is_file()


def test_a_tower_that_onnx_cannot_hold_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Wild(torch.nn.Module):
        def forward(self, pixels: torch.Tensor) -> torch.Tensor:
            return pixels if float(pixels.float().sum()) > 3 else -pixels

    with pytest.raises(UserError, match=r"image\.onnx cannot be made of this tower: ") as error:
        export._export(Wild(), "pixels", torch.ones(2, 3), tmp_path / "image.onnx")
    assert len(str(error.value)) < 400


def test_without_the_packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(UserError, match=r"--to onnx needs onnxruntime: .*disttempnet\[onnx\]"):
        export.write_onnx(small_towers(tmp_path), tmp_path, 20.0)
