"""Which architecture and which weights a name means; what could mean several things, or random towers, is refused."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import huggingface_hub.constants
import pytest
import torch
from torch import Tensor

from disttempnet.cli import main as cli
from disttempnet.errors import UserError
from disttempnet.models import CONFIG_NAME, WEIGHTS_NAME, Towers, load_model, read_target, save_model
from disttempnet.models.origin import weights_lines
from disttempnet.training.checkpoint import load_run
from tests import parts

import open_clip.pretrained  # isort: skip (after disttempnet.models)
import timm  # isort: skip
from timm.models.vision_transformer import checkpoint_filter_fn  # isort: skip

NAME = "demo-vit-32"


@pytest.fixture(scope="module")
def towers() -> Towers:
    torch.manual_seed(7)
    return load_model(NAME)


@pytest.fixture
def saved(towers: Towers, tmp_path: Path) -> Path:
    """A folder as save_model and open_clip write it."""
    folder = tmp_path / "saved"
    folder.mkdir()
    save_model(towers, folder, logit_scale=10.0)
    return folder


def pixels(size: int = 32) -> Tensor:
    return torch.rand(2, 3, size, size, generator=torch.Generator().manual_seed(2))


def image_features(towers: Towers, size: int = 32) -> Tensor:
    towers.module.eval()
    with torch.no_grad():
        return towers.module.encode_image(pixels(size))


def assert_same(found: Towers, towers: Towers) -> None:
    assert torch.equal(image_features(found), image_features(towers))


def refused(name: str, pretrained: str = "") -> str:
    with pytest.raises(UserError) as raised:
        load_model(name, pretrained)
    assert "\n" not in str(raised.value)
    return str(raised.value)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, towers: Towers) -> Path:
    """The cache of the Hub with one repository, whose name is that of no architecture; and no network."""
    cache = tmp_path / "hub"
    snapshot = cache / "models--acme--CLIP-tiny-good" / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text("0" * 40)
    save_model(towers, snapshot, logit_scale=10.0)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    return snapshot


def test_a_repository_brings_its_own_architecture(hub: Path, towers: Towers) -> None:
    found = load_model("hf-hub:acme/CLIP-tiny-good")
    assert_same(found, towers)
    assert found.embed_dim == towers.embed_dim
    assert_same(load_model(NAME, "hf-hub:acme/CLIP-tiny-good"), towers)
    config = json.loads((hub / CONFIG_NAME).read_text())
    config["preprocess_cfg"] |= {"mean": [0.1, 0.2, 0.3], "resize_mode": "squash"}
    (hub / CONFIG_NAME).write_text(json.dumps(config))
    found = load_model("hf-hub:acme/CLIP-tiny-good")
    assert (found.mean, found.resizing.mode) == ((0.1, 0.2, 0.3), "squash")


def test_where_weights_came_from_is_said(hub: Path, towers: Towers, tagged: None, tmp_path: Path) -> None:
    """The name, the file with its size, and the digest where the hub's cache has it in the name."""
    assert towers.weights == ()
    blob = hub / ("a1" * 32)
    (hub / WEIGHTS_NAME).rename(blob)
    (hub / WEIGHTS_NAME).symlink_to(blob)
    (line,) = load_model("hf-hub:acme/CLIP-tiny-good").weights
    assert line.startswith(f"weights of both towers: hf-hub:acme/CLIP-tiny-good: {hub / WEIGHTS_NAME} (")
    assert line.endswith(f"B, sha256 {'a1' * 32})")
    size = f"{(tmp_path / 'tagged.pt').stat().st_size / 1e6:.1f} MB"
    (line,) = load_model(NAME, "laion").weights
    assert line == f"weights of both towers: {NAME}, laion: {tmp_path / 'tagged.pt'} ({size})"


def test_a_repository_without_weights_is_no_model(hub: Path) -> None:
    (hub / WEIGHTS_NAME).unlink()
    message = refused("hf-hub:acme/CLIP-tiny-good")
    assert "its weights (open_clip_model.safetensors or open_clip_pytorch_model.bin) are not in the cache" in message
    random = load_model(message.split("; model.name=")[-1].split(" would build")[0])  # what the line says works
    assert random.embed_dim == 64
    assert "no open_clip_config.json in the cache" in refused("hf-hub:acme/other")
    assert "hf-hub:nothing/a/b" in refused("hf-hub:nothing/a/b")


