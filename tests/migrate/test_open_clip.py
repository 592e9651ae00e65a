"""open_clip's and FastCLIP's commands become configs; their flags are those of the installed program."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import pytest

import disttempnet.models  # noqa: F401  first: it lets torchvision load beside a CPU-only torch
from disttempnet.config import Config, load_config
from disttempnet.errors import UserError
from disttempnet.migrate.command import Migration, migrate
from disttempnet.migrate.flags import SEVERAL
from disttempnet.migrate.open_clip import FASTCLIP_FLAGS, OPEN_CLIP_FLAGS
from disttempnet.training.optim import refuse_unusable
from tests.migrate.scripts import FASTCLIP, OPEN_CLIP
from tests.migrate.test_first_code import MINE, keys


def read(result: Migration, folder: Path) -> Config:
    path = folder / "run.toml"
    path.write_text(result.text, encoding="utf-8")
    return load_config(path)


def call(*words: str, program: str = "-m training.main") -> Migration:
    text = f"torchrun --nproc_per_node 2 {program} --train-data x.tar {' '.join(words)}"
    return migrate(text, "s.sh")


def test_the_table_has_every_flag_of_the_installed_open_clip(monkeypatch: pytest.MonkeyPatch) -> None:
    """Names, defaults, types and numbers of words, read from its own parser."""
    params = pytest.importorskip("open_clip_train.params")
    seen: list[argparse.Action] = []
    original = argparse.ArgumentParser.parse_args

    def spy(parser: argparse.ArgumentParser, *arguments: Any) -> Any:
        seen.extend(parser._actions)
        return original(parser, *arguments)

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", spy)
    params.parse_args(["--model", "RN50"])
    actions = {action.option_strings[0]: action for action in seen if action.dest != "help"}
    assert actions.keys() == OPEN_CLIP_FLAGS.keys()
    by_model = {"--lr": 5e-4, "--beta1": 0.9}
    for name, action in actions.items():
        flag = OPEN_CLIP_FLAGS[name]
        words = 0 if action.nargs == 0 else SEVERAL if action.nargs in ("+", "*") else 1
        assert flag.words == words, name
        if flag.default is not None and name not in by_model:
            assert flag.default == action.default, name
        if action.type is not None:
            assert flag.kind is action.type, name


@pytest.mark.parametrize("version", sorted(FASTCLIP))
def test_fastclips_own_scripts_give_the_shipped_configs(version: str, tmp_path: Path) -> None:
    found = keys(read(migrate(FASTCLIP[version], "fastclip.sh"), tmp_path))
    shipped = keys(load_config(f"cc3m_rn50_fastclip_{version}"))
    assert found.keys() == shipped.keys()
    differing = {key for key in shipped.keys() - MINE if found[key] != shipped[key]}
    # the script has a batch of 2,048 (the paper 1,024); log and checkpoints are as in open_clip
    assert differing == {"data.global_batch", "train.log_every", "train.keep"}
    assert found["data.global_batch"] == 2048


def test_a_script_of_open_clip(tmp_path: Path) -> None:
    result = migrate(OPEN_CLIP, "base.sh")
    config = read(result, tmp_path)
    assert config.name == "cc12m-base"
    assert config.data.train == "/data/cc12m/cc12m-train-{0000..2175}.tar"
    assert (config.data.global_batch, config.train.accumulate, config.data.workers) == (2560, 2, 6)
    assert config.loss.name == "clip"
    assert (config.optim.beta2, config.optim.eps, config.optim.weight_decay) == (0.98, 1e-6, 0.2)
    assert (config.optim.warmup_steps, config.optim.grad_clip, config.train.precision) == (10_000, 1.0, "bf16")
    assert config.eval.tasks == ("folder:/data/cc12m/imagenet/validation/",)
    assert config.eval.every_epochs == 3
    flat = " ".join(result.text.replace("#", "").split())
    assert (config.train.trackers, config.train.tracker_project) == (("wandb",), "open-clip")
    assert "--gather-with-grad: always so here" in flat
    assert "the script changes to open_clip/src: relative paths begin there" in flat
    assert result.settings.commands == ["torchrun --nproc_per_node 4 -m disttempnet train run.toml"]


@pytest.mark.parametrize("name", sorted(FASTCLIP_FLAGS))
def test_no_flag_is_silent(name: str) -> None:
    flag = FASTCLIP_FLAGS[name]
    choices = {
        "--lr-scheduler": "const", "--precision": "fp32", "--temperature_scheme": "global_constant",
        "--gamma_schedule": "constant",
        "--opt": "timm/lion", "--optimizer": "lamb", "--train-data-upsampling-factors": "2", "--model": "ViT-B-32",
    }  # fmt: skip
    sample = choices.get(name) or {bool: "", int: "4", float: "0.5", str: "name"}[flag.kind]
    words = [name, sample]
    if name.endswith(("unlocked-groups", "unlocked-layers")):
        words.append(name.rpartition("-unlocked")[0])
    if "--lock" in name:
        words += ["--pretrained", "openai"]
    text = call(*words, "" if name == "--fastclip" else "--fastclip").text
    assert name in text


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("--siglip", {"loss.name": "siglip", "loss.bias": -10.0}),
        ("--lock-image --pretrained openai", {"model.lock_image": True, "model.pretrained": "openai"}),
        ("--model convnext_base --pretrained-image", {"model.image_pretrained": "convnext_base"}),
        ("--model roberta-ViT-B-32", {"model.text_pretrained": "roberta-base"}),
        ("--model ViT-B-32 --force-quick-gelu", {"model.name": "ViT-B-32-quickgelu"}),
        ("--resume ckpt/epoch_3.pt", {"model.pretrained": "ckpt/epoch_3.pt"}),
        ("--lr-scheduler const --lr 1e-3", {"optim.schedule": "constant", "optim.warmup_steps": 10_000}),
        ("--skip-scheduler", {"optim.schedule": "constant", "optim.warmup_steps": 0}),
        (
            "--lr-scheduler const-cooldown --epochs 10 --epochs-cooldown 2 --lr-cooldown-end 1e-5",
            {"optim.schedule": "wsd", "optim.decay_share": 0.2, "optim.lr_end": 1e-5},
        ),
        ("--opt timm/lion --lr 1e-4 --beta1 0.9 --beta2 0.99", {"optim.name": "lion", "optim.beta2": 0.99}),
        ("--optimizer lamb", {"optim.name": "lamb"}),
        ("--report-to wandb,tensorboard", {"train.trackers": ("tensorboard", "wandb")}),
        ("--report-to none", {"train.trackers": ()}),
        ("--grad-checkpointing", {"train.checkpoint_activations": True}),
        ("--force-context-length 128", {"model.context_length": 128}),
        ("--save-frequency 2", {"train.checkpoint_epochs": 2}),
        ("--delete-previous-checkpoint", {"train.keep": 1}),
        ("--model RN50 --beta2 0.95", {"optim.beta2": 0.95, "optim.eps": 1e-8}),
        ("--val-data v.csv --val-frequency 2", {"data.validation": "v.csv", "eval.every_epochs": 2}),
        ("--fastclip --multiply_tau --gamma_schedule constant", {"loss.name": "fastclip-v3-constant-gamma"}),
        ("--fastclip --gamma_schedule constant --temperature_scheme global_constant", {"loss.name": "sogclr"}),
        ("--fastclip --temperature_scheme individual_learnable --lr 1e-3", {"loss.tau_lr": 1e-3}),
        ("--lr_tau 1e-4", {"loss.name": "clip", "loss.tau_lr": 1e-4}),
    ],
)  # fmt: skip
def test_flags_become_keys(words: str, expected: dict[str, Any], tmp_path: Path) -> None:
    config = read(call(words), tmp_path)
    found = keys(config)
    assert {key: found[key] for key in expected} == expected


@pytest.mark.parametrize(
    ("words", "kept", "dropped", "differs"),
    [
        ("--opt timm/lion --eps 1e-8", {"name": "lion"}, ["--eps 1e-8"], "beta1 = 0.9, beta2 = 0.98 here"),
        ("--opt timm/sgd --beta2 0.5 --momentum 0.8", {"name": "sgd", "beta1": 0.8}, ["--beta2 0.5"], ""),
        ("--opt timm/sgd", {"name": "sgd"}, [], "timm/sgd: beta1 = 0.9 here"),
        ("--opt timm/lamb --beta1 0.8 --beta2 0.9", {"beta1": 0.8, "beta2": 0.9}, [], "timm/lamb: eps = 1e-06 here"),
        ("--model RN50 --optimizer lion --eps 1e-8", {"beta2": 0.999}, ["--eps 1e-8"], ""),
    ],
)  # fmt: skip
def test_flags_that_an_optimizer_has_no_parameter_for_are_said(
    words: str, kept: dict[str, Any], dropped: list[str], differs: str, tmp_path: Path
) -> None:
    result = call(words)
    config = read(result, tmp_path)
    refuse_unusable(config.optim)  # the trainer takes it
    assert {key: getattr(config.optim, key) for key in kept} == kept
    settings = result.settings
    assert [what for what, why in settings.dropped if "no such parameter" in why] == dropped
    said = [line for line in settings.differs if line.startswith("--opt ")]
    assert len(said) == bool(differs)
    assert not differs or differs in said[0]


def test_sources_with_weights_and_tables(tmp_path: Path) -> None:
    two = migrate("python -m training.main --train-data a.tar::b.tar --train-data-upsampling-factors 1::2.5", "s")
    assert [(one.path, one.weight) for one in read(two, tmp_path).data.sources] == [("a.tar", 1.0), ("b.tar", 2.5)]
    table = migrate("python -m training.main --train-data a.csv --csv-img-key file", "s")
    (source,) = read(table, tmp_path).data.sources
    assert (source.image_key, source.caption_key) == ("file", "title")
    pipe = migrate("python -m training.main --train-data 'pipe:aws s3 cp s3://b/{0..9}.tar -'", "s")
    assert read(pipe, tmp_path).data.train == "s3://b/{0..9}.tar"
    assert "no command is run" in pipe.text


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--precision int8", "unknown --precision 'int8'"),
        ("--lr-scheduler cosin", "Did you mean 'cosine'"),
        ("--fastclip --temperature_scheme individual_constant", "unknown --temperature_scheme"),
        ("--train-data-upsampling-factors 1::2", "2 for 1 sources"),
        ("--batch-size 0", "cannot be shared"),
        ("--opt timm/nosuch", "unknown name 'nosuch'"),
        ("--opt timm/madgrad", "cannot be used"),
    ],
)
def test_faults_are_one_line(words: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        call(words)


def test_a_command_that_only_evaluates_is_answered_with_the_command() -> None:
    text = "python3 -m open_clip_train.main --model ViT-B-32 --pretrained /w.pt --imagenet-val '/i/val'"
    with pytest.raises(UserError, match=r"evaluate open_clip:ViT-B-32//w\.pt --tasks folder:/i/val"):
        migrate(text, "s.sh")
