"""What of the towers is trained: locks leave what they say, BatchNorm knows no world size."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from disttempnet import distributed
from disttempnet.config import CONFIG_FOLDER, ModelConfig, load_config
from disttempnet.errors import UserError
from disttempnet.models import Towers, encode_images, load_model
from disttempnet.models.batch_norm import GlobalBatchNorm
from disttempnet.models.locks import prepare_towers
from tests import parts
from tests.gloo import Pools

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


def network(dtype: torch.dtype) -> nn.Sequential:
    """Two BatchNorms, one behind the other, so that gradients cross ranks and come back."""
    torch.manual_seed(5)
    layers = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Tanh(), nn.Conv2d(4, 5, 3), nn.BatchNorm2d(5, momentum=0.3)
    )
    for p in layers.parameters():
        nn.init.normal_(p)
    return layers.to(dtype)


def outcome(layers: nn.Sequential, x: Tensor, target: Tensor) -> dict[str, Tensor]:
    """Loss that couples features within a rank only, gradients averaged over ranks as DDP does, and statistics."""
    loss = ((layers(x) - target) ** 3).mean()
    loss.backward()
    grads = {k: distributed.all_sum(p.grad) / distributed.world_size() for k, p in layers.named_parameters()}
    state = {k: v.clone() for k, v in layers.state_dict().items() if "running" in k or "tracked" in k}
    return {"loss": distributed.all_sum(loss) / distributed.world_size(), **grads, **state}


def on_a_rank(dtype: torch.dtype, memory_format: torch.memory_format) -> dict[str, Tensor]:
    layers = network(dtype)
    for place in (1, 4):
        layers[place] = GlobalBatchNorm(layers[place])
    x, target = rows(dtype)
    b = len(x) // distributed.world_size()
    mine = slice(distributed.rank() * b, (distributed.rank() + 1) * b)
    result = outcome(layers, x[mine].contiguous(memory_format=memory_format), target[mine])
    layers.eval()
    return result | {"eval": layers(x).detach()}


def rows(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(6)
    scale = torch.arange(1, 9).view(8, 1, 1, 1)  # the ranks' rows differ much
    return (
        (torch.randn(8, 3, 7, 6, generator=generator) * scale + scale).to(dtype),
        torch.randn(8, 5, 3, 2, generator=generator).to(dtype),
    )


@pytest.mark.parametrize("world_size", [2, 4])
def test_batch_norm_over_ranks_is_that_of_one_process(world_size: int, gloo: Pools) -> None:
    layers = network(torch.float64)
    expected = outcome(layers, *rows(torch.float64))
    expected["eval"] = layers.eval()(rows(torch.float64)[0]).detach()
    for result in gloo(world_size, on_a_rank, torch.float64, torch.channels_last):
        assert result.keys() == expected.keys()
        for key, value in expected.items():
            torch.testing.assert_close(result[key], value, rtol=1e-10, atol=1e-10, msg=key)


def test_batch_norm_over_ranks_in_single_precision(gloo: Pools) -> None:
    expected = outcome(network(torch.float32), *rows(torch.float32))
    for result in gloo(2, on_a_rank, torch.float32, torch.contiguous_format):
        for key, value in expected.items():
            torch.testing.assert_close(result[key], value, rtol=1e-3, atol=1e-4, msg=key)


def test_a_batch_norm_without_statistics_is_refused() -> None:
    with pytest.raises(UserError, match=r"BatchNorm1d cannot take .* model.batch_norm"):
        GlobalBatchNorm(nn.BatchNorm1d(3))
