"""Towers from another program's folder: what is damaged is named. Texts of another number of tokens."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from disttempnet.errors import UserError
from disttempnet.models import (
    CONFIG_NAME,
    WEIGHTS_NAME,
    encode_images,
    encode_texts,
    load_model,
    pretrained,
    save_model,
)
from disttempnet.models import towers as towers_module
from disttempnet.models.towers import open_clip
from disttempnet.training.checkpoint import load_run
from disttempnet.training.trainer import train
from tests import parts
from tests.training.test_trainer import debug, same_ending


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


# ---- another number of tokens ----

CAPTIONS = ["a red apple", "two dogs " * 60]


@pytest.mark.parametrize("kind", ["CLIP", "CustomTextCLIP"])
def test_longer_texts_on_weights_of_short_ones(kind: str, tmp_path: Path) -> None:
    config = open_clip.get_model_config("demo-vit-32")
    config["custom_text"] = kind == "CustomTextCLIP"
    (tmp_path / "short.json").write_text(json.dumps(config))
    short = load_model(str(tmp_path / "short.json"))
    assert type(short.module).__name__ == kind
    torch.save(short.module.state_dict(), tmp_path / "weights.pt")
    long = load_model(str(tmp_path / "short.json"), str(tmp_path / "weights.pt"), context_length=100)
    key = "text.positional_embedding" if kind == "CustomTextCLIP" else "positional_embedding"
    before, after = (towers.module.state_dict()[key] for towers in (short, long))
    # open_clip's interpolation: position i of 100 lies at (i + 0.5) · 20 / 100 − 0.5 of 20
    place = ((torch.arange(100.0) + 0.5) / 5 - 0.5).clamp(0, 19)
    low = place.long()
    expected = before[low].lerp(before[(low + 1).clamp(max=19)], (place - low)[:, None])
    torch.testing.assert_close(after, expected)
    assert "have 20 text positions, the model has 100, to which they were interpolated" in long.notes[0]
    tokens = long.tokenizer(CAPTIONS)
    assert tokens.shape == (2, 100)
    assert tokens[1, 98] != short.tokenizer.tokenizer.eot_token_id
    assert long.module.encode_text(tokens).isfinite().all()

    # What is saved opens with its own number, here and in open_clip, and nothing is interpolated again.
    save_model(long, tmp_path, logit_scale=10.0)
    again = load_model(f"local-dir:{tmp_path}")
    assert again.notes == ()
    torch.testing.assert_close(again.module.encode_text(tokens), long.module.encode_text(tokens))
    module, _, _ = open_clip.create_model_and_transforms(f"local-dir:{tmp_path}")
    torch.testing.assert_close(module.encode_text(tokens), long.module.encode_text(tokens))


def test_fewer_tokens_give_short_captions_the_same_features(tmp_path: Path) -> None:
    full = load_model("demo-vit-32")
    save_model(full, tmp_path, logit_scale=10.0)
    few = load_model("demo-vit-32", str(tmp_path), context_length=8)
    assert "the model has 8: the first ones are kept" in few.notes[0]
    texts = ["a red apple", "two dogs"]
    wanted = full.module.encode_text(full.tokenizer(texts))
    torch.testing.assert_close(few.module.encode_text(few.tokenizer(texts)), wanted)

    config = open_clip.get_model_config("demo-vit-32")
    config["text_cfg"]["no_causal_mask"] = True
    config["custom_text"] = True
    (tmp_path / "ahead.json").write_text(json.dumps(config))
    torch.save(load_model(str(tmp_path / "ahead.json")).module.state_dict(), tmp_path / "ahead.pt")
    with pytest.raises(UserError, match="only causal text towers can do with fewer"):
        load_model(str(tmp_path / "ahead.json"), str(tmp_path / "ahead.pt"), context_length=8)


def test_encoders_of_hugging_face_read_as_many_as_they_have_positions(tmp_path: Path) -> None:
    name = parts.write_architecture(tmp_path)
    parts.write_text_folder(tmp_path)
    assert load_model(name, context_length=64).tokenizer(["a cat"]).shape == (1, 64)
    with pytest.raises(UserError, match=r"'distilbert' with 64 positions cannot read 65 tokens: lower model.con"):
        load_model(name, context_length=65)
    roberta = SimpleNamespace(model_type="roberta", max_position_embeddings=514, pad_token_id=1)
    relative = SimpleNamespace(model_type="t5")
    assert [pretrained._positions(config) for config in (roberta, relative)] == [512, 0]


def test_a_run_reads_longer_captions_and_resumes(tmp_path: Path) -> None:
    longer = ("model.context_length=100", "eval.tasks=[]")
    assert train(debug(tmp_path / "a", *longer, "train.stop_after_steps=3"))
    for stop in (2, 3):
        assert train(debug(tmp_path / "b", *longer, f"train.stop_after_steps={stop}"), resume="auto")
    same_ending(tmp_path / "a" / "debug", tmp_path / "b" / "debug")
    run = load_run(tmp_path / "b" / "debug")
    assert run.towers.module.positional_embedding.shape[0] == 100
    assert run.towers.notes == ()
    with pytest.raises(UserError, match=r"key 'model.context_length'"):
        debug(tmp_path, "model.context_length=513")
    for none in (1, 2):
        with pytest.raises(UserError, match=r"key 'model.context_length': must be at least 3 \(start, a token of the"):
            debug(tmp_path, f"model.context_length={none}")
    assert debug(tmp_path, "model.context_length=3").model.context_length == 3
