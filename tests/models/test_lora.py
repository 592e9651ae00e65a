"""Adapters: merged towers give the features of unmerged ones, only adapters and heads learn, runs resume to the bit."""

from __future__ import annotations

import copy
import importlib.util
import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from disttempnet.config import LoraConfig
from disttempnet.errors import UserError
from disttempnet.models import Towers, encode_texts, load_model, save_model
from disttempnet.models.locks import lock_image_tower, lock_text_tower
from disttempnet.models.lora import LORA_NAME, Adapters
from disttempnet.training.checkpoint import TRAINED_NAME, load_run
from disttempnet.training.run_folder import list_checkpoints
from disttempnet.training.trainer import Trainer, train
from tests import parts
from tests.gloo import Pools
from tests.training.test_trainer import CPU, debug, losses, same_ending

import open_clip  # isort: skip (after disttempnet.models)

TEXTS = ["a red apple", "two dogs"]


def features(towers: Towers, module: torch.nn.Module) -> Tensor:
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(2)).to(next(module.parameters()).dtype)
    return torch.stack([module.encode_image(images), module.encode_text(towers.tokenizer(TEXTS))])


def adapted(towers: Towers, config: LoraConfig) -> Adapters:
    lock_image_tower(towers.module)
    lock_text_tower(towers.module)
    towers.module.logit_scale.requires_grad_(False)
    return Adapters(towers.module, config)


@pytest.mark.parametrize("kind", ["demo-vit-32", "demo-convnext-32", "timm-and-hf"])
def test_merged_towers_give_the_same_features(kind: str, tmp_path: Path) -> None:
    if kind == "timm-and-hf":
        parts.write_text_folder(tmp_path)
        kind = parts.write_architecture(tmp_path, "test_vit")
    towers = load_model(kind)
    module = towers.module.double()
    names, before = set(module.state_dict()), features(towers, module).detach()
    adapters = adapted(towers, LoraConfig(rank=2, alpha=4))
    torch.testing.assert_close(features(towers, module), before, rtol=0, atol=1e-12)
    learned = {name for name, p in module.named_parameters() if p.requires_grad}
    assert {name for name in learned if ".lora_" not in name} <= {
        "visual.head.proj.weight", "visual.head.proj.bias", "text.proj.weight",
    }  # fmt: skip
    torch.manual_seed(3)
    with torch.no_grad():
        for name in learned:
            module.get_parameter(name).normal_(0, 0.1)
    after = features(towers, module)
    after.square().sum().backward()
    assert all(module.get_parameter(name).grad is not None for name in learned)
    assert (after - before).abs().max() > 0.01
    merged = adapters.merged()
    assert set(merged.state_dict()) == names
    torch.testing.assert_close(features(towers, merged), after, rtol=0, atol=1e-12)
    torch.testing.assert_close(features(towers, module), after, rtol=0, atol=1e-12)  # and they are not merged by it


@pytest.mark.parametrize("kind", ["demo-vit-32", "demo-convnext-32"])
def test_features_and_gradients_are_those_of_weights_with_one_update(kind: str) -> None:
    """W + α/r · B·A by hand and by autograd, output projections of attentions among them (peft alone adds it twice)."""
    towers = load_model(kind)
    plain = copy.deepcopy(towers.module).double()
    module = towers.module.double()
    adapted(towers, LoraConfig(rank=2, alpha=6))
    torch.manual_seed(3)
    own = {name: p for name, p in module.named_parameters() if ".lora_" in name}
    for p in own.values():
        torch.nn.init.normal_(p, 0, 0.3)
    weights, factors = dict(plain.named_parameters()), {}
    for name in own:
        if ".lora_A." in name:
            a, b = (own[n].detach().requires_grad_() for n in (name, name.replace("lora_A", "lora_B")))
            factors |= {name: a, name.replace("lora_A", "lora_B"): b}
            place = name.partition(".lora_A")[0].replace(".base_layer", "")
            target = f"{place}.weight" if f"{place}.weight" in weights else f"{place}.in_proj_weight"
            weights[target] = weights[target].detach() + 6 / 2 * b @ a
    assert factors.keys() == own.keys()
    assert any("out_proj" in name for name in factors)

    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(2)).double()
    expected = torch.func.functional_call(plain, weights, (images, towers.tokenizer(TEXTS)))
    found = module(images, towers.tokenizer(TEXTS))
    probe = [torch.randn_like(side) for side in expected[:2]]
    for features_, learned in ((expected, factors), (found, own)):
        sum((side * direction).sum() for side, direction in zip(features_[:2], probe, strict=True)).backward()
        assert all(p.grad is not None for p in learned.values())
    for name, p in own.items():
        torch.testing.assert_close(p.grad, factors[name].grad, rtol=1e-9, atol=1e-11, msg=name)
    for side, of in zip(found[:2], expected[:2], strict=True):
        torch.testing.assert_close(side, of, rtol=0, atol=1e-12)


