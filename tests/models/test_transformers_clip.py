"""transformers' CLIPModel folders: the same features as transformers gives, or one line."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import disttempnet.models  # first: it lets torchvision load beside a CPU-only torch
from disttempnet.errors import UserError
from disttempnet.models import load_model
from disttempnet.models.towers import open_clip

CAPTIONS = ["a red apple", "two dogs on a beach in the sun"]


def write_clip(folder: Path, **text: Any) -> Any:
    """A small CLIPModel with weights that are not near zero, so that activations bend; returns it."""
    from transformers import CLIPConfig, CLIPModel
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    act = {"hidden_act": text.pop("hidden_act", "quick_gelu")}
    sizes = {"hidden_size": 32, "intermediate_size": 73, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = CLIPConfig(
        text_config={**sizes, **act, "max_position_embeddings": 16, **text},
        vision_config={**sizes, **act, "image_size": 32, "patch_size": 8},
        projection_dim=24,
    )
    torch.manual_seed(5)
    model = CLIPModel(config).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(folder)
    return model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("clip") / "model"


@pytest.fixture(scope="module")
def theirs(folder: Path) -> Any:
    return write_clip(folder)


def features(model: Any) -> torch.Tensor:
    return getattr(model, "pooler_output", model)  # which of the two depends on the version


def assert_same(name: str, pretrained: str, theirs: Any) -> disttempnet.models.Towers:
    towers = load_model(name, pretrained)
    towers.module.eval()
    pixels = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    tokens = towers.tokenizer(CAPTIONS)
    with torch.no_grad():
        for ours, expected in (
            (towers.module.encode_image(pixels), features(theirs.get_image_features(pixels))),
            (towers.module.encode_text(tokens), features(theirs.get_text_features(tokens))),
        ):
            assert expected.std() > 0.1
            torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)
    return towers


def test_a_folder_by_itself(folder: Path, theirs: Any, tmp_path: Path) -> None:
    towers = assert_same(f"local-dir:{folder}", "", theirs)
    assert (towers.image_size, towers.embed_dim, towers.architecture["quick_gelu"]) == (32, 24, True)
    assert towers.module.logit_scale.item() == pytest.approx(theirs.logit_scale.item())
    shutil.copytree(folder, tmp_path / "copy")
    prepared = {"image_mean": [0.5, 0.4, 0.3], "image_std": [0.2, 0.3, 0.4], "resample": 2}
    (tmp_path / "copy" / "preprocessor_config.json").write_text(json.dumps(prepared))
    towers = load_model(f"local-dir:{tmp_path / 'copy'}")
    assert (towers.mean, towers.std, towers.resizing.interpolation) == ((0.5, 0.4, 0.3), (0.2, 0.3, 0.4), "bilinear")


def test_into_a_named_architecture(folder: Path, theirs: Any, tmp_path: Path) -> None:
    """Its activation is taken, its sizes are compared."""
    own = load_model(f"local-dir:{folder}").architecture
    plain = {key: value for key, value in own.items() if key != "quick_gelu"}
    (tmp_path / "mine.json").write_text(json.dumps(plain))
    for weights in (folder, folder / "model.safetensors"):
        towers = assert_same(str(tmp_path / "mine.json"), str(weights), theirs)
        assert "QuickGELU" in towers.notes[0]
    with pytest.raises(UserError, match=r"'demo-vit-32' has embed_dim = 64, the weights .* have 24: .*local-dir:"):
        load_model("demo-vit-32", str(folder))
    (tmp_path / "alone.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
    with pytest.raises(UserError, match=r"names of transformers' CLIPModel: name its folder"):
        load_model(str(tmp_path / "mine.json"), str(tmp_path / "alone.safetensors"))


def test_plain_gelu(tmp_path: Path) -> None:
    theirs = write_clip(tmp_path / "model", hidden_act="gelu")
    assert not assert_same(f"local-dir:{tmp_path / 'model'}", "", theirs).architecture["quick_gelu"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "siglip", "architectures": ["SiglipModel"]}, "SiglipModel of transformers; only CLIPModel"),
        ({"architectures": ["CLIPTextModel"]}, "CLIPTextModel of transformers"),
        ({"text_config": {"vocab_size": 99}}, "vocabulary of 99: its tokenizer is not CLIP's"),
        ({"text_config": {"hidden_act": "relu"}}, r"activations \['quick_gelu', 'relu'\]"),
        ({"vision_config": {"layer_norm_eps": 1e-6}}, "a layer_norm_eps other"),
    ],
)
def test_what_is_not_read(change: dict, message: str, folder: Path, theirs: Any, tmp_path: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    for key, value in change.items():
        config[key] = {**config[key], **value} if isinstance(value, dict) else value
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=message):
        load_model(f"local-dir:{tmp_path}")


def test_open_clip_makes_the_same_of_the_result(folder: Path, theirs: Any, tmp_path: Path) -> None:
    towers = load_model(f"local-dir:{folder}")
    disttempnet.models.save_model(towers, tmp_path, logit_scale=10.0)
    opened, _, _ = open_clip.create_model_and_transforms(f"local-dir:{tmp_path}")
    pixels = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        expected = features(theirs.get_image_features(pixels))
        torch.testing.assert_close(opened.eval().encode_image(pixels), expected, rtol=1e-4, atol=1e-4)
