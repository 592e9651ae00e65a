"""`disttempnet embed`: features as files, those of the towers."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch.testing import assert_close

from disttempnet.cli.main import main
from disttempnet.data import decode, eval_transform
from disttempnet.models import Towers, encode_images, encode_texts, load_model, save_model
from tests.data.pictures import encoded, gradient


@pytest.fixture(scope="module")
def towers() -> Towers:
    torch.manual_seed(0)
    towers = load_model("demo-vit-32")
    towers.module.eval()
    return towers


@pytest.fixture(scope="module")
def weights(towers: Towers, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The towers as open_clip saves them."""
    folder = tmp_path_factory.mktemp("model")
    save_model(towers, folder, logit_scale=10.0)
    return folder


class Embed:
    """The command on a model and a listing; keywords replace them."""

    def __init__(self, model: Path, source: Path) -> None:
        self.model, self.source = model, source

    def __call__(self, out: Path, *flags: str, model: str = "", source: str = "") -> int:
        target, data = model or str(self.model), source or str(self.source)
        return main(["embed", target, data, "--out", str(out), "--workers", "0", *flags])


@pytest.fixture
def embed(weights: Path, images: Path) -> Embed:
    return Embed(weights, images)


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """A listing of forty images, the fourth broken; every third has two captions."""
    folder = tmp_path / "images"
    folder.mkdir()
    rows = []
    for number in range(40):
        (folder / f"{number:02d}.png").write_bytes(b"none" if number == 3 else encoded(gradient(40 + number), "PNG"))
        texts = [f"a picture {number}", *(["another one"] if number % 3 == 0 else [])]
        rows.append(json.dumps({"image": f"{number:02d}.png", "captions": texts}))
    (folder / "list.jsonl").write_text("\n".join(rows) + "\n", "utf-8")
    return folder / "list.jsonl"


