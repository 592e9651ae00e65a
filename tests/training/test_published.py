"""The shipped configs of published runs: their numbers, and that each trains to a checkpoint and goes on from it."""

from __future__ import annotations

import io
import json
import shutil
import tarfile
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from disttempnet.config import CONFIG_FOLDER, flat, load_config
from disttempnet.evaluation.embed import embed_captions
from disttempnet.losses import OBJECTIVES
from disttempnet.training.checkpoint import load_run
from disttempnet.training.model import build_objective, resolved
from disttempnet.training.run_folder import list_checkpoints
from disttempnet.training.trainer import Trainer
from tests import parts
from tests.gloo import Pools

# github.com/anantmehta33/DistTempNet: the three training scripts, the defaults of clip_cc12m.py and clip_cc3m.py that
# they leave, TempGenerator and adjust_gamma of losses.py. 20 warm-up epochs are of 100 steps each.
EVERY = {
    "data.global_batch": 8 * 512,
    "data.transform": "tempnet",
    "loss.rho": 9.5,
    "loss.tau_lr": 3e-5,
    "loss.tau_lr_decay": 0.9,
    "loss.tau_start_epoch": 0,
    "loss.tau_start": "epoch",
    "loss.tau_min": 0.001,
    "loss.network": "dist",
    "loss.prototypes": 512,
    "loss.dropout": 0.5,
    "loss.feature_scale": 1.0,
    "loss.tau_gradient": "fcco",
    "loss.tau_gradient_limit": 0.0,
    "optim.lr": 8e-4,
    "optim.lr_end": 1e-5,
    "optim.warmup_steps": 20 * 100,
    "optim.weight_decay": 0.02,
    "optim.beta1": 0.9,
    "optim.beta2": 0.999,
    "optim.eps": 1e-8,
    "optim.grad_clip": 0.0,
    "train.seed": 2024,
    "eval.tasks": (),
}
CONSTANT = {"loss.name": "disttempnet", "loss.gamma": 0.8}
COSINE = {"loss.name": "disttempnet-v1", "loss.gamma_min": 0.8, "loss.gamma_decay_epochs": 20.0}
VIT = {"model.name": "ViT-B-32"}
CC12M, DFN = "/data/cc12m/{00000..01242}.tar", "/data/dfn/{00000000..00001926}.tar"
PUBLISHED: dict[str, dict[str, Any]] = {
    "cc12m_vitb32_v0": {**EVERY, **CONSTANT, **VIT, "data.train": CC12M, "train.epochs": 33},
    "cc12m_vitb32_v1": {**EVERY, **COSINE, **VIT, "data.train": CC12M, "train.epochs": 33},
    "dfn12m_vitb32_v1": {**EVERY, **COSINE, **VIT, "data.train": DFN, "train.epochs": 30},
    "cc3m_rn50_distilbert": {
        **EVERY,
        **CONSTANT,
        "model.name": "RN50-DistilBERT",
        "model.image_pretrained": "resnet50.tv_in1k",
        "model.text_pretrained": "distilbert-base-uncased",
        "train.epochs": 30,
    },
}
WITH_TWIN = ("cc12m_vitb32_v1", "dfn12m_vitb32_v1", "cc3m_rn50_distilbert")
CORRECTED = {
    "rho": 2.9, "network": "mlp", "feature_scale": 0.0, "dropout": 0.0, "tau_max": 0.2, "tau_initial": 0.065,
    "tau_lr": 1e-4,
}  # fmt: skip


