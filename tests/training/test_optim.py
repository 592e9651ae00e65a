"""Learning rates by formula, and which parameter is in which group."""

from __future__ import annotations

import itertools
import json
import shlex
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from disttempnet.cli.main import main
from disttempnet.config import OptimConfig, load_config
from disttempnet.errors import UserError, UserNotice
from disttempnet.losses import build_loss
from disttempnet.models import load_model
from disttempnet.models.depth import depths
from disttempnet.training import checkpoint
from disttempnet.training.checkpoint import load_run
from disttempnet.training.optim import (
    SHARDED,
    build_optimizers,
    learning_rate,
    refuse_unusable,
    set_learning_rate,
    temperature_learning_rate,
    with_warmup_steps,
)
from disttempnet.training.run_folder import list_checkpoints
from disttempnet.training.trainer import train
from tests import parts
from tests.gloo import Pools
from tests.training.optimizers import Layers, largest_differences
from tests.training.test_trainer import debug, losses, same_ending

from timm.optim import list_optimizers  # isort: skip (after disttempnet.models)


def test_warm_up_then_cosine() -> None:
    config = OptimConfig(lr=1.0, warmup_steps=4, lr_end=0.2)
    rates = [learning_rate(config, step, 24) for step in range(25)]
    assert rates[:4] == [0.25, 0.5, 0.75, 1.0]
    assert rates[4] == 1.0
    assert rates[14] == pytest.approx(0.6)
    assert rates[24] == pytest.approx(0.2)
    assert all(a >= b for a, b in itertools.pairwise(rates[4:]))


def test_constant_and_warm_up_stable_decay() -> None:
    constant = OptimConfig(lr=1.0, warmup_steps=2, schedule="constant")
    assert [learning_rate(constant, step, 20) for step in range(20)] == [0.5] + [1.0] * 19
    wsd = OptimConfig(lr=1.0, warmup_steps=2, schedule="wsd", decay_share=0.25, lr_end=0.2)
    found = [learning_rate(wsd, step, 20) for step in range(21)]
    assert found[:16] == [0.5] + [1.0] * 15
    assert found[16:] == pytest.approx([0.84, 0.68, 0.52, 0.36, 0.2])
    late = OptimConfig(lr=1.0, warmup_steps=18, schedule="wsd", decay_share=1.0)
    assert [learning_rate(late, step, 20) for step in (17, 18, 19, 20)] == [1.0, 1.0, 0.5, 0.0]


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ("{lr=1, warmup_steps=3, warmup_share=0.1}", "give warmup_steps or warmup_share, not both"),
        ("{lr=1, schedule='constant', lr_end=0.1}", "lr_end is for a schedule that falls.*, or set optim.lr_end=0$"),
        ("{lr=1, decay_share=0.5}", "decay_share is for schedule.*, or set optim.decay_share=0.2$"),
        ("{lr=1, schedule='wsd', decay_share=0.5, warmup_share=0.6}", "more than the run together"),
        ("{lr=1, schedule='linear'}", r"key 'optim.schedule'.*'cosine', 'constant' or 'wsd'"),
    ],
)
def test_keys_that_contradict_each_other_are_refused(keys: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        debug(tmp_path, f"optim={keys}")


def test_layer_decay_of_frozen_towers_is_refused(tmp_path: Path) -> None:
    frozen = ["train.freeze=towers", "model.pretrained=openai"]
    with pytest.raises(
        UserError, match=r'optim.layer_decay is for trained towers: leave it out with train.freeze = "to'
    ):
        debug(tmp_path, *frozen, "optim.layer_decay=0.9")
    assert debug(tmp_path, *frozen, "optim.layer_decay=1.0").train.freeze == "towers"


def test_documented_commands_have_settings_that_go_together() -> None:
    page = (Path(__file__).parents[2] / "docs" / "training.md").read_text()
    commands = [shlex.split(line)[2:] for line in page.splitlines() if line.startswith("disttempnet train ")]
    assert any("optim.name=lion" in command for command in commands)
    for path, *overrides in commands:
        config = load_config(Path(path).stem, [one for one in overrides if "=" in one])
        refuse_unusable(config.optim, config.train.shard)


def test_a_warm_up_as_a_share_of_the_run(tmp_path: Path) -> None:
    shares = [with_warmup_steps(OptimConfig(lr=1, warmup_share=share), 40) for share in (0.1, 0.001, 0.99)]
    assert [config.warmup_steps for config in shares] == [4, 1, 40]
    short = ["data.limit=64", "train.epochs=2", "eval.tasks=[]", "optim.warmup_steps=0", "optim.warmup_share=0.5"]
    assert train(debug(tmp_path, *short, "optim.schedule='constant'", "train.stop_after_steps=1"))
    assert train(debug(tmp_path, *short, "optim.schedule='constant'"), resume="auto")
    assert rates(tmp_path / "debug") == [0.5e-3, 1e-3, 1e-3, 1e-3]


def test_a_warm_up_that_fills_the_run_is_a_tenth_of_it() -> None:
    config = OptimConfig(lr=1.0, warmup_steps=40)
    assert with_warmup_steps(config, 41) == config
    assert [with_warmup_steps(config, steps).warmup_steps for steps in (40, 16, 9, 1)] == [4, 1, 1, 1]
    assert with_warmup_steps(OptimConfig(lr=1.0), 1).warmup_steps == 0


def test_a_small_data_set_is_learned_and_the_warm_up_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "debug", f"out={tmp_path}", "data.limit=64", "train.epochs=2", "eval.tasks=[]"]) == 0
    assert "optim.warmup_steps = 5 would take up the whole run of 4 steps: shortened to 1" in capsys.readouterr().err
    assert rates(tmp_path / "debug") == pytest.approx([1e-3, 1e-3, 0.75e-3, 0.25e-3])
    assert load_config(tmp_path / "debug" / "config.toml").optim.warmup_steps == 5, "as it was asked for"