def test_files_hold_the_towers_features(
    embed: Embed, towers: Towers, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert embed(tmp_path / "out") == 0
    assert "features of 39 samples of 40" in capsys.readouterr().out
    with safe_open(tmp_path / "out" / "features-00000.safetensors", "pt") as file:
        metadata = file.metadata()
        ids, image, text, text_ids = (file.get_tensor(name) for name in ("ids", "image", "text", "text_ids"))
    assert ids.tolist() == [number for number in range(40) if number != 3]
    captions, names = json.loads(metadata["captions"]), json.loads(metadata["names"])
    assert captions[0] == ["a picture 0", "another one"]
    assert captions[1] == ["a picture 1"]
    assert names[0].endswith("00.png")
    assert text_ids.tolist() == [sample for sample, own in zip(ids.tolist(), captions, strict=True) for _ in own]
    transform = eval_transform(towers.image_size, towers.resizing)
    pixels = torch.stack([transform(decode((images.parent / f"{i:02d}.png").read_bytes())) for i in ids.tolist()])
    with torch.no_grad():
        assert_close(image, encode_images(towers, pixels))
        assert_close(text, encode_texts(towers, towers.tokenizer([one for own in captions for one in own])))
    about = json.loads((tmp_path / "out" / "about.json").read_text())
    assert about["samples"] == 39
    assert about["complete"]
    assert about["model"] == str(embed.model)
    assert about["notes"] == []
    assert about["digest"] == metadata["digest"]
    assert not (tmp_path / "out" / ".parts").exists()


def test_parquet_holds_the_same(embed: Embed, tmp_path: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    assert embed(tmp_path / "one") == 0
    assert embed(tmp_path / "two", "--format", "parquet") == 0
    table = parquet.read_table(tmp_path / "two" / "features-00000.parquet")
    with safe_open(tmp_path / "one" / "features-00000.safetensors", "pt") as file:
        image, text = file.get_tensor("image"), file.get_tensor("text")
    assert torch.equal(torch.tensor(table["image"].to_pylist()), image)
    assert torch.equal(torch.tensor([row for own in table["text"].to_pylist() for row in own]), text)
    assert table["captions"].to_pylist()[0] == ["a picture 0", "another one"]


def test_files_of_another_origin_are_kept(embed: Embed, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("features-00000.safetensors", "features-00007.safetensors", ".parts"):
        out = tmp_path / name / "out"
        out.mkdir(parents=True)
        (out / name).write_bytes(b"of somebody else")
        assert embed(out) == 2
        error = capsys.readouterr().err
        assert f"{out / name}: is there without an about.json of `embed`: remove it, or name another --out" in error
        assert error.count("\n") == 1
        assert (out / name).read_bytes() == b"of somebody else"
        assert [path.name for path in out.iterdir()] == [name]
    for content in ('{"about": "holidays"}', "holidays", "[]"):
        other = tmp_path / "holidays"
        other.mkdir(exist_ok=True)
        (other / "about.json").write_text(content)
        assert embed(other) == 2
        assert f"{other / 'about.json'}: is not of `embed`: remove it, or name another --out" in capsys.readouterr().err
        assert (other / "about.json").read_text() == content


def test_only_own_files_are_removed(embed: Embed, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    others = ["features-00007.parquet", "features-a.safetensors", "features-7.safetensors", "notes.txt"]
    for name in others:
        (out / name).write_bytes(b"of somebody else")
    (out / "features-a.safetensors").write_bytes(b"of somebody else")
    assert embed(out) == 0
    about = json.loads((out / "about.json").read_text())
    (out / "about.json").write_text(json.dumps(about | {"complete": False}))
    for name in ("features-00001.safetensors", ".writing-features-00000.safetensors-0123"):  # of an earlier version
        (out / name).write_bytes(b"of this command")
    assert embed(out) == 0
    assert {path.name for path in out.iterdir()} == {*others, "features-00000.safetensors", "about.json"}
    assert all((out / name).read_bytes() == b"of somebody else" for name in others)


def test_complete_files_are_not_made_again(embed: Embed, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    assert embed(out) == 0
    assert capsys.readouterr().out == f"features of 39 samples of 40: {out}\n"
    path = out / "features-00000.safetensors"
    before, kept = path.stat().st_ino, load_file(path)
    assert embed(out) == 0
    assert capsys.readouterr().out == f"already complete: features of 39 samples of 40: {out}\n"
    assert path.stat().st_ino == before, "the file is not written again"
    path.unlink()
    assert embed(out) == 0
    assert capsys.readouterr().out == f"features of 39 samples of 40: {out}\n"
    assert all(torch.equal(value, kept[key]) for key, value in load_file(path).items())


def test_a_full_disk_is_one_line_about_out(
    embed: Embed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert embed(tmp_path / "other") == 0
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    assert embed(tmp_path / "out") == 2
    message = capsys.readouterr().err
    assert "free some, choose --dtype float16, or name another --out" in message
    assert "train.cache" not in message
    assert json.loads((tmp_path / "out" / "about.json").read_text())["complete"] is False
    assert embed(tmp_path / "out", "--dtype", "float16") == 2
    assert "holds features of another model" in capsys.readouterr().err


def test_other_features_are_refused(embed: Embed, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert embed(tmp_path / "out") == 0
    assert embed(tmp_path / "out", "--dtype", "float16") == 2
    assert "holds features of another model, source or format" in capsys.readouterr().err


def test_towers_without_weights_are_refused(
    embed: Embed, towers: Towers, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    architecture = tmp_path / "own.json"
    architecture.write_text(json.dumps(towers.architecture))
    for model, message in (
        ("open_clip:demo-vit-32", "demo-vit-32: with which weights? demo-vit-32/TAG (open_clip has none of this one)"),
        ("demo-vit-32", "demo-vit-32: with which weights?"),
        (str(architecture), f"{architecture}: an architecture without weights"),
        ("open_clip:demo-vit-23", "unknown model 'demo-vit-23'. Did you mean 'demo-vit-32'"),
    ):
        assert embed(tmp_path / "out", model=model) == 2
        error = capsys.readouterr().err
        assert message in error
        assert "random" not in error, "that is no way out here"
        assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_notes_are_printed_and_kept(
    embed: Embed, towers: Towers, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Weights of 32 pixels in an architecture of 64."""
    folder = tmp_path / "large"
    shutil.copytree(embed.model, folder)
    config = json.loads((folder / "open_clip_config.json").read_text())
    config["model_cfg"]["vision_cfg"]["image_size"] *= 2
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    assert embed(tmp_path / "out", model=str(folder)) == 2
    assert "embed: --resize-positions" in capsys.readouterr().err
    assert embed(tmp_path / "out", "--resize-positions", model=str(folder)) == 0
    about = json.loads((tmp_path / "out" / "about.json").read_text())
    assert ["to which they were interpolated" in note for note in about["notes"]] == [True]
    assert about["notes"][0] in capsys.readouterr().out


def test_a_source_is_named_as_in_a_config(embed: Embed, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A mixture, whose ids lie one after another, and a listing whose keys and images have to be named."""
    lists = tmp_path / "lists"
    lists.mkdir()
    for name, count in (("one", 3), ("two", 2)):
        rows = [json.dumps({"photo": f"{number:02d}.png", "said": f"{name} {number}"}) for number in range(count)]
        (lists / f"{name}.jsonl").write_text("\n".join(rows) + "\n", "utf-8")
    keys = ["--caption-key", "said", "--image-key", "photo", "--images", str(tmp_path / "images")]
    both = f"{lists / 'one.jsonl'}::{lists / 'two.jsonl'}"
    assert embed(tmp_path / "out", *keys, source=both) == 0
    assert "features of 5 samples of 5" in capsys.readouterr().out
    with safe_open(tmp_path / "out" / "features-00000.safetensors", "pt") as file:
        assert file.get_tensor("ids").tolist() == [0, 1, 2, 3, 4]
        assert json.loads(file.metadata()["captions"]) == [["one 0"], ["one 1"], ["one 2"], ["two 0"], ["two 1"]]
        image = file.get_tensor("image")
    assert torch.equal(image[0], image[3])

    index = tmp_path / "elsewhere.index"
    assert embed(tmp_path / "single", *keys, "--index", str(index), source=str(lists / "two.jsonl")) == 0
    assert index.is_file()
    assert embed(tmp_path / "wrong", *keys, "--index", str(index), source=both) == 2
    assert "--index names one index, but there are 2 data sets" in capsys.readouterr().err
