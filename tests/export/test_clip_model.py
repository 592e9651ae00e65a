"""CLIPModel folders: transformers computes the towers' features from them, and what it cannot hold is one line."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.functional import normalize

from disttempnet.cli.main import main
from disttempnet.data.augment import eval_transform
from disttempnet.errors import UserError
from disttempnet.export.clip_model import clip_tokenizer, write_clip_model
from disttempnet.models import encode_images, encode_texts, load_model, save_model
from disttempnet.models.towers import Resizing
from disttempnet.models.transformers_clip import clip_model_state, open_clip_state, why_no_clip_model
from tests.data.pictures import gradient
from tests.export.models import architecture, small_towers

CAPTIONS = ["a red apple", "two dogs, on a beach in the sun", "Ünïcode & façades 日本", "don't"]


@pytest.mark.parametrize("quick_gelu", [False, True])
def test_transformers_gives_the_same_features(quick_gelu: bool, tmp_path: Path) -> None:
    from transformers import AutoTokenizer, CLIPModel

    towers = small_towers(tmp_path / "made", quick_gelu=quick_gelu)
    assert "opened by transformers" in write_clip_model(towers, tmp_path)
    theirs = CLIPModel.from_pretrained(tmp_path).eval()
    tokens = AutoTokenizer.from_pretrained(tmp_path)(CAPTIONS, padding=True, truncation=True, return_tensors="pt")
    pixels = torch.randint(0, 256, (3, 3, 32, 32), dtype=torch.uint8)
    scaled = (pixels / 255 - torch.tensor(towers.mean).view(3, 1, 1)) / torch.tensor(towers.std).view(3, 1, 1)
    with torch.no_grad():
        for ours, found in (
            (encode_images(towers, pixels), theirs.get_image_features(scaled)),
            (encode_texts(towers, towers.tokenizer(CAPTIONS)), theirs.get_text_features(**tokens)),
        ):
            found = normalize(getattr(found, "pooler_output", found), dim=-1)
            torch.testing.assert_close(ours, found, rtol=1e-5, atol=1e-6)
    assert theirs.logit_scale.item() == pytest.approx(towers.module.logit_scale.item())

    # and this package reads the folder back: the same weights, to the bit
    again = load_model(f"local-dir:{tmp_path}")
    assert again.architecture["quick_gelu"] is quick_gelu
    for key, value in towers.module.state_dict().items():
        assert torch.equal(again.module.state_dict()[key], value), key


def test_names_there_and_back(tmp_path: Path) -> None:
    state = small_towers(tmp_path).module.state_dict()
    assert open_clip_state(clip_model_state(state)).keys() == state.keys()
    assert clip_model_state({"logit_bias": torch.zeros(1)}) == {}


def test_the_tokenizer_gives_the_same_tokens(tmp_path: Path) -> None:
    towers = small_towers(tmp_path)
    found = clip_tokenizer(towers)(CAPTIONS, padding="max_length", truncation=True)["input_ids"]
    for row, expected in zip(found, towers.tokenizer(CAPTIONS).tolist(), strict=True):
        length = expected.index(49407) + 1
        assert row[:length] == expected[:length]
        assert set(row[length:]) <= {49407}, "the padding of CLIP's own tokenizer"


@pytest.mark.parametrize("mode", ["shortest", "squash"])
def test_the_image_processor_resizes_as_evaluation_does(mode: str, tmp_path: Path) -> None:
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    towers = small_towers(tmp_path / "made", {"mean": [0.5, 0.4, 0.3], "std": [0.2, 0.3, 0.4]})
    towers = dataclasses.replace(towers, resizing=Resizing(mode, "bilinear"))
    write_clip_model(towers, tmp_path)
    picture = gradient(92, 64)  # of an odd margin transformers rounds the half pixel down, torchvision to even
    found = CLIPImageProcessorPil.from_pretrained(tmp_path)(picture, return_tensors="np")["pixel_values"][0]
    pixels = eval_transform(32, towers.resizing)(picture).numpy() / 255
    expected = (pixels - np.array(towers.mean)[:, None, None]) / np.array(towers.std)[:, None, None]
    np.testing.assert_allclose(found, expected, atol=0.03)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"vision_cfg__timm_model_name": "convnext_tiny"}, "image tower is timm's convnext_tiny"),
        ({"text_cfg__hf_model_name": "roberta-base"}, "text tower is Hugging Face's roberta-base"),
        ({"vision_cfg__layers": [1, 1, 1, 1]}, "a ResNet"),
        ({"vision_cfg__image_size": [32, 64]}, "no square"),
        ({"vision_cfg__pool_type": "avg"}, "vision_cfg.pool_type = 'avg' has no counterpart"),
        ({"text_cfg__no_causal_mask": True}, "text_cfg.no_causal_mask = True has no counterpart"),
        ({"text_cfg__vocab_size": 64000}, "vocabulary of 64,000"),
        ({"custom_text": True}, "custom_text = True has no counterpart"),
        ({"multimodal_cfg": {"width": 32}}, "a CoCa"),
        ({"vision_cfg__patch_dropout": 0.5, "init_logit_bias": -10}, ""),
    ],
)
def test_what_a_clip_model_cannot_hold(changes: dict[str, Any], reason: str) -> None:
    assert reason in why_no_clip_model(architecture(**changes))
    assert bool(why_no_clip_model(architecture(**changes))) == bool(reason)


def test_padded_images_are_refused(tmp_path: Path) -> None:
    towers = dataclasses.replace(small_towers(tmp_path / "made"), resizing=Resizing("longest"))
    with pytest.raises(UserError, match="'longest' pads images"):
        write_clip_model(towers, tmp_path)


def test_other_weights_are_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The check sees what transformers reads: here weights that were written wrongly."""
    towers = small_towers(tmp_path / "made")
    swapped = {"visual.ln_pre.weight": 2.0}

    def wrong(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return clip_model_state({key: value * swapped.get(key, 1.0) for key, value in state.items()})

    monkeypatch.setattr("disttempnet.export.clip_model.clip_model_state", wrong)
    with pytest.raises(UserError, match=r"CLIPModel of images: its features differ by 0\.\d+ "):
        write_clip_model(towers, tmp_path)


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    towers = small_towers(tmp_path / "made")
    (tmp_path / "model").mkdir()
    save_model(towers, tmp_path / "model", logit_scale=20.0, logit_bias=-3.0)
    assert main(["export", "model", "--to", "transformers", "--out", "out"]) == 0
    shown = capsys.readouterr().out
    assert "left out: the logit bias" in shown
    assert "checked: opened by transformers" in shown
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["text_config"]["eos_token_id"] == 49407

    assert main(["export", "model", "model", "--to", "transformers"]) == 2
    assert "takes one model, not 2" in capsys.readouterr().err
    assert main(["export", "open_clip:demo-vit-32", "--to", "transformers"]) == 2, "no weights"
    (tmp_path / "convnext").mkdir()
    save_model(load_model("demo-convnext-32"), tmp_path / "convnext", logit_scale=20.0)
    assert main(["export", "convnext", "--to", "transformers", "--out", "none"]) == 2
    error = capsys.readouterr().err
    assert "its image tower is timm's test_convnext2; try --to onnx" in error
    assert not (tmp_path / "none").exists()
