"""A run as a repository: open_clip opens the folder with equal features, and the Hub's API gets the same files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import disttempnet.models  # first: it lets torchvision load beside a CPU-only torch
from disttempnet.cli.main import main
from disttempnet.errors import UserError
from disttempnet.export.hub import checked_repository, upload, write_hub_folder
from disttempnet.models import encode_images, encode_texts, hub, load_model
from disttempnet.models.towers import open_clip
from tests import parts
from tests.export.models import small_towers
from tests.hub import TOKEN, serving_hub

CAPTIONS = ["a red apple", "two dogs, on a beach"]
QUICK = ["model.name=demo-vit-32", "train.stop_after_steps=1", "train.epochs=1", "eval.tasks=[]", "data.workers=0"]


def test_open_clip_opens_the_folder_with_equal_features(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    towers = small_towers(tmp_path / "made", {"mean": [0.5, 0.4, 0.3], "std": [0.2, 0.3, 0.4]}, quick_gelu=True)
    lines = write_hub_folder(towers, tmp_path, "org/tiny", "# card\n")
    assert lines == ["checked: opened again; features of images differ by at most 0.0e+00"]
    assert (tmp_path / "README.md").read_text() == "# card\n"
    opened, _, transform = open_clip.create_model_and_transforms(f"local-dir:{tmp_path}")
    tokens = open_clip.get_tokenizer(f"local-dir:{tmp_path}")(CAPTIONS)
    pixels = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (towers.mean, towers.std))
    with torch.no_grad():
        image = opened.eval().encode_image((pixels / 255 - mean) / std, normalize=True)
        torch.testing.assert_close(image, encode_images(towers, pixels), rtol=1e-5, atol=1e-6)
        text = opened.encode_text(tokens, normalize=True)
        torch.testing.assert_close(text, encode_texts(towers, towers.tokenizer(CAPTIONS)), rtol=1e-5, atol=1e-6)
    assert opened.logit_scale.item() == pytest.approx(towers.module.logit_scale.item())
    normalise = transform.transforms[-1]
    assert (tuple(normalise.mean), tuple(normalise.std)) == (towers.mean, towers.std)
    ids = AutoTokenizer.from_pretrained(tmp_path)(CAPTIONS)["input_ids"]
    assert ids[0] == [token for token in tokens[0].tolist() if token]


def test_an_average_says_so_in_the_config(tmp_path: Path) -> None:
    write_hub_folder(small_towers(tmp_path / "made"), tmp_path, "org/tiny", "", ema=0.5)
    assert json.loads((tmp_path / "open_clip_config.json").read_text())["train_ema"] == 0.5
    assert "train.ema = 0.5" in load_model(f"local-dir:{tmp_path}").notes[0]


def test_folders_of_this_machine_are_not_in_the_config(tmp_path: Path) -> None:
    name = parts.write_architecture(tmp_path / "architecture")
    text = parts.write_text_folder(tmp_path / "secret" / "distilbert")
    config = json.loads(Path(name).read_text())
    config["model_cfg"]["text_cfg"].update(hf_model_name=str(text), hf_tokenizer_name=str(text))
    Path(name).write_text(json.dumps(config))
    towers = load_model(name, text_pretrained=str(text))
    towers.module.eval()
    (tmp_path / "out").mkdir()
    write_hub_folder(towers, tmp_path / "out", "org/tiny", "")
    written = (tmp_path / "out" / "open_clip_config.json").read_text()
    assert str(tmp_path) not in written
    assert json.loads(written)["model_cfg"]["text_cfg"]["hf_model_name"] == "org/tiny"


@pytest.mark.parametrize("name", ["tiny", "a/b/c", "org/bad name", "org/", "-x/y"])
def test_names_that_the_hub_does_not_take(name: str) -> None:
    with pytest.raises(UserError, match=f"^{name}: "):
        checked_repository(name)


@pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")  # huggingface_hub, of its own HTTP client
def test_the_command_against_a_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["train", "demo", "name=mine", *QUICK]) == 0
    capsys.readouterr()
    with serving_hub(monkeypatch) as server:
        assert main(["push", "runs/mine", "org/tiny", "--dry-run", "--license", "MIT", "--data", "Emoji"]) == 0
        shown = capsys.readouterr().out
        assert "# tiny" in shown
        assert "license: mit" in shown
        assert "nothing was uploaded" in shown
        assert server.created == []
        assert str(tmp_path) not in shown.partition("dry run:")[0]

        # without a token nothing is made, and the message says what to do
        assert main(["push", "runs/mine", "org/tiny"]) == 2
        error = capsys.readouterr().err
        assert "hf auth login" in error
        assert error.count("\n") == 1
        assert server.files == {}

        monkeypatch.setenv("HF_TOKEN", TOKEN)
        assert main(["push", "runs/mine", "org/tiny", "--private", "--out", "folder"]) == 0
        assert f"pushed: {server.url}/org/tiny" in capsys.readouterr().out
        assert server.created[-1]["visibility"] == "private"
        written = {path.name: path.read_bytes() for path in Path("folder").iterdir() if path.name[0] != "."}
        assert server.files["org/tiny"] == written
        assert {"README.md", "open_clip_config.json", "open_clip_model.safetensors", "tokenizer.json"} <= set(written)
        assert not any(TOKEN.encode() in content for content in written.values())

        # an upload that breaks off is one line
        server.broken = True
        assert main(["push", "runs/mine", "org/other", "--out", "folder"]) == 2
        error = capsys.readouterr().err
        assert "org/other: not uploaded: " in error
        assert error.count("\n") == 1
        server.broken = False

        # a public repository does not become private: nothing is uploaded to it
        assert main(["push", "runs/mine", "org/other", "--private", "--out", "folder"]) == 2
        assert "org/other: --private, but this repository exists and is public" in capsys.readouterr().err
        assert server.files["org/other"] == {}

        # a second push is a second commit of the same repository
        assert main(["push", "runs/mine", "org/tiny", "--out", "folder"]) == 0
        assert len(server.commits) == 2


def test_only_runs_have_a_card(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    towers = small_towers(tmp_path / "made")
    (tmp_path / "model").mkdir()
    disttempnet.models.save_model(towers, tmp_path / "model", logit_scale=20.0)
    assert main(["push", str(tmp_path / "model"), "org/tiny", "--dry-run"]) == 2
    assert "no run: push writes" in capsys.readouterr().err
    assert main(["push", str(tmp_path / "model"), "org/tiny", "--license", "my own!"]) == 2
    assert "not an identifier" in capsys.readouterr().err


def test_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(hub, "_OFFLINE", [])
    with pytest.raises(UserError, match="HF_HUB_OFFLINE is set"):
        upload(tmp_path, "org/tiny", False, "x")
    # the process itself turned the network off, as the Hub could not be reached
    monkeypatch.setattr(hub, "_OFFLINE", ["hub.invalid cannot be reached"])
    with pytest.raises(UserError, match=r"nothing was uploaded: hub\.invalid cannot be reached; the folder is"):
        upload(tmp_path, "org/tiny", False, "x")
