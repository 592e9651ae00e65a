"""Towers from another program's folder: what is damaged is named."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch

from disttempnet.errors import UserError
from disttempnet.models import CONFIG_NAME, WEIGHTS_NAME, encode_images, encode_texts, load_model, save_model
from disttempnet.models import towers as towers_module
from disttempnet.models.towers import open_clip


def test_pixels_that_are_scaled_already_are_refused() -> None:
    towers = load_model("demo-vit-32")
    pixels = torch.randint(0, 256, (1, 3, 32, 32), dtype=torch.uint8)
    assert encode_images(towers, pixels).shape == (1, 64)
    for wrong in (pixels.float() / 255, pixels.long(), pixels.bool()):
        with pytest.raises(ValueError, match=f"pixels must be uint8, 0 to 255, got {wrong.dtype}"):
            encode_images(towers, wrong)


@pytest.mark.parametrize("content", ["{", "[]", '{"model_cfg": {}}', '{"preprocess_cfg": 3}'])
def test_a_damaged_config_is_named(content: str, tmp_path: Path) -> None:
    (tmp_path / WEIGHTS_NAME).touch()
    (tmp_path / CONFIG_NAME).write_text(content)
    with pytest.raises(UserError, match=f"{CONFIG_NAME}: not an open_clip config with a 'preprocess_cfg'"):
        load_model("demo-vit-32", str(tmp_path))


def test_the_folder_says_how_pixels_are_normalised(tmp_path: Path) -> None:
    towers = load_model("demo-vit-32")
    save_model(towers, tmp_path, logit_scale=10.0)
    config = json.loads((tmp_path / CONFIG_NAME).read_text())
    config["preprocess_cfg"] = {"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6]}
    (tmp_path / CONFIG_NAME).write_text(json.dumps(config))
    again = load_model("demo-vit-32", str(tmp_path))
    assert (again.mean, again.std, again.image_size) == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6), towers.image_size)
    for key, value in towers.module.state_dict().items():
        assert key == "logit_scale" or torch.equal(again.module.state_dict()[key], value)


def test_broken_weights_are_named(tmp_path: Path) -> None:
    save_model(load_model("demo-vit-32"), tmp_path, logit_scale=10.0)
    weights = tmp_path / WEIGHTS_NAME
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(UserError, match=f"{WEIGHTS_NAME}' cannot be loaded"):
        load_model("demo-vit-32", str(tmp_path))


@pytest.mark.parametrize("name", [WEIGHTS_NAME, "weights.pt"])
def test_text_positions_are_not_stretched(name: str, tmp_path: Path) -> None:
    """open_clip alone would interpolate them, and every score would be wrong without a word."""
    short = open_clip.get_model_config("demo-vit-32")
    config = copy.deepcopy(short)
    config["text_cfg"]["context_length"] = 77
    (tmp_path / CONFIG_NAME).write_text(json.dumps({"model_cfg": config, "preprocess_cfg": {}}))
    towers = load_model(str(tmp_path / CONFIG_NAME))
    save_model(towers, tmp_path, logit_scale=10.0)
    torch.save(towers.module.state_dict(), tmp_path / "weights.pt")
    with pytest.raises(UserError, match=r"have 77 text positions, the model has 20: .* local-dir:FOLDER"):
        load_model("demo-vit-32", str(tmp_path / name))
    again = load_model(f"local-dir:{tmp_path}").module.state_dict()["positional_embedding"]
    assert torch.equal(again, towers.module.state_dict()["positional_embedding"])


def architecture(path: Path, **changes: dict) -> str:
    """An architecture of two small towers, with changes to its sections; the name that `load_model` takes."""
    config = {
        "embed_dim": 16,
        "vision_cfg": {"image_size": 32, "patch_size": 16, "width": 16, "layers": 1, "head_width": 16},
        "text_cfg": {"context_length": 12, "width": 16, "heads": 2, "layers": 1},
    }
    path.write_text(
        json.dumps(
            {
                key: {**value, **changes.get(key, {})} if isinstance(value, dict) else value
                for key, value in config.items()
            }
        ),
        encoding="utf-8",
    )
    return str(path)


def test_modern_text_towers_need_an_open_clip_that_has_them(tmp_path: Path) -> None:
    name = architecture(tmp_path / "modern.json", text_cfg={"text_arch": "modern", "pool_type": "eos", "eos_id": 49407})
    if not hasattr(open_clip, "ModernTextTransformer"):
        with pytest.raises(UserError, match=r"open_clip cannot build its architecture: .*'text_arch'"):
            load_model(name)
        return
    towers = load_model(name)
    assert isinstance(towers.module, open_clip.CustomTextCLIP)
    assert encode_texts(towers, towers.tokenizer(["a red apple", "two"])).shape == (2, 16)


class Tiktoken:
    """Stand-in for open_clip's class, which downloads its vocabulary."""

    def __init__(self, **arguments: object) -> None:
        self.arguments = arguments


def test_a_kind_of_tokenizer_is_never_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    """CLIP's own in its place would give other tokens without a word."""
    config = {"tokenizer_type": "tiktoken", "tiktoken_name": "r50k_base", "context_length": 12}
    with pytest.raises(UserError, match="a text tower of tokenizer_type 'words'; known: tiktoken"):
        towers_module._tokenizer("x", {**config, "tokenizer_type": "words"}, None)
    monkeypatch.setattr(towers_module.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(UserError, match="needs tiktoken: python -m pip install tiktoken"):
        towers_module._tokenizer("x", config, None)
    monkeypatch.setattr(towers_module.importlib.util, "find_spec", lambda name: name)
    monkeypatch.setattr(open_clip.tokenizer, "TikTokenTokenizer", Tiktoken, raising=False)
    made = towers_module._tokenizer("x", {**config, "tokenizer_kwargs": {"clean": "lower", "other": 1}}, None)
    assert made.arguments == {"encoding_name": "r50k_base", "context_length": 12, "clean": "lower"}


def test_a_tower_for_images_of_any_shape_is_said_to_see_squares() -> None:
    naflex = {"vision_cfg": {"timm_model_name": "naflexvit_base_patch16_siglip", "image_size": 384}}
    assert towers_module._squared(naflex) == [
        "NaFlex: images are squares of 384 pixels, where open_clip keeps their shape"
    ]
    assert towers_module._squared({"vision_cfg": {"timm_model_name": "test_vit"}}) == []