# github.com/Optimization-AI: fast_clip (README.md, training/params.py), SCENT (contrastive/README.md), DRRho-CLIP
# (README.md); arXiv 2407.01445 for CC12M and LAION-400M.
RESNET = {"model.name": "RN50", "optim.beta2": 0.999, "optim.eps": 1e-8}
TRANSFORMER = {"optim.beta2": 0.98, "optim.eps": 1e-6}
CC3M = {
    **RESNET,
    "data.global_batch": 1024,
    "data.transform": "open_clip",
    "train.epochs": 37,
    "train.seed": 2024,
    "optim.lr": 1e-3,
    "optim.lr_end": 0.0,
    "optim.weight_decay": 0.1,
    "optim.warmup_steps": 10_000,
    "optim.grad_clip": 0.0,
    "loss.gamma_min": 0.2,
    "loss.gamma_decay_epochs": 18.0,
    "eval.tasks": (),
}
OTHERS: dict[str, dict[str, Any]] = {
    "cc3m_rn50_fastclip_v0": {**CC3M, "loss.name": "fastclip-v0", "loss.temperature": 0.07, "loss.tau_lr": 0.0},
    "cc3m_rn50_fastclip_v1": {**CC3M, "loss.name": "fastclip-v1", "loss.temperature": 0.07},
    "cc3m_rn50_fastclip_v2": {
        **CC3M, "loss.name": "fastclip-v2", "loss.temperature": 0.03, "loss.tau_lr": 0.0133, "loss.rho": 7.0,
    },
    "cc3m_rn50_fastclip_v3": {
        **CC3M, "loss.name": "fastclip-v3", "loss.temperature": 0.07, "loss.tau_lr": 2e-4, "loss.rho": 6.5,
        "loss.tau_threshold": 0.03,
    },
    "cc12m_vitb32_fastclip_v3": {
        **TRANSFORMER, "model.name": "ViT-B-32", "data.global_batch": 2048, "train.epochs": 33, "optim.lr": 4e-4,
        "loss.name": "fastclip-v3", "loss.tau_lr": 1e-4, "loss.rho": 8.5, "loss.gamma_min": 0.2,
        "loss.gamma_decay_epochs": 16.0,
    },
    "laion400m_vitb16_fastclip_v3": {
        **TRANSFORMER, "model.name": "ViT-B-16", "data.global_batch": 5120, "optim.lr": 2e-4, "optim.lr_end": 4e-5,
        "loss.name": "fastclip-v3", "loss.tau_lr": 5e-5, "loss.rho": 16.0, "loss.gamma_min": 0.8,
        "loss.gamma_decay_epochs": 10.0,
    },
    "dfn14m_vitb32_scent": {
        **TRANSFORMER, "model.name": "ViT-B-32", "data.global_batch": 4096, "train.epochs": 24, "train.seed": 2026,
        "optim.lr": 5e-4, "optim.weight_decay": 0.2, "optim.warmup_steps": 500, "loss.name": "scent",
        "loss.scent_log_a": 10.0, "loss.rho": 11.0, "loss.tau_lr": 6.25e-5, "loss.eps": 1e-6,
    },
    "dfn192m_vitb16_drrho": {
        **TRANSFORMER, "model.name": "ViT-B-16", "data.global_batch": 5120, "train.epochs": 7, "train.seed": 2025,
        "optim.lr": 3.125e-4, "optim.weight_decay": 0.2, "optim.warmup_steps": 500, "loss.name": "drrho",
        "loss.temperature": 0.01, "loss.gamma_min": 1.0, "loss.eps": 1e-4, "loss.distillation": 0.0,
        "reference.pretrained": "openai", "reference.cached": False,
    },
}  # fmt: skip


def table(name: str) -> dict[str, Any]:
    return flat(resolved(load_config(CONFIG_FOLDER / f"{name}.toml")).model_dump())


@pytest.mark.parametrize("name", [*PUBLISHED, *OTHERS])
def test_the_numbers_are_the_published_ones(name: str) -> None:
    found, expected = table(name), {**PUBLISHED, **OTHERS}[name]
    assert {key: found[key] for key in expected} == expected


@pytest.mark.parametrize("name", OTHERS)
def test_those_of_other_papers_train(name: str, tmp_path: Path) -> None:
    """A step with small towers, on shards as theirs; the reference is a run."""
    overrides = [*small("cc12m", tmp_path), "data.lanes=8", "train.stop_after_steps=1"]
    if "drrho" in name:
        teacher = [*overrides, f"out={json.dumps(str(tmp_path / 'teacher'))}", "name=one"]
        go("cc12m_vitb32_fastclip_v3", teacher)
        weights = json.dumps(str(tmp_path / "teacher" / "one"))
        overrides += ["reference.model=demo-vit-32", f"reference.pretrained={weights}"]
    go(name, [*overrides, f"out={json.dumps(str(tmp_path / 'runs'))}"])
    (run,) = (tmp_path / "runs").iterdir()
    assert [line["step"] for line in metrics(run)] == [1]