def rates(run: Path) -> list[float]:
    lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line)["lr"] for line in lines]


@pytest.mark.parametrize("older", [False, True])
def test_a_resumed_run_keeps_the_warm_up_that_it_began_with(older: bool, tmp_path: Path) -> None:
    command = ["train", "debug", f"out={tmp_path}", "data.limit=64", "train.epochs=2", "eval.tasks=[]"]
    command += ["data.workers=0", "train.log_every=1"]
    assert main([*command, "train.stop_after_steps=2"]) == 0
    if older:
        _edit(tmp_path / "debug", lambda trainer: trainer.pop("warmup_steps"))
    assert main([*command, "--resume", "auto"]) == 0
    # 5 steps of warm-up in a run of 4: one step as it began, and all of them as older versions had it
    assert rates(tmp_path / "debug")[2:] == pytest.approx([0.6e-3, 0.8e-3] if older else [0.75e-3, 0.25e-3])


def _edit(run: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Make a checkpoint what an older version would have written."""
    last = list_checkpoints(run)[-1]
    trainer = torch.load(last / "trainer.pt", weights_only=True)
    change(trainer)
    torch.save(trainer, last / "trainer.pt")
    listing = json.loads((last / "files.json").read_text(encoding="utf-8"))
    content = (last / "trainer.pt").read_bytes()
    listing["trainer.pt"] = [len(content), zlib.crc32(content)]
    (last / "files.json").write_text(json.dumps(listing), encoding="utf-8")


@pytest.mark.filterwarnings("always::disttempnet.errors.UserNotice")
def test_a_run_with_values_that_no_new_one_may_have_is_opened_and_goes_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "debug"
    command = ["train", "debug", f"out={tmp_path}", "eval.tasks=[]", "data.workers=0", "train.log_every=1"]
    assert main([*command, "train.stop_after_steps=1"]) == 0

    def of_before(trainer: dict[str, Any]) -> None:
        trainer["config"]["optim"]["lr_end"] = 2e-3
        trainer["config"]["loss"]["rho"] = -1.0

    _edit(run, of_before)
    with pytest.warns(UserNotice, match=r"lr_end 0.002 is above lr 0.001") as told:
        assert load_run(run).loss.rho == -1
    assert any("rho must be a number above 0 and at most 100, got -1.0" in str(one.message) for one in told)

    capsys.readouterr()
    same = ["optim.lr_end=2e-3", "loss.rho=-1.0"]
    command += ["train.stop_after_steps=2", "--resume", "auto"]
    assert main([*command, *same]) == 0
    assert "lr_end 0.002 is above lr 0.001: set optim.lr_end too: kept, as" in capsys.readouterr().err
    assert rates(run) == pytest.approx([0.2e-3, 0.4e-3])
    # what is not that run's own is refused as ever: in it, and in a new one
    for wrong, said in {
        ("train.keep=0", *same): "key 'train.keep': must be a whole number from 1 to",
        ("optim.lr_end=3e-3", "loss.rho=-1.0"): "lr_end 0.003 is above lr 0.001",
        ("optim.lr_end=2e-3", "loss.rho=-2.0"): "rho must be a number above 0 and at most 100, got -2.0",
        ("name=new", *same): "lr_end 0.002 is above lr 0.001",
    }.items():
        assert main([*command, *wrong]) == 2
        assert said in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


def test_the_temperature_decays_by_epoch_after_the_same_warm_up() -> None:
    config = OptimConfig(lr=1.0, warmup_steps=2)
    network = build_loss("disttempnet", num_samples=9, embed_dim=8, tau_lr=3e-5, tau_lr_decay=0.9).temperature
    assert temperature_learning_rate(config, 0, network.learning_rate(0)) == pytest.approx(1.5e-5)
    assert temperature_learning_rate(config, 9, network.learning_rate(2)) == pytest.approx(3e-5 * 0.81)


def test_every_trained_parameter_is_in_one_group() -> None:
    towers = load_model("demo-vit-32").module
    towers.logit_scale.requires_grad_(False)
    for name in ("clip", "sogclr", "isogclr", "fastclip-v0", "fastclip-v3", "disttempnet-v1"):
        loss = build_loss(name, num_samples=9, embed_dim=64)
        optimizers = build_optimizers(towers, loss, OptimConfig(lr=1e-3, weight_decay=0.3))
        seen = [id(p) for o in optimizers for g in o.param_groups for p in g["params"]]
        wanted = [id(p) for m in (towers, loss) for p in m.parameters() if p.requires_grad]
        assert sorted(seen) == sorted(wanted)
        decayed = {id(p) for o in optimizers for g in o.param_groups if g["weight_decay"] for p in g["params"]}
        assert all(p.ndim >= 2 for p in towers.parameters() if id(p) in decayed)
        assert not decayed & {id(p) for p in loss.parameters()}
        assert len(optimizers) == (2 if name in ("disttempnet-v1", "fastclip-v3") else 1)


# ---- layer-wise learning-rate decay ----

RESNET = {"layers": [2, 1, 1, 1], "width": 8, "image_size": 32, "patch_size": None}
TEXT = {"context_length": 12, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 2}
CASES = {  # name of the towers → a few parameters and how many layers lie above them
    "demo-vit-32": {
        "visual.conv1.weight": 3, "visual.class_embedding": 3, "visual.transformer.resblocks.0.ln_1.bias": 2,
        "visual.transformer.resblocks.1.mlp.c_fc.weight": 1, "visual.ln_post.weight": 0, "visual.proj": 0,
        "token_embedding.weight": 2, "transformer.resblocks.0.ln_1.bias": 1, "text_projection": 0, "logit_scale": 0,
    },
    "demo-convnext-32": {
        "visual.trunk.stem.0.weight": 6, "visual.trunk.stages.3.blocks.0.mlp.fc1.weight": 2,
        "visual.head.proj.weight": 0, "transformer.resblocks.0.ln_1.bias": 1,
    },
    "timm-and-hf": {
        "visual.trunk.patch_embed.proj.weight": 7, "visual.trunk.blocks.3.attn.qkv.weight": 3,
        "visual.head.proj.weight": 0, "text.transformer.embeddings.word_embeddings.weight": 4,
        "text.transformer.transformer.layer.2.ffn.lin1.bias": 1,
        "text.proj.weight": 0,
    },
    "modified-resnet": {
        "visual.conv3.weight": 6, "visual.layer1.1.conv1.weight": 4, "visual.layer4.0.bn1.bias": 1,
        "visual.attnpool.v_proj.weight": 0, "positional_embedding": 3,
    },
}  # fmt: skip


def architecture(kind: str, folder: Path) -> str:
    if kind == "timm-and-hf":
        parts.write_text_folder(folder)
        return parts.write_architecture(folder, "test_vit")
    if kind == "modified-resnet":
        config = {"embed_dim": 16, "vision_cfg": RESNET, "text_cfg": TEXT}
        (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": {}}))
        return str(folder / "open_clip_config.json")
    return kind


@pytest.mark.parametrize("kind", CASES)
def test_lower_layers_learn_more_slowly(kind: str, tmp_path: Path) -> None:
    module = load_model(architecture(kind, tmp_path)).module
    named = dict(module.named_parameters())
    above = {name: depth.above for name, depth in depths(module).items()}
    assert above.keys() == named.keys()
    assert {name: above[name] for name in CASES[kind]} == CASES[kind]

    loss = build_loss("clip", num_samples=9, embed_dim=16)
    (adamw,) = build_optimizers(module, loss, OptimConfig(lr=1e-3, weight_decay=0.3, layer_decay=0.5))
    set_learning_rate(adamw, 1e-2)
    rate = {id(p): group["lr"] for group in adamw.param_groups for p in group["params"]}
    everything = [*named.values(), *loss.parameters()]
    assert sorted(id(p) for g in adamw.param_groups for p in g["params"]) == sorted(map(id, everything)), "each in one"
    for name, p in named.items():
        assert rate[id(p)] == pytest.approx(1e-2 * 0.5 ** above[name]), name
    assert {rate[id(p)] for p in loss.parameters()} == {1e-2}


def test_layer_decay_resumes_exactly_and_keeps_the_logged_rate(tmp_path: Path) -> None:
    own = ("optim.layer_decay=0.5", "eval.tasks=[]")
    assert train(debug(tmp_path / "a", *own, "train.stop_after_steps=6"))
    for stop in (3, 6):
        assert train(debug(tmp_path / "b", *own, f"train.stop_after_steps={stop}"), resume="auto")
    assert losses(tmp_path / "a" / "debug") == losses(tmp_path / "b" / "debug")
    same_ending(tmp_path / "a" / "debug", tmp_path / "b" / "debug")
    assert rates(tmp_path / "a" / "debug")[:5] == pytest.approx([0.2e-3, 0.4e-3, 0.6e-3, 0.8e-3, 1e-3])


# ---- other optimizers ----


def usable() -> list[str]:
    names = []
    for name in list_optimizers():
        try:
            refuse_unusable(OptimConfig(name=name, lr=1))
        except UserError:
            continue
        names.append(name)
    return names


def test_every_optimizer_goes_on_to_the_bit(tmp_path: Path) -> None:
    """Through what a checkpoint keeps of it; and at a rate of 0 it leaves the weights alone (train.warm_statistics)."""
    names = usable()
    assert {"lion", "muon", "lamb", "adafactorbv", "sgd"} <= set(names)
    assert set(names) >= SHARDED
    for name in names:
        straight, first, still = Layers(), Layers(), Layers()
        straight.take_steps(straight.optimizer(name), range(5))
        before = first.optimizer(name)
        first.take_steps(before, range(3))
        torch.save(checkpoint._split_moments([before])[0], tmp_path / "states.pt")
        after = first.optimizer(name)
        checkpoint._restore_optimizers(tmp_path, torch.load(tmp_path / "states.pt", weights_only=True), [after])
        first.take_steps(after, range(3, 5))
        assert first.equals(straight), name
        still.take_steps(still.optimizer(name), range(2), lr=0.0)
        assert still.equals(Layers()), name
        assert not straight.equals(still), name


def test_sharded_parameters_take_the_same_steps(gloo: Pools) -> None:
    for found in gloo(2, largest_differences, sorted(SHARDED)):
        assert {name: error for name, error in found.items() if error > 1e-6 and name != "muon"} == {}
        assert found["muon"] < 2e-3, "it orthogonalises in bf16: of steps of 1e-2"


@pytest.mark.parametrize("name", ["lamb", "muon", "adafactorbv"])
def test_a_run_with_it_resumes_exactly(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """LAMB counts steps in its groups, Muon keeps flags, Adafactor factors its moments."""
    own = [f"optim.name={name}", "eval.tasks=[]"]
    assert train(debug(tmp_path / "a", *own, "train.stop_after_steps=6"))
    assert f"optim.name = {name}: " in capsys.readouterr().err
    for stop in (3, 6):
        assert train(debug(tmp_path / "b", *own, f"train.stop_after_steps={stop}"), resume="auto")
    assert losses(tmp_path / "a" / "debug") == losses(tmp_path / "b" / "debug")
    same_ending(tmp_path / "a" / "debug", tmp_path / "b" / "debug")


def two_processes(out: str, *overrides: str) -> None:
    train(debug(Path(out), "eval.tasks=[]", "train.stop_after_steps=4", "loss={name='clip'}", *overrides))


@pytest.mark.parametrize("name", ["lamb", "muon"])
def test_two_processes_train_as_one_sharded_or_not(name: str, gloo: Pools, tmp_path: Path) -> None:
    own = [f"optim.name={name}", "optim.layer_decay=0.9"]
    ways = ["train.shard=false", *(["train.shard=true"] if name in SHARDED else [])]
    two_processes(str(tmp_path / "one"), *own)
    expected = list(losses(tmp_path / "one" / "debug").values())
    for way in ways:
        gloo(2, two_processes, str(tmp_path / way), *own, way)
        assert list(losses(tmp_path / way / "debug").values()) == pytest.approx(expected, rel=1e-3), way


def test_muon_leaves_embeddings_and_heads_to_adamw() -> None:
    module = load_model("demo-vit-32").module
    muon = build_optimizers(module, build_loss("clip", num_samples=1, embed_dim=64), OptimConfig(name="muon", lr=1))[0]
    names = {id(p): name for name, p in module.named_parameters()}
    mapped = {names[id(p)] for g in muon.param_groups if not g["use_fallback"] for p in g["params"]}
    mapped = {name for name in mapped if module.get_parameter(name).ndim >= 2}
    assert mapped == {
        name for name, p in module.named_parameters() if ".resblocks." in name and p.ndim >= 2
    }  # fmt: skip
    assert len(mapped) == 12


@pytest.mark.parametrize(
    ("own", "message"),
    [
        (["optim.name=lyon"], r"\[optim\] unknown name 'lyon'. Did you mean 'lion'\?"),
        (["optim.name=kron"], "optim.name = 'kron' cannot be used: it draws random numbers"),
        (["optim.name=adahessian"], "cannot be used: it differentiates the gradient again"),
        (["optim.name=bnbadamw8bit"], "cannot be used: it belongs to bitsandbytes, which is not supported"),
        (["optim.name=clion", "train.shard=true"], "'clion' cannot step sharded parameters: leave train.shard out"),
        (
            ["optim.name=lion", "optim.eps=1e-8"],
            "optim.eps has no effect on lion.*, or set optim.eps=1e-06, its default",
        ),
        (["optim.name=sgd", "optim.beta2=0.95"], "optim.beta2 has no effect on sgd"),
        (["optim.name=adan", "optim.beta1=0.95"], "optim.beta1 has no effect on adan"),
    ],
)
def test_optimizers_that_cannot_be_used_are_refused_before_a_run_begins(
    own: list[str], message: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=message):
        train(debug(tmp_path, *own))
    assert not (tmp_path / "debug").exists()