def test_a_repository_with_an_encoder_of_hugging_face(hub: Path, tmp_path: Path) -> None:
    """The encoder's config and tokenizer are those of the name in its config, a repository of its own or a folder."""
    text = parts.write_text_folder(tmp_path / "text")
    image = parts.write_image_weights(tmp_path / "image.safetensors")
    name = parts.write_architecture(tmp_path / "architecture")
    own = load_model(name, image_pretrained=str(image), text_pretrained=str(text))
    save_model(own, hub, logit_scale=10.0)
    config = json.loads((hub / CONFIG_NAME).read_text())
    config["model_cfg"]["text_cfg"]["hf_model_name"] = str(text)
    (hub / CONFIG_NAME).write_text(json.dumps(config))
    found = load_model("hf-hub:acme/CLIP-tiny-good")
    assert (found.mean, found.image_size) == (own.mean, own.image_size)
    tokens = own.tokenizer(["a red apple", "two cats"])
    assert torch.equal(found.tokenizer(["a red apple", "two cats"]), tokens)
    found.module.eval(), own.module.eval()
    with torch.no_grad():
        assert torch.equal(found.module.encode_text(tokens), own.module.encode_text(tokens))
    assert_same(found, own)


def test_a_folder_without_weights_is_no_model(saved: Path) -> None:
    (saved / WEIGHTS_NAME).unlink()
    assert "holds no weights; " in refused(f"local-dir:{saved}")
    assert "holds no weights; " in refused(NAME, str(saved))
    assert f"local-dir:{saved}/no: no such folder" in refused(f"local-dir:{saved}/no")
    assert load_model(str(saved / CONFIG_NAME)).embed_dim == 64


def test_other_names_of_weights_in_a_folder(saved: Path, towers: Towers) -> None:
    (saved / WEIGHTS_NAME).unlink()
    for epoch in (4, 5):
        shutil.rmtree(saved / "optimizer", ignore_errors=True)
        torch.save({"epoch": epoch, "state_dict": towers.module.state_dict()}, saved / f"epoch_{epoch}.pt")
        torch.save({"step": 3}, saved / "optimizer.pt")
        torch.save({"step": 3}, saved / "training_args.bin")
        if epoch == 4:
            assert_same(load_model(f"local-dir:{saved}"), towers)
            assert_same(load_model(NAME, str(saved)), towers)
    for message in (refused(f"local-dir:{saved}"), refused(NAME, str(saved))):
        assert "several files of weights (epoch_4.pt, epoch_5.pt): name one" in message
    assert_same(load_model(f"local-dir:{saved}/epoch_5.pt"), towers)
    (saved / CONFIG_NAME).unlink()
    (saved / "epoch_4.pt").unlink()
    assert "has no open_clip_config.json" in refused(f"local-dir:{saved}")
    assert_same(load_model(NAME, str(saved)), towers)


def test_a_place_takes_weights_of_elsewhere(saved: Path, towers: Towers, tmp_path: Path) -> None:
    """open_clip would pass them over in silence."""
    other = {key: value + 1 for key, value in towers.module.state_dict().items()}
    torch.save(other, tmp_path / "other.pt")
    found = load_model(f"local-dir:{saved}", str(tmp_path / "other.pt"))
    assert torch.equal(found.module.visual.proj, other["visual.proj"])


def test_weights_of_another_architecture_are_not_taken_for_this_one(towers: Towers, saved: Path) -> None:
    """Heads change what towers compute, and no key or shape: without the config nothing would tell."""
    config = json.loads((saved / CONFIG_NAME).read_text())
    config["model_cfg"]["text_cfg"]["heads"] = 4
    (saved / CONFIG_NAME).write_text(json.dumps(config))
    for weights in (saved, saved / WEIGHTS_NAME):
        assert "has text_cfg.heads = 2, the weights in " in refused(NAME, str(weights))
    assert load_model(f"local-dir:{saved}").architecture["text_cfg"]["heads"] == 4