def test_a_peft_that_merges_otherwise_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """As it would be if its attention left the output projection to the projection's own `merge`."""
    from peft.tuners.lora import layer

    def merge(self: layer.MultiheadAttention, *_: object, **__: object) -> None:
        self.base_layer.in_proj_weight.data += self.get_delta_weight("default")
        self.base_layer.out_proj.merge()

    monkeypatch.setattr(layer.MultiheadAttention, "merge", merge)
    with pytest.raises(UserError, match=r"\[lora\] peft [\d.]+ merges adapters of attentions in a way"):
        adapted(load_model("demo-vit-32"), LoraConfig(rank=2))


def test_locked_weights_of_attentions_stay_equal_to_the_bit() -> None:
    """Passes with and without gradients, one that fails, and one in a copy."""
    towers = load_model("demo-vit-32")
    module = towers.module
    before = {name: value.clone() for name, value in module.state_dict().items()}
    adapted(towers, LoraConfig(rank=2, alpha=4))
    torch.manual_seed(3)
    for name, p in module.named_parameters():
        if ".lora_" in name:
            torch.nn.init.normal_(p, 0, 0.1)

    def changed(one: torch.nn.Module) -> list[str]:
        own = {re.sub(r"\.base_layer", "", name): value for name, value in one.state_dict().items()}
        return [name for name, value in before.items() if not torch.equal(own[name], value)]

    first = features(towers, module)
    for number in range(50):
        with torch.set_grad_enabled(number % 2 == 0):
            found = features(towers, module)
        if number % 2 == 0:
            assert torch.equal(found, first)
            found.square().sum().backward()
    assert changed(module) == []

    attention = module.visual.transformer.resblocks[0].attn
    with pytest.raises((AssertionError, RuntimeError), match=r"embedding dimension|shapes cannot be multiplied"):
        attention(*[torch.zeros(1, 1, 3)] * 3)
    twin = copy.deepcopy(module)
    assert torch.equal(features(towers, twin), first)
    assert changed(module) == changed(twin) == []


def test_a_line_says_which_attentions_have_adapters_in_part() -> None:
    """Those of open_clip's own class, where queries, keys and values are a parameter of no layer."""
    towers = load_model("demo-vit-32")
    kinds = [type(block.attn) for block in towers.module.visual.transformer.resblocks]
    said = adapted(towers, LoraConfig(rank=2)).describe()
    assert ("queries, keys and values of" in said) == (torch.nn.MultiheadAttention not in kinds)

    def said_of_one(**keys: tuple[str, ...]) -> str:
        towers = load_model("demo-vit-32")
        block = towers.module.visual.transformer.resblocks[0]
        block.attn = open_clip.transformer.Attention(block.ln_1.weight.numel(), 2)
        return adapted(towers, LoraConfig(rank=2, **keys)).describe()

    one = "; queries, keys and values of 1 attentions have none with open_clip"
    assert one in said_of_one(towers=("image",))
    assert one in said_of_one(towers=("image",), targets=("out_proj",))
    for left_out in ({"towers": ("text",), "targets": ("c_fc",)}, {"targets": ("c_fc",)}):
        assert "queries" not in said_of_one(**left_out)


def test_targets_are_names_of_maps_between_embeddings_and_heads() -> None:
    towers = load_model("demo-vit-32")
    adapted(towers, LoraConfig(rank=2, targets=("c_fc",), towers=("text",)))
    learned = [name for name, p in towers.module.named_parameters() if p.requires_grad]
    assert learned == [
        f"transformer.resblocks.{number}.mlp.c_fc.lora_{letter}.default.weight" for number in (0,) for letter in "AB"
    ]
    with pytest.raises(UserError, match=r"\[lora\] unknown target 'q_proj'. Did you mean 'c_proj'\? Known: .*c_fc"):
        adapted(load_model("demo-vit-32"), LoraConfig(rank=2, targets=("q_proj",)))


@pytest.fixture
def own(tmp_path: Path) -> list[str]:
    """A run with adapters on pretrained towers, and an average of them."""
    torch.manual_seed(8)
    save_model(load_model("demo-vit-32"), tmp_path, logit_scale=10.0)
    pretrained = f"model.pretrained={json.dumps(str(tmp_path))}"
    return [pretrained, "lora.rank=2", "lora.alpha=4", "eval.tasks=[]", "train.ema=0.5", "optim.layer_decay=0.9"]


