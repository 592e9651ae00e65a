"""Checkpoints of the first code give the features and temperatures that its own modules give.

The files are written here in its form: open_clip's modules, which that code had copied, timm's ResNet, transformers'
DistilBERT and plain layers of torch, with small widths and weights that are not those of a fresh model.
"""

from __future__ import annotations

import argparse
import collections
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from disttempnet.cli.main import main
from disttempnet.errors import UserError
from disttempnet.migrate.checkpoint import VIT_B_32, import_checkpoint
from disttempnet.models import encode_images, encode_texts, load_model
from disttempnet.training.checkpoint import load_run
from tests import parts

import open_clip  # isort: skip (after disttempnet.models)
import timm  # isort: skip
from open_clip.transformer import TextTransformer, VisionTransformer  # isort: skip

D, PROTOTYPES = 16, 6
CAPTIONS = ["a red apple", "Two dogs on the beach", "a photo of a small zebra"]
ARGUMENTS: dict[str, Any] = {
    "data": "cc12m", "train_data": "/data/{0..3}.tar", "train_num_samples": 1000, "data_size": 1200,
    "dataset_type": "webdataset", "image_encoder": "ViT", "text_encoder": "Transformer", "image_res": 32,
    "embed_dim": D, "ita_type": "isogclr_tempnet", "rho": 9.5, "sogclr_gamma": 0.8, "lr": 8e-4, "lr_temp_net": 3e-5,
    "batch_size_train": 8, "world_size": 2, "epochs": 33, "use_amp": True, "init_model": True, "evaluate": False,
    "learnable_temp": False, "personalized_tau": False, "seed": 2024, "output_dir": "output/x", "checkpoint": "",
    "gpu": 0, "rank": 0, "dist_backend": "nccl", "data_number": 13_000_000, "distributed": True, "temp": 0.01,
}  # fmt: skip


