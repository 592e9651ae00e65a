"""What of the towers is trained: locks leave what they say, BatchNorm knows no world size."""

from __future__ import annotations

import pytest
import torch

from disttempnet.config import CONFIG_FOLDER, ModelConfig, load_config
from disttempnet.errors import UserError
from disttempnet.models import Towers, encode_images, load_model
from disttempnet.models.locks import prepare_towers
from tests import parts

from timm.models import group_parameters  # isort: skip (after disttempnet.models)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("parts")
    return {
        "name": parts.write_architecture(folder / "architecture"),
        "image_pretrained": str(parts.write_image_weights(folder / "resnet.safetensors")),
        "text_pretrained": str(parts.write_text_folder(folder / "distilbert")),
    }


def prepared(made: dict[str, str], **keys: bool | int | str) -> Towers:
    config = ModelConfig.model_validate({**made, **keys})
    towers = load_model(config.name, image_pretrained=config.image_pretrained, text_pretrained=config.text_pretrained)
    towers.module.train()
    prepare_towers(towers.module, config)
    return towers


def trained(towers: Towers) -> set[str]:
    """Names of the trained parameters, cut to the layer."""
    names = {name for name, p in towers.module.named_parameters() if p.requires_grad}
    short = {name.removeprefix("visual.").removeprefix("text.").removeprefix("transformer.") for name in names}
    return {".".join(name.split(".")[:3]).removesuffix(".weight").removesuffix(".bias") for name in short}


def test_a_locked_tower_keeps_all_but_its_projection(made: dict[str, str]) -> None:
    assert trained(prepared(made, lock_image=True, lock_text=True)) == {"head.proj", "proj", "logit_scale"}


def test_the_last_layers_of_a_locked_tower_can_be_trained(made: dict[str, str]) -> None:
    text = trained(prepared(made, lock_image=True, lock_text=True, unlocked_text_layers=1))
    assert text == {"head.proj", "proj", "logit_scale", "transformer.layer.2"}
    image = trained(prepared(made, lock_image=True, unlocked_image_groups=1, lock_text=True))
    assert {name for name in image if name.startswith("trunk")} == {"trunk.layer4.0"}


def test_more_unlocked_groups_than_there_are_lock_nothing(made: dict[str, str]) -> None:
    trunk = prepared(made).module.visual.trunk
    groups = len(group_parameters(trunk, trunk.group_matcher()))
    for count in (groups, groups + 1, 99):  # groups + 1: a slice from the end would lock all but the last
        unlocked = prepared(made, lock_image=True, unlocked_image_groups=count).module.visual
        assert all(p.requires_grad for p in unlocked.parameters()), count


@pytest.mark.parametrize("name", ["demo-vit-32", "demo-convnext-32"])
def test_towers_of_open_clip_are_locked_too(name: str) -> None:
    towers = load_model(name)
    prepare_towers(towers.module, ModelConfig(name=name, pretrained="x", lock_image=True, lock_text=True))
    left = {key for key, p in towers.module.named_parameters() if p.requires_grad}
    assert left == {"logit_scale"} | ({"visual.head.proj.weight"} if "convnext" in name else set())


@pytest.mark.parametrize("keys", [{"batch_norm": "frozen"}, {"lock_image": True}])
def test_statistics_stay_in_training(made: dict[str, str], keys: dict[str, bool | str]) -> None:
    towers = prepared(made, **keys)
    before = {key: value.clone() for key, value in towers.module.state_dict().items() if "running" in key}
    pixels = torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    towers.module.train()
    together = encode_images(towers, pixels)
    after = towers.module.state_dict()
    assert before
    assert all(torch.equal(after[key], value) for key, value in before.items())
    torch.testing.assert_close(encode_images(towers, pixels[:1]), together[:1], msg="a row knows no other row")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.lock_image=true", "lock_image would keep random weights"),
        ("model.unlocked_text_layers=2", "set lock_text = true"),
        ("model={name='a', pretrained='b', text_pretrained='c'}", "not all"),
    ],
)
def test_keys_that_contradict_each_other_are_refused(override: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_config(CONFIG_FOLDER / "debug.toml", [override])
