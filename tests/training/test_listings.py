"""A run from the TempNet code's layout is a run like any other: two epochs, resume, two processes, temperatures."""

from __future__ import annotations

import csv
import io
import json
import subprocess
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch

from disttempnet.cli.main import main
from disttempnet.config import CONFIG_FOLDER, Config, SourceConfig, load_config
from disttempnet.data import open_source
from disttempnet.data.held_out import HeldOut
from disttempnet.errors import UserError
from disttempnet.temperature.command import TemperatureSource, write_temperatures
from disttempnet.training.run_folder import list_checkpoints
from disttempnet.training.run_info import data_facts
from disttempnet.training.trainer import train
from tests.training.test_trainer import WORLD_SIZE_TOLERANCE, command, environment, losses, same_ending

PAIRS = 44  # of them 4 cannot be used
LEFT_OUT = [
    "1 samples left out, no caption: cc3m_train.json:cc3m_train/000000007.jpg",
    "1 samples left out, empty caption: cc3m_train.json:cc3m_train/000000003.jpg",
]


@pytest.fixture(scope="module")
def cc3m(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`cc3m/cc3m_train/…` and `clip_train/cc3m_train.json`, of emoji; two rows have no caption, two no image."""
    root = tmp_path_factory.mktemp("datasets")
    emoji = open_source((SourceConfig(path="embedded:emoji/train"),), progress=False)
    (root / "cc3m" / "cc3m_train").mkdir(parents=True)
    (root / "clip_train").mkdir()
    items = []
    for n in range(PAIRS):
        name = f"cc3m_train/{n:09d}.jpg"
        items.append({"caption": emoji.captions(n)[0], "image": name, "image_id": f"cc3m_{n}"})
        if n not in (20, 33):
            (root / "cc3m" / name).write_bytes(emoji.image_bytes(n))
    items[3]["caption"] = " "
    del items[7]["caption"]
    (root / "clip_train" / "cc3m_train.json").write_text(json.dumps(items))
    return root


def overrides(cc3m: Path, out: Path) -> list[str]:
    listing, images = json.dumps(str(cc3m / "clip_train" / "cc3m_train.json")), json.dumps(str(cc3m / "cc3m"))
    return [
        f"out={json.dumps(str(out))}",
        f"data.train=[{{path={listing}, images={images}}}]",
        "data.global_batch=16",
        "data.limit=0",
        "eval.tasks=[]",
    ]


def debug(cc3m: Path, out: Path, *more: str) -> Config:
    return load_config(CONFIG_FOLDER / "debug.toml", [*overrides(cc3m, out), *more])


@pytest.fixture(scope="module")
def straight(cc3m: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("straight")
    assert train(debug(cc3m, out))
    return out / "debug"


def test_two_epochs_of_all_rows_that_can_be_used(straight: Path) -> None:
    measured = losses(straight)
    assert list(measured) == list(range(1, 7)), "42 rows are three batches of 16"
    assert np.isfinite(list(measured.values())).all()
    facts = json.loads((straight / "run.json").read_text(encoding="utf-8"))
    assert facts["num_samples"] == PAIRS - 2, "what an epoch reads: the missing images are not known beforehand"
    assert facts["data"] == {
        "samples": PAIRS,
        "usable": PAIRS - 2,
        "held_out": 0,
        "beyond_limit": 0,
        "left_out": LEFT_OUT,
    }


def test_stop_in_an_epoch_and_resume(cc3m: Path, straight: Path, tmp_path: Path) -> None:
    assert train(debug(cc3m, tmp_path, "train.stop_after_steps=4"))
    assert train(debug(cc3m, tmp_path), resume="auto")
    assert losses(tmp_path / "debug") == losses(straight)
    same_ending(tmp_path / "debug", straight)


def test_what_is_left_out_and_skipped_is_told(
    cc3m: Path, straight: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    quiet = ("train.log_every=100", "train.checkpoint_every=1")  # steps are logged at the end only
    assert train(debug(cc3m, tmp_path, *quiet, "train.stop_after_steps=4"))
    lines = capsys.readouterr().err.splitlines()
    assert lines[3:6] == [f"{PAIRS} samples: {PAIRS - 2} to train on, 2 unusable", *LEFT_OUT]
    missing = [f"skipped cc3m_train.json:cc3m_train/{n:09d}.jpg: No such file or directory" for n in (20, 33)]
    for name in missing:
        assert any(line.startswith(name) for line in lines), lines
    so_far = [line for line in lines if line.startswith("skipped so far")]
    summary = (
        f"skipped so far: 2 of {PAIRS - 2} samples ({200 / (PAIRS - 2):.1f} %) unreadable: 2 No such file or directory"
    )
    assert so_far[0] == summary, "files are counted, not draws"
    kept = torch.load(list_checkpoints(tmp_path / "debug")[-1] / "trainer.pt", weights_only=True)["skipped"]
    assert {reason: ids.tolist() for reason, ids in kept.items()} == {"No such file or directory": [20, 33]}

    assert train(debug(cc3m, tmp_path, *quiet), resume="auto")
    last = [line for line in capsys.readouterr().err.splitlines() if line.startswith("skipped so far")][-1]
    counts = [json.loads(line)["skipped"] for line in (straight / "metrics.jsonl").read_text().splitlines()]
    assert (last, counts[-1]) == (summary, 2), "as undisturbed"


def test_what_is_left_out_of_shards_and_of_a_mixture(cc3m: Path, tmp_path: Path) -> None:
    listing = SourceConfig(path=str(cc3m / "clip_train" / "cc3m_train.json"), images=str(cc3m / "cc3m"), weight=2)
    with tarfile.open(tmp_path / "0.tar", "w") as tar:
        for name, content in (("a.jpg", b"x"), ("a.txt", b"fine"), ("b.jpg", b"x"), ("b.txt", b" ")):
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    shards = SourceConfig(path=str(tmp_path))
    expected = "1 samples left out, empty caption: 0.tar:b"
    facts = data_facts(open_source((shards,), progress=False))
    assert facts == {"samples": 2, "usable": 1, "held_out": 0, "beyond_limit": 0, "left_out": [expected]}
    mixed = data_facts(open_source((shards, listing), progress=False))
    assert (mixed["samples"], mixed["usable"]) == (PAIRS + 2, PAIRS - 1)
    assert [line.partition(": ")[2] for line in mixed["left_out"]] == [expected, *LEFT_OUT]


def test_two_processes_with_loader_workers_train_the_same_curve(cc3m: Path, straight: Path, tmp_path: Path) -> None:
    config = str(CONFIG_FOLDER / "debug.toml")
    launched = command("train", config, *overrides(cc3m, tmp_path), "data.workers=1", processes=2)
    done = subprocess.run(launched, timeout=300, env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert len(list(list_checkpoints(tmp_path / "debug")[-1].glob("shard-*-of-00002.pt"))) == 2
    together, alone = losses(tmp_path / "debug"), losses(straight)
    assert together.keys() == alone.keys()
    np.testing.assert_allclose(list(together.values()), list(alone.values()), rtol=WORLD_SIZE_TOLERANCE, atol=1e-5)


def test_temperatures_of_its_rows_and_of_a_folder(cc3m: Path, straight: Path, tmp_path: Path) -> None:
    out = tmp_path / "tau.csv"
    assert write_temperatures(str(straight), TemperatureSource(), out, columns=("image_id",)) == PAIRS - 4
    with out.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    left = [n for n in range(PAIRS) if n not in (3, 7, 20, 33)]
    assert [row["id"] for row in rows] == [str(n) for n in left]
    assert [row["image_id"] for row in rows] == [f"cc3m_{n}" for n in left]
    assert rows[0]["key"] == "cc3m_train.json:cc3m_train/000000000.jpg"

    pairs = tmp_path / "pairs"
    pairs.mkdir()
    for n in (1, 0):
        image = cc3m / "cc3m" / f"cc3m_train/{n:09d}.jpg"
        (pairs / f"{n}.jpg").write_bytes(image.read_bytes())
        (pairs / f"{n}.txt").write_text(f"caption {n}")
    assert write_temperatures(str(straight), TemperatureSource(shards=str(pairs)), tmp_path / "pairs.csv") == 2
    with (tmp_path / "pairs.csv").open(newline="", encoding="utf-8") as file:
        assert [(row["id"], row["key"]) for row in csv.DictReader(file)] == [("", "pairs:0.jpg"), ("", "pairs:1.jpg")]


def test_another_listing_does_not_fit_the_run(cc3m: Path, straight: Path, tmp_path: Path) -> None:
    listing = cc3m / "clip_train" / "cc3m_train.json"
    index, before = Path(f"{listing}.index"), listing.read_bytes()
    kept = index.read_bytes()
    try:
        listing.write_bytes(before.replace(b'"cc3m_9"', b'"cc3m_X"'))
        with pytest.raises(UserError, match=r"cc3m_train\.json: has changed since it was indexed"):
            train(debug(cc3m, straight.parent), resume="auto")
        index.unlink()
        with pytest.raises(UserError, match="was trained on another data set"):
            train(debug(cc3m, straight.parent), resume="auto")
    finally:
        listing.write_bytes(before)
        index.write_bytes(kept)


def test_the_shipped_config_for_own_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder of images and captions is enough: augmentation, evaluation and search know nothing of emoji."""
    monkeypatch.setenv("DISTTEMPNET_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    emoji = open_source((SourceConfig(path="embedded:emoji/train"),), progress=False)
    photos = tmp_path / "photos" / "summer"
    photos.mkdir(parents=True)
    for n in range(40):
        (photos / f"{n:02d}.jpg").write_bytes(emoji.image_bytes(n))
        (photos / f"{n:02d}.txt").write_text(emoji.captions(n)[0], encoding="utf-8")
    assert main(["train", "own", "data.train=photos"]) == 2, "more than the images of a folder"
    shorter = ["data.global_batch=16", "train.epochs=1", "data.workers=0"]
    assert main(["train", "own", "data.train=photos", *shorter]) == 0
    run = tmp_path / "runs" / "own"
    config = load_config(run / "config.toml")
    assert (config.data.transform, config.eval.tasks, config.data.validation) == ("tempnet", (), 0.1)
    held_out = HeldOut(open_source(config.data.sources, progress=False), 0.1)
    rows = [json.loads(line) for line in (run / "eval.jsonl").read_text().splitlines()]
    assert [set(row["results"]) for row in rows] == [{"validation"}]
    assert 0 < 40 - len(held_out.usable) < 12
    assert main(["search", "runs/own", "photos", "a face", "--top", "3", "--workers", "0"]) == 0