class TempGenerator(nn.Module):
    """The temperature network of that code, in evaluation."""

    def __init__(self, rho: float) -> None:
        super().__init__()
        self.rho = rho
        self.proj = nn.Linear(D, D)
        self.scaler = nn.Parameter(torch.tensor(0.01).log())
        self.prototypes = nn.Parameter(torch.randn(PROTOTYPES, D))
        self.linear_1 = nn.Linear(PROTOTYPES, 1)
        self.linear_2 = nn.Linear(PROTOTYPES, 1, bias=False)
        nn.init.constant_(self.linear_1.bias, 0.3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.proj(x).sigmoid()
        protos = normalize(self.prototypes, dim=1)
        weights = torch.softmax((x / self.scaler.exp()) @ protos.T, 1)
        sims = (x @ protos.T).sigmoid()
        return ((self.linear_1(weights * sims) - self.linear_2(sims / PROTOTYPES))[:, 0] / self.rho).clamp(min=0.001)


class FirstCode(nn.Module):
    """Its CLIP module: the same names, and so the same state dict."""

    def __init__(self, image: nn.Module, text: nn.Module, networks: bool = True) -> None:
        super().__init__()
        self.register_buffer("logit_scale", torch.ones([]) * torch.tensor(1 / 0.07).log())
        self.visual_encoder, self.text_encoder = image, text
        self.criterion = nn.Module()
        if networks:
            self.criterion.image_temp_gen, self.criterion.text_temp_gen = TempGenerator(9.5), TempGenerator(9.5)


@pytest.fixture(scope="module")
def vit() -> FirstCode:
    torch.manual_seed(5)
    image = VisionTransformer(32, 16, 64, 2, 1, 4.0, output_dim=D)
    text = TextTransformer(20, width=64, heads=1, layers=2, output_dim=D)
    model = FirstCode(image, text).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.02 * torch.randn_like(parameter)
    return model


def written(folder: Path, model: nn.Module, name: str = "checkpoint_best.pth", **more: Any) -> Path:
    """A file as that code writes it: its best one has the optimizer, the schedule and the arguments too."""
    path = folder / name
    path.parent.mkdir(exist_ok=True, parents=True)
    torch.save({"model": model.state_dict(), **more}, path)
    return path


def best(folder: Path, model: nn.Module, **arguments: Any) -> Path:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    namespace = argparse.Namespace(**{**ARGUMENTS, **arguments})
    schedule = {"base_values": [8e-4], "counts": collections.defaultdict(int)}
    return written(folder, model, optimizer=optimizer.state_dict(), lr_scheduler=schedule, args=namespace, epoch=4)


def pixels(size: int = 32) -> Tensor:
    return torch.randint(0, 256, (3, 3, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


def as_clip_normalises(images: Tensor) -> Tensor:
    mean = torch.tensor([0.48145466, 0.4578275, 0.40821073]).view(1, 3, 1, 1)
    std = torch.tensor([0.26862954, 0.26130258, 0.27577711]).view(1, 3, 1, 1)
    return (images / 255 - mean) / std


@torch.no_grad()
def test_towers_and_temperatures_are_those_of_the_first_code(vit: FirstCode, tmp_path: Path) -> None:
    result = import_checkpoint(best(tmp_path, vit), tmp_path / "runs" / "mine")
    run = load_run(result.folder)
    tokens = run.towers.tokenizer(CAPTIONS)
    assert tokens.shape == (3, 20)
    image = encode_images(run.towers, pixels())
    text = encode_texts(run.towers, tokens)
    torch.testing.assert_close(image, normalize(vit.visual_encoder(as_clip_normalises(pixels())), dim=1))
    torch.testing.assert_close(text, normalize(vit.text_encoder(tokens), dim=1))
    expected = torch.stack([vit.criterion.image_temp_gen(image), vit.criterion.text_temp_gen(text)])
    assert expected.min() > 0.001, "all are clamped: the case says little"
    torch.testing.assert_close(run.loss.temperatures(image, text), expected)
    assert run.step == 5 * 63, "epoch 4 of 1,000 samples in batches of 16"
    assert (run.config.loss.name, run.config.loss.arguments["network"]) == ("disttempnet", "dist-clamped")
    assert (run.config.loss.arguments["rho"], run.config.data.global_batch) == (9.5, 16)
    assert run.config.data.train == "/data/{0..3}.tar"
    text_of_notes = "\n".join(result.notes)
    assert "not taken over: lr_scheduler, optimizer" in text_of_notes


def test_the_published_architecture_is_open_clips() -> None:
    assert open_clip.get_model_config("ViT-B-32") == VIT_B_32


@pytest.mark.slow
def test_the_published_architecture_has_its_name(tmp_path: Path) -> None:
    """ViT-B/32 in full size, as that code builds it; open_clip's own name then stands in the config."""
    torch.manual_seed(0)
    model = FirstCode(
        VisionTransformer(224, 32, 768, 12, 12, 4.0, output_dim=512),
        TextTransformer(77, width=512, heads=8, layers=12, output_dim=512),
        networks=False,
    )
    path = best(tmp_path, model, ita_type="sogclr", embed_dim=512, image_res=224)
    result = import_checkpoint(path, tmp_path / "runs" / "big")
    run = load_run(result.folder)
    assert run.config.model.name == "ViT-B-32"
    weights = run.towers.module.state_dict()
    assert torch.equal(weights["visual.proj"], model.visual_encoder.proj)
    assert torch.equal(weights["text_projection"], model.text_encoder.text_projection)
    opened = load_model("ViT-B-32", str(result.checkpoint))
    assert opened.module.logit_scale.exp().item() == pytest.approx(100)


@torch.no_grad()
def test_resnet_and_distilbert_with_their_projections(tmp_path: Path) -> None:
    from transformers import AutoModel, AutoTokenizer

    source = parts.write_text_folder(tmp_path / "distilbert")
    torch.manual_seed(2)
    model = FirstCode(timm.create_model("test_resnet", num_classes=0), AutoModel.from_pretrained(source)).eval()
    model.vision_proj, model.text_proj = nn.Linear(model.visual_encoder.num_features, D), nn.Linear(32, D)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 1.5)
    own = {"image_encoder": "test_resnet", "text_encoder": "distilbert-base-uncased", "image_res": 64}
    path = best(tmp_path, model, **own)
    result = import_checkpoint(path, tmp_path / "runs" / "rn", text_encoder=str(source))

    (source / "config.json").unlink()  # the run folder needs no other
    run = load_run(result.folder)
    assert run.towers.image_size == 64
    image = encode_images(run.towers, pixels(64))
    features = model.vision_proj(model.visual_encoder(as_clip_normalises(pixels(64))))
    torch.testing.assert_close(image, normalize(features, dim=1), rtol=1e-4, atol=1e-5)
    tokenizer = AutoTokenizer.from_pretrained(source, config=model.text_encoder.config)
    words = tokenizer(CAPTIONS, padding="max_length", truncation=True, max_length=30, return_tensors="pt")
    hidden = model.text_encoder(words.input_ids, attention_mask=words.attention_mask).last_hidden_state[:, 0]
    text = encode_texts(run.towers, run.towers.tokenizer(CAPTIONS))
    torch.testing.assert_close(text, normalize(model.text_proj(hidden), dim=1), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(text, normalize(hidden @ model.text_proj.weight.T, dim=1), atol=1e-3), "the bias counts"
    assert run.config.model.image_pretrained == run.config.model.text_pretrained == ""


def test_weights_alone_take_their_arguments_from_beside_or_from_the_command(vit: FirstCode, tmp_path: Path) -> None:
    path = written(tmp_path / "a", vit, "checkpoint_10.pth")
    with pytest.raises(UserError, match=r"divide by ρ, .* add rho=9.5"):
        import_checkpoint(path, tmp_path / "runs" / "x")
    given = import_checkpoint(path, tmp_path / "runs" / "given", {"rho": "9.5", "image_encoder": "ViT"})
    assert load_run(given.folder).config.loss.arguments["rho"] == 9.5
    assert any("the code's defaults are assumed" in note for note in given.notes)
    assert any("step: 10 epochs of an unknown number" in note for note in given.notes)
    (tmp_path / "a" / "args.json").write_text(json.dumps(ARGUMENTS | {"rho": 8.5}), encoding="utf-8")
    beside = import_checkpoint(path, tmp_path / "runs" / "beside")
    assert load_run(beside.folder).config.loss.arguments["rho"] == 8.5
    assert load_run(beside.folder).step == 10 * 63


@pytest.mark.parametrize(
    ("tau", "name", "value"),
    [
        ({"temp": torch.tensor(0.03)}, "clip", 0.03),
        ({"image_temp": torch.full((5,), 0.02), "text_temp": torch.full((5,), 0.04)}, "clip-constant", 0.03),
    ],
)
def test_learned_temperatures(vit: FirstCode, tau: dict[str, Tensor], name: str, value: float, tmp_path: Path) -> None:
    state = {key: one for key, one in vit.state_dict().items() if "temp_gen" not in key} | tau
    torch.save({"model": {f"module.{key}": one for key, one in state.items()}}, tmp_path / "checkpoint_5.pth")
    result = import_checkpoint(tmp_path / "checkpoint_5.pth", tmp_path / "runs" / "x")
    run = load_run(result.folder)
    assert run.config.loss.name == name
    ones = torch.nn.functional.normalize(torch.ones(2, D), dim=1)
    torch.testing.assert_close(run.loss.temperatures(ones, ones), torch.full((2, 2), value))
    assert run.towers.module.logit_scale.exp().item() == pytest.approx(1 / value, rel=1e-5)
    assert ("image_temp" in tau) == any("by sample ids of that code" in note for note in result.notes)


def test_commands_open_the_run(vit: FirstCode, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, out = best(tmp_path, vit), tmp_path / "runs" / "mine"
    assert main(["import", str(path), "--out", str(out)]) == 0
    assert 'loss.network = "dist-clamped"' in capsys.readouterr().out
    (tmp_path / "captions.txt").write_text("\n".join(CAPTIONS), encoding="utf-8")
    assert main(["temperature", str(out), "--captions", str(tmp_path / "captions.txt")]) == 0
    assert main(["evaluate", str(out), "--tasks", "emoji-concepts"]) == 0
    assert "results: " in capsys.readouterr().out
    assert main(["import", str(path), "--out", str(out)]) == 2
    assert "exists already" in capsys.readouterr().err


def test_towers_train_on_from_it(vit: FirstCode, tmp_path: Path) -> None:
    result = import_checkpoint(best(tmp_path, vit), tmp_path / "runs" / "mine")
    towers = load_model(f"local-dir:{result.checkpoint}")
    assert torch.equal(towers.module.state_dict()["visual.proj"], vit.visual_encoder.proj)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"extra.weight": torch.ones(1)}, "keys that the first code does not have: extra.weight"),
        ({"visual_encoder.proj": None}, "lacks visual.proj|lack 'proj'"),
        ({"text_encoder.ln_final.bias": None}, "lacks ln_final.bias"),
        ({"text_encoder.ln_final.bias": torch.ones(3)}, "other shapes: ln_final.bias of 3"),
        ({"criterion.image_temp_gen.linear_1.bias": None}, r"temperature networks .* lacks .*out_bias"),
        ({"criterion.image_temp_gen.taus": torch.ones(2)}, "temperature networks .* has .*taus"),
        ({"visual_encoder.transformer.resblocks.1.attn.in_proj_weight": None}, "lacks visual.transformer.resblocks.1"),
    ],
)
def test_unknown_and_missing_weights_are_refused(
    vit: FirstCode, change: dict[str, Tensor | None], message: str, tmp_path: Path
) -> None:
    state = {**vit.state_dict(), **change}
    path = tmp_path / "checkpoint_best.pth"
    kept = {key: value for key, value in state.items() if value is not None}
    torch.save({"model": kept, "args": argparse.Namespace(**ARGUMENTS)}, path)
    with pytest.raises(UserError, match=message) as caught:
        import_checkpoint(path, tmp_path / "runs" / "x")
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)
    assert not (tmp_path / "runs" / "x").exists()


def test_files_of_other_kinds_and_code_are_refused(vit: FirstCode, tmp_path: Path) -> None:
    torch.save({"state_dict": vit.state_dict()}, tmp_path / "a.pth")
    torch.save({"model": vit.visual_encoder.state_dict()}, tmp_path / "b.pth")
    torch.save({"model": vit.state_dict(), "args": Path, "loss": nn.Linear(2, 2)}, tmp_path / "c.pth")
    (tmp_path / "d.pth").write_text("no weights")
    for name, message in (
        ("a", "it has no 'model' with weights"),
        ("b", "no visual_encoder and text_encoder"),
        ("c", "could run code and are refused"),
        ("d", "it is a text file"),
        ("e", "no such file"),
    ):
        with pytest.raises(UserError, match=message):
            import_checkpoint(tmp_path / f"{name}.pth", tmp_path / "runs" / "x", {"rho": "9.5"})
    with pytest.raises(UserError, match="no argument of that name"):
        import_checkpoint(best(tmp_path, vit), tmp_path / "runs" / "x", {"rhoo": "9.5"})