def test_a_run_resumes_exactly_and_open_clip_opens_it(
    own: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(debug(tmp_path / "a", *own, "train.stop_after_steps=4"))
    assert re.search(r"lora.rank = 2: [\d,]+ of [\d,]+ parameters of the towers are trained", capsys.readouterr().err)
    for stop in (2, 4):
        assert train(debug(tmp_path / "b", *own, f"train.stop_after_steps={stop}"), resume="auto")
    assert losses(tmp_path / "a" / "debug") == losses(tmp_path / "b" / "debug")
    same_ending(tmp_path / "a" / "debug", tmp_path / "b" / "debug")
    folders = [list_checkpoints(tmp_path / name / "debug")[-1] for name in "ab"]
    for name in (LORA_NAME, TRAINED_NAME):
        assert (folders[0] / name).read_bytes() == (folders[1] / name).read_bytes()

    # What training goes on with has the pretrained weights under the adapters; what is saved has them merged.
    pretrained, merged = (load_file(folder / "open_clip_model.safetensors") for folder in (tmp_path, folders[0]))
    state = load_file(folders[0] / LORA_NAME)
    mlp = "visual.transformer.resblocks.0.mlp.c_fc"
    assert torch.equal(state[f"{mlp}.base_layer.weight"], pretrained[f"{mlp}.weight"])
    update = 2 * state[f"{mlp}.lora_B.default.weight"] @ state[f"{mlp}.lora_A.default.weight"]
    assert update.abs().max() > 1e-6
    torch.testing.assert_close(merged[f"{mlp}.weight"], pretrained[f"{mlp}.weight"] + update)
    assert torch.equal(merged["token_embedding.weight"], pretrained["token_embedding.weight"])

    run = load_run(tmp_path / "a" / "debug")
    module, _, _ = open_clip.create_model_and_transforms(f"local-dir:{folders[0]}")
    tokens = run.towers.tokenizer(TEXTS)
    expected = encode_texts(run.towers, tokens, normalize=False)
    torch.testing.assert_close(module.eval().encode_text(tokens), expected)
    unmerged = Trainer(debug(tmp_path / "a", *own), CPU, "auto")
    assert unmerged.average is not None
    with unmerged.average.in_place(unmerged.towers.module), torch.no_grad():
        found = unmerged.towers.module.encode_text(tokens)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_adapters_that_an_earlier_version_added_twice_are_refused(tmp_path: Path) -> None:
    """A file without the mark that has adapters of an attention's output projection: W + 2Δ would become W + Δ."""

    def opened(*targets: str, checkpoint: Path | None = None) -> Adapters:
        module = load_model("demo-vit-32").module
        block = module.visual.transformer.resblocks[0]
        block.attn = torch.nn.MultiheadAttention(block.ln_1.weight.numel(), 2)  # whatever open_clip's version has
        return Adapters(module, LoraConfig(rank=2, targets=targets), checkpoint)

    for name, targets in (("attention", ("attn",)), ("map", ("c_fc",))):
        (folder := tmp_path / name).mkdir()
        opened(*targets).save(folder)
        opened(*targets, checkpoint=folder)
        save_file(load_file(folder / LORA_NAME), folder / LORA_NAME)
    opened("c_fc", checkpoint=tmp_path / "map")
    with pytest.raises(UserError, match=r"lora\.safetensors: made by an earlier version.*out_proj twice: .*attention$"):
        opened("attn", checkpoint=tmp_path / "attention")


def some_steps(out: str, *own: str) -> None:
    train(debug(Path(out), *own, "train.stop_after_steps=3"))


def test_two_processes_train_alike(own: list[str], gloo: Pools, tmp_path: Path) -> None:
    some_steps(str(tmp_path / "one"), *own)
    gloo(2, some_steps, str(tmp_path / "two"), *own, "train.accumulate=2")
    expected = list(losses(tmp_path / "one" / "debug").values())
    assert list(losses(tmp_path / "two" / "debug").values()) == pytest.approx(expected, rel=2e-4)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (["lora.rank=2"], r"lora\.rank would adapt random weights: set model\.pretrained"),
        (["model.pretrained=openai", "lora.rank=2", "train.shard=true"], r"lora and train\.shard do not go together"),
        (["model.pretrained=openai", "lora.rank=2", "train.freeze=towers"], r"lora and train\.freeze do not go"),
        (["lora.alpha=2"], r"\[lora\] alpha and targets are of adapters: set rank too"),
        (["lora={rank=2, towers=[]}"], r"\[lora\] towers names none"),
        (["lora.towers=['text']"], r"\[lora\] towers is of adapters: set rank too, or leave it out"),
        (
            ["model.pretrained=openai", "lora.rank=2", "model.lock_image=true", "model.unlocked_image_groups=1"],
            r"lora\.rank and model\.unlocked_image_groups do not go together",
        ),
        (
            ["model.pretrained=openai", "lora.rank=2", "model.lock_text=true", "model.unlocked_text_layers=1"],
            r"lora\.rank and model\.unlocked_text_layers do not go together",
        ),
    ],
)
def test_what_does_not_go_together_is_refused(keys: list[str], message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        debug(tmp_path, *keys)


def test_without_peft_one_line_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(UserError, match=r"\[lora\] needs peft: python -m pip install 'disttempnet\[lora\]'"):
        Adapters(load_model("demo-vit-32").module, LoraConfig(rank=2))