@pytest.fixture
def tagged(towers: Towers, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two tags of open_clip for an architecture of GELU: one trained with QuickGELU, as OpenAI's of ViT-B-32 is."""
    torch.save(towers.module.state_dict(), tmp_path / "tagged.pt")
    tag = {"file": str(tmp_path / "tagged.pt"), "mean": (0.5, 0.5, 0.5), "resize_mode": "squash"}
    tags = {"openai": {**tag, "quick_gelu": True}, "laion": tag}
    monkeypatch.setitem(open_clip.pretrained._PRETRAINED, NAME, tags)


def quick(towers: Towers) -> Towers:
    """The same weights in an architecture of QuickGELU, made by open_clip itself."""
    module = open_clip.CLIP(**{**towers.architecture, "quick_gelu": True})
    module.load_state_dict(towers.module.state_dict())
    return replace(towers, module=module)


def test_the_activation_of_a_tag_is_taken_and_said(tagged: None, towers: Towers, tmp_path: Path) -> None:
    expected = quick(towers)
    assert not torch.allclose(image_features(expected), image_features(towers), atol=1e-4)
    for pretrained in ("openai", f"{NAME}/openai", f"open_clip:{NAME}/openai"):
        found = load_model(NAME, pretrained)
        assert_same(found, expected)
        assert "QuickGELU, as the weights" in found.notes[0]
        assert (found.mean, found.resizing.mode) == ((0.5, 0.5, 0.5), "squash")
    plain = load_model(NAME, "laion")
    assert_same(plain, towers)
    assert plain.notes == ()
    (tmp_path / "run").mkdir()
    save_model(found, tmp_path / "run", logit_scale=10.0)
    for name, pretrained in ((NAME, str(tmp_path / "run")), (f"local-dir:{tmp_path / 'run'}", "")):
        assert_same(load_model(name, pretrained), expected)  # resuming, evaluating


def test_open_clip_still_wants_quick_gelu_for_openai() -> None:
    """What the tags of the real table say."""
    for name in ("ViT-B-32", "RN50", "ViT-L-14-336"):
        assert open_clip.get_pretrained_cfg(name, "openai")["quick_gelu"]
        assert not open_clip.get_model_config(name).get("quick_gelu")


def test_openais_own_file(towers: Towers, tmp_path: Path) -> None:
    """Its TorchScript as a state dict: with numbers beside the weights, in half precision."""
    numbers = {"input_resolution": 32, "context_length": 20, "vocab_size": 49408}
    state = {key: value.half() for key, value in towers.module.state_dict().items()}
    torch.save(state | {key: torch.tensor(value) for key, value in numbers.items()}, tmp_path / "openai.pt")
    found = load_model(NAME, str(tmp_path / "openai.pt"))
    assert found.notes == ("QuickGELU, as OpenAI's weights expect",)
    torch.testing.assert_close(image_features(found), image_features(quick(towers)), rtol=0.02, atol=0.02)


def test_another_image_size_is_taken_when_asked(towers: Towers, tmp_path: Path) -> None:
    architecture = json.loads(json.dumps(towers.architecture))
    files = {}
    for size in (32, 64):
        architecture["vision_cfg"]["image_size"] = size
        files[size] = tmp_path / f"{size}.json"
        files[size].write_text(json.dumps(architecture))
    small = load_model(str(files[32]))
    torch.save(small.module.state_dict(), tmp_path / "w.pt")
    message = refused(str(files[64]), str(tmp_path / "w.pt"))
    assert "17 image positions, the model has 65" in message
    assert "model.resize_positions=true" in message
    large = load_model(str(files[64]), str(tmp_path / "w.pt"), resize_positions=True)
    assert "to which they were interpolated" in large.notes[0]
    before, after = (t.module.visual.positional_embedding.detach() for t in (small, large))
    assert torch.equal(after[0], before[0])
    grid = before[1:].T.reshape(1, -1, 4, 4)
    expected = torch.nn.functional.interpolate(grid, (8, 8), mode="bicubic", antialias=True)
    torch.testing.assert_close(after[1:], expected[0].flatten(1).T)
    again = load_model(str(files[32]), str(tmp_path / "w.pt"), resize_positions=True)
    assert again.notes == ()
    assert_same(again, small)


def test_another_image_size_of_a_timm_tower(towers: Towers, tmp_path: Path) -> None:
    vision = {"timm_model_name": "test_vit", "image_size": 160, "timm_pool": "token", "timm_proj": "linear"}
    architecture = {**towers.architecture, "vision_cfg": vision}
    (tmp_path / "vit.json").write_text(json.dumps(architecture))
    wanted = load_model(str(tmp_path / "vit.json"))
    small = timm.create_model("test_vit", img_size=96, num_classes=0)
    state = {key: value for key, value in wanted.module.state_dict().items() if not key.startswith("visual.trunk.")}
    state |= {f"visual.trunk.{key}": value for key, value in small.state_dict().items()}
    torch.save(state, tmp_path / "w.pt")
    assert "37 image positions, the model has 101" in refused(str(tmp_path / "vit.json"), str(tmp_path / "w.pt"))
    found = load_model(str(tmp_path / "vit.json"), str(tmp_path / "w.pt"), resize_positions=True)
    expected = checkpoint_filter_fn(small.state_dict(), wanted.module.visual.trunk)["pos_embed"]
    assert torch.equal(found.module.visual.trunk.pos_embed, expected)


def test_what_a_name_means(saved: Path, tagged: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / NAME).mkdir()  # a folder of that name does not take its place
    (tmp_path / "w.pt").touch()
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    shutil.copytree(saved, tmp_path / "step")
    (tmp_path / "step" / "trainer.pt").touch()
    place = f"local-dir:{saved}"
    meant = {
        f"open_clip:{NAME}": (NAME, ""),
        f"open_clip:{NAME}/laion": (NAME, "laion"),
        f"{NAME}/laion": (NAME, "laion"),
        f"{NAME}/w.pt": (NAME, "w.pt"),
        f"{NAME}/{saved}": (NAME, str(saved)),
        "hf-hub:a/b": ("hf-hub:a/b", ""),
        "open_clip:hf-hub:a/b": ("hf-hub:a/b", ""),
        place: (place, ""),
        f"open_clip:{place}": (place, ""),
        str(saved): (place, ""),
        f"{saved}/{WEIGHTS_NAME}": (f"{place}/{WEIGHTS_NAME}", ""),
        f"{saved}/{CONFIG_NAME}": (f"{saved}/{CONFIG_NAME}", ""),
        "run": None,
        "step": None,
        "open_clip:step": ("local-dir:step", ""),
        "nowhere": None,
        "runs/nowhere/at-all": None,
    }
    for target, expected in meant.items():
        assert read_target(target) == expected, target
        if expected and expected[1] == "" and not expected[0].startswith(("local-dir:", "hf-hub:")):
            with pytest.raises(UserError, match="weights"):
                read_target(target, random=False)
        else:
            assert read_target(target, random=False) == expected, target


@pytest.mark.parametrize(
    ("target", "message"),
    [
        (NAME, f"with which weights? {NAME}/TAG (openai, laion), {NAME}/FILE, or open_clip:{NAME} for random ones"),
        ("w.pt", "open_clip:ViT-B-32/w.pt"),
        (
            ".",
            "no open_clip_config.json says which architecture the weights in it are of: name it, as open_clip:NAME/.",
        ),
        ("laion/CLIP-ViT-B-32", "write hf-hub:laion/CLIP-ViT-B-32"),
        (f"{NAME}/opena", "unknown weights 'opena'. Did you mean 'openai'"),
        (f"{NAME}/no.pt", "weights 'no.pt' cannot be loaded: no such file or folder"),
        ("open_clip:ViT-B-3", "unknown model 'ViT-B-3'. Did you mean 'ViT-B-32'"),
        ("open_clip:acme/x.pt", "unknown model 'acme'"),
        ("nowhere", "nowhere: no such run folder or checkpoint"),
    ],
)
def test_what_means_nothing_says_how_to_write_it(
    target: str,
    message: str,
    tagged: None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "w.pt").touch()
    assert cli.main(["evaluate", target, "--tasks", "emoji-concepts"]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("name", "pretrained", "message"),
    [
        (NAME, "ViT-B-32/openai", "are weights of ViT-B-32, the model is 'demo-vit-32': model.name=ViT-B-32"),
        ("demo-convnext-32", "openai", "'openai' is no file or folder, and open_clip has no weights of demo-conv"),
        ("ViT-B-32/openai", "", "write model.name=ViT-B-32 model.pretrained=openai"),
        ("saved", "", "write local-dir:saved"),
        ("broken.json", "", "broken.json: no architecture of open_clip"),
        ("no.json", "", "no.json: No such file"),
        ("strange.json", "", "open_clip cannot build its architecture: "),
        ("numbers.json", "", "numbers.json: 'mean' of preprocess_cfg must be three numbers (got 0.5)"),
        ("local-dir:", "", "'local-dir:' names no folder"),
        ("local-dir:damaged", "", "damaged/config.json: damaged, not the config of a CLIPModel"),
        (NAME, "/dev/zero", "weights '/dev/zero' cannot be loaded: it is no regular file"),
        ("", "", "unknown model ''"),
        (NAME, "run", "run: holds no weights (a run folder? name one of its checkpoints)"),
    ],
)
def test_keys_of_a_config_that_do_not_go_together(
    name: str, pretrained: str, message: str, saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    (tmp_path / "broken.json").write_text("{")
    numbers = {**json.loads((saved / CONFIG_NAME).read_text()), "preprocess_cfg": {"mean": 0.5}}
    (tmp_path / "numbers.json").write_text(json.dumps(numbers))
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / "config.json").write_text('{"model_type": "clip", "text_config": 3}')
    strange = {"embed_dim": 8, "vision_cfg": {"colour": 3}, "text_cfg": {}}
    (tmp_path / "strange.json").write_text(json.dumps(strange))
    assert message in refused(name, pretrained)


def test_an_evaluation_keeps_the_notes(
    tagged: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """On the terminal, in results.json, and in the summary that reports are made of."""
    from tests.evaluation.formats import labelled, write_wds

    monkeypatch.chdir(tmp_path)
    assert cli.main(["evaluate", f"{NAME}/openai", "--tasks", "emoji-concepts", "--out", "o.json"]) == 0
    said = capsys.readouterr()
    assert f"weights of both towers: {NAME}, openai: {tmp_path / 'tagged.pt'} (" in said.err
    assert "note: QuickGELU, as the weights 'openai' were trained with" in said.out
    assert "QuickGELU" in json.loads(Path("o.json").read_text())["notes"][0]
    monkeypatch.setenv("DISTTEMPNET_CACHE", str(tmp_path / "cache"))
    rows = [("red", "red"), ("green", "green")]
    names = ("red", "green")
    write_wds(tmp_path / "root", "cifar10", labelled(rows, names), classes=names, templates=["{c}"])
    Path("root/sizes.toml").write_text("cifar10 = 2\n")
    for target, note in ((f"{NAME}/openai", "QuickGELU"), (f"open_clip:{NAME}", "random weights: open_clip:")):
        assert cli.main(["evaluate", target, "--data-root", "root", "--out", "out-" + target[:3]]) == 0
        assert f"note: {note}" in capsys.readouterr().out
        assert json.loads(Path("out-" + target[:3], "summary.json").read_text())["notes"][0].startswith(note)
    assert cli.main(["report", "out-dem", "--out", "page.html"]) == 0
    assert "QuickGELU, as the weights" in Path("page.html").read_text(encoding="utf-8")


def test_a_run_keeps_what_its_weights_wanted(
    tagged: None, towers: Towers, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """QuickGELU reaches the checkpoint, and what is evaluated or goes on from there."""
    monkeypatch.chdir(tmp_path)
    given = ["train", "debug", "name=quick", "data.limit=64", "data.workers=0", "eval.tasks=[]", "optim.lr=1e-12"]
    start = [*given, f"model.pretrained={NAME}/openai", "train.epochs=2"]
    assert cli.main([*start, "train.stop_after_steps=1"]) == 0
    assert "QuickGELU, as the weights" in capsys.readouterr().err
    assert "QuickGELU" in json.loads(Path("runs/quick/run.json").read_text())["model_notes"][0]
    found = load_run("runs/quick").towers
    torch.testing.assert_close(image_features(found), image_features(quick(towers)), rtol=1e-4, atol=1e-4)
    assert "QuickGELU" in found.notes[0]
    capsys.readouterr()
    assert cli.main([*start, "train.stop_after_steps=2", "--resume", "auto"]) == 0
    assert cli.main([*start, "model.name=demo-convnext-32", "--resume", "auto"]) == 2
    assert "model 'demo-convnext-32' has embed_dim = 128, the weights in " in capsys.readouterr().err
    assert cli.main(["evaluate", "runs/quick", "--resize-positions"]) == 2
    assert "--resize-positions is for named weights" in capsys.readouterr().err
    assert cli.main([*given, "model.resize_positions=true"]) == 2
    assert "resize_positions is for the weights of pretrained" in capsys.readouterr().err


def test_open_clips_other_kinds_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Since version 4 it also lists towers for audio and generators of captions."""
    sizes = {"embed_dim": 16, "text_cfg": {"width": 16}}
    monkeypatch.setattr(open_clip, "get_model_config", lambda _: {**sizes, "audio_cfg": {}})
    assert refused("CLAP-tiny") == "model 'CLAP-tiny' has no image tower (it has audio_cfg, embed_dim, text_cfg)"
    path = tmp_path / "generator.json"
    path.write_text(json.dumps({**sizes, "vision_cfg": {}, "genlip_cfg": {}}), encoding="utf-8")
    assert refused(str(path)).startswith(f"{path} generates captions: it has no text tower")


def test_a_tower_without_weights_is_said_to_be_random() -> None:
    assert weights_lines("EfficientNet-lite0-MiniLM", "", None, "", "package:acme/model") == (
        "weights of the image tower: random (model.image_pretrained names others)",
        "weights of the text tower: package:acme/model",
    )
    assert weights_lines("ViT-B-32", "", None, "", "") == ()