def test_cc3m_is_read_as_the_published_code_lays_it_out() -> None:
    (source,) = load_config(CONFIG_FOLDER / "cc3m_rn50_distilbert.toml").data.sources
    assert source.path == "/data/cc3m/clip_train/cc3m_train.json"
    assert source.images == "/data/cc3m"


@pytest.mark.parametrize("name", WITH_TWIN)
def test_a_corrected_twin_differs_in_its_temperature_only(name: str) -> None:
    found, published = table(f"{name}_corrected"), table(name)
    differing = {key for key in found | published if found.get(key) != published.get(key)}
    assert differing - {"name"} <= {f"loss.{key}" for key in [*CORRECTED, "tau_min", "tau_start", "prototypes"]}
    assert {key: found[f"loss.{key}"] for key in CORRECTED} == CORRECTED
    assert {key: found[f"loss.{key}"] for key in OBJECTIVES["disttempnet-v1"].arguments if "gamma" not in key} == {
        key: value for key, value in OBJECTIVES["disttempnet-v1"].arguments.items() if "gamma" not in key
    }, "our defaults"


@pytest.mark.parametrize("name", [*PUBLISHED, *OTHERS, *(f"{name}_corrected" for name in WITH_TWIN)])
def test_every_objective_builds(name: str) -> None:
    config = load_config(CONFIG_FOLDER / f"{name}.toml")
    assert build_objective(config, 10, 16).temperatures(torch.eye(2, 16), torch.eye(2, 16), torch.arange(2)) is not None


def write_tars(folder: Path, names: list[str], size: int = 40) -> None:
    """Shards of 12 pairs as img2dataset writes them: .jpg, .txt, .json."""
    folder.mkdir(parents=True)
    generator = np.random.default_rng(7)
    for shard, name in enumerate(names):
        with tarfile.open(folder / name, "w") as tar:
            for i in range(12):
                pixels = generator.integers(0, 255, (size, size, 3), dtype=np.uint8)
                file = io.BytesIO()
                Image.fromarray(pixels).save(file, "JPEG")
                words = " ".join(generator.choice(parts.WORDS, 5))
                members = {"jpg": file.getvalue(), "txt": words.encode(), "json": json.dumps({"key": i}).encode()}
                for suffix, content in members.items():
                    info = tarfile.TarInfo(f"{shard:05d}{i:04d}.{suffix}")
                    info.size = len(content)
                    tar.addfile(info, io.BytesIO(content))


def write_cc3m(folder: Path) -> None:
    """The layout of the published code: cc3m/cc3m_train/*.jpg, and a list of {caption, image, image_id} elsewhere."""
    (folder / "cc3m" / "cc3m_train").mkdir(parents=True)
    (folder / "clip_train").mkdir()
    generator, rows = np.random.default_rng(8), []
    for i in range(24):
        pixels = generator.integers(0, 255, (40, 40, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / "cc3m" / "cc3m_train" / f"{i}.jpg")
        words = " ".join(generator.choice(parts.WORDS, 5))
        rows.append({"caption": words, "image": f"cc3m_train/{i}.jpg", "image_id": i})
    (folder / "clip_train" / "cc3m_train.json").write_text(json.dumps(rows), encoding="utf-8")


def small(name: str, folder: Path) -> list[str]:
    """Overrides that give a config small data, named as its own, and small towers of its own kind."""
    data = folder / "data"
    made = data.exists()
    if "cc3m" in name:
        made or write_cc3m(data)
        path, images = (json.dumps(str(data / part)) for part in ("clip_train/cc3m_train.json", "cc3m"))
        train = f"[{{path = {path}, images = {images}}}]"
    else:
        digits = 8 if "dfn" in name else 5
        made or write_tars(data, [f"{number:0{digits}d}.tar" for number in (0, 1)])
        train = json.dumps(f"{data}/{{{0:0{digits}d}..{1:0{digits}d}}}.tar")
    overrides = [
        f"data.train={train}",
        "data.global_batch=8",
        "data.workers=0",
        "train.log_every=1",
        "optim.warmup_steps=2",
    ]
    if "rn50" not in name:
        return [*overrides, "model.name=demo-vit-32"]
    if not (folder / "distilbert").exists():
        parts.write_architecture(folder / "architecture")
        parts.write_image_weights(folder / "resnet.safetensors")
        parts.write_text_folder(folder / "distilbert")
    return [
        *overrides,
        f"model.name={json.dumps(f'{folder}/architecture/open_clip_config.json')}",
        f"model.image_pretrained={json.dumps(str(folder / 'resnet.safetensors'))}",
        f"model.text_pretrained={json.dumps(str(folder / 'distilbert'))}",
    ]


def go(name: str, overrides: list[str], resume: str = "never") -> None:
    """Train in the process group that there is."""
    config = load_config(CONFIG_FOLDER / f"{name}.toml", overrides)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*rho", UserWarning)  # the published ρ is out of reach
        Trainer(config, torch.device("cpu"), resume).run()


def metrics(run: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


@pytest.mark.slow
@pytest.mark.parametrize("name", PUBLISHED)
def test_its_own_towers_reach_a_checkpoint_too(name: str, tmp_path: Path) -> None:
    """ViT-B/32, ResNet-50 and DistilBERT at full size, two steps of 8: 2 GB of memory, minutes."""
    overrides = [key for key in small(name, tmp_path) if not key.startswith("model.")]
    if "rn50" in name:
        image = parts.write_image_weights(tmp_path / "resnet50.safetensors", "resnet50")
        text = parts.write_text_folder(tmp_path / "full", full_size=True)
        overrides += [f"model.image_pretrained={json.dumps(str(image))}"]
        overrides += [f"model.text_pretrained={json.dumps(str(text))}"]
    overrides += [f"out={json.dumps(str(tmp_path / 'runs'))}", "train.keep=1"]
    go(name, [*overrides, "train.stop_after_steps=1"])
    go(name, [*overrides, "train.stop_after_steps=2"], "auto")
    run = load_config(CONFIG_FOLDER / f"{name}.toml", overrides).folder
    assert [line["step"] for line in metrics(run)] == [1, 2]
    assert [path.name for path in list_checkpoints(run)] == ["step-00000002"]
    shutil.rmtree(run)  # gigabytes


@pytest.mark.parametrize("name", PUBLISHED)
def test_two_processes_start_it_and_one_goes_on(name: str, tmp_path: Path, gloo: Pools) -> None:
    overrides = small(name, tmp_path)
    both = [*overrides, f"out={json.dumps(str(tmp_path / 'both'))}"]
    gloo(2, go, name, [*both, "train.stop_after_steps=2"])
    config = load_config(CONFIG_FOLDER / f"{name}.toml", both)
    assert list_checkpoints(config.folder)[-1].name == "step-00000002"
    for source in ("architecture", "resnet.safetensors", "distilbert"):  # a begun run holds all it needs
        path = tmp_path / source
        if path.exists():
            path.rename(tmp_path / f"moved-{source}")
    go(name, [*both, "train.stop_after_steps=4"], "auto")
    run = load_run(config.folder)
    assert run.step == 4
    features = embed_captions(run.towers, ["a red cat", "two dogs"], device="cpu", batch=2)
    assert bool(features.isfinite().all())

    for moved in tmp_path.glob("moved-*"):
        moved.rename(tmp_path / moved.name.removeprefix("moved-"))
    alone = [*overrides, f"out={json.dumps(str(tmp_path / 'alone'))}", "train.stop_after_steps=4", "data.workers=1"]
    go(name, alone)
    one = load_config(CONFIG_FOLDER / f"{name}.toml", alone)
    for ours, expected in zip(metrics(config.folder), metrics(one.folder), strict=True):
        for key in ("loss", "tau/image_mean", "grad_norm"):
            assert ours[key] == pytest.approx(expected[key], rel=2e-3, abs=1e-5), (ours["step"], key)
