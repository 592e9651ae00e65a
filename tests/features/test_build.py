"""Builds of features: resumed after a kill, shared by processes, refused where they cannot be kept."""

from __future__ import annotations

import fcntl
import multiprocessing
import os
import shutil
import signal
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from disttempnet import distributed
from disttempnet.config import Config
from disttempnet.errors import UserError, UserNotice
from disttempnet.features import store as stores
from disttempnet.features.batches import CachedData
from disttempnet.features.build import _Claims
from disttempnet.features.store import FeatureStore
from disttempnet.models.locks import prepare_towers
from disttempnet.models.trunk import trunk_of
from disttempnet.training.trainer import Trainer
from tests.features.locked import Towers, write_towers
from tests.gloo import Pools

ALL = ("train.cache_features=true", "data.limit=1900")  # four shards of 512 a side


@pytest.fixture(scope="module")
def towers(tmp_path_factory: pytest.TempPathFactory) -> Towers:
    return write_towers(tmp_path_factory.mktemp("towers"))


def built(config: Config) -> tuple[FeatureStore, FeatureStore]:
    data = Trainer(config, torch.device("cpu")).data
    assert isinstance(data, CachedData)
    assert data.texts
    return data.images[0], data.texts


@pytest.fixture(scope="module")
def whole(towers: Towers, tmp_path_factory: pytest.TempPathFactory) -> tuple[FeatureStore, FeatureStore]:
    """Features of all samples, built once in one go."""
    return built(towers.config(tmp_path_factory.mktemp("whole"), *ALL))


def contents(store: FeatureStore) -> dict[str, list[float]]:
    """Features by shard; the order of a header's words is no matter."""
    return {path.name: load_file(path)["features"].flatten().tolist() for path in store.folder.glob("shard-*")}


def start(config: Config) -> None:
    torch.set_num_threads(1)
    Trainer(config, torch.device("cpu"))


def test_a_build_that_was_killed_goes_on(
    towers: Towers, whole: tuple[FeatureStore, FeatureStore], tmp_path: Path
) -> None:
    config = towers.config(tmp_path, *ALL, f"train.cache_folder={tmp_path / 'features'}", "data.workers=1")
    process = multiprocessing.get_context("spawn").Process(target=start, args=(config,))
    process.start()
    folder = tmp_path / "features" / whole[0].folder.name
    deadline = time.monotonic() + 300
    while len(list(folder.glob("shard-*"))) < 1 and time.monotonic() < deadline and process.is_alive():
        time.sleep(0.01)
    os.kill(process.pid or 0, signal.SIGKILL)
    process.join()
    assert 1 <= len(list(folder.glob("shard-*"))) < 4
    (folder / ".writing-shard-00003.safetensors-0123").write_bytes(b"left behind")
    kept = {path: path.stat().st_mtime_ns for path in folder.glob("shard-*")}
    images, texts = built(config)
    assert images.folder == folder
    assert {path: path.stat().st_mtime_ns for path in kept} == kept, "what was finished is not made again"
    assert contents(images) == contents(whole[0])
    assert contents(texts) == contents(whole[1])
    assert not list(folder.glob(".writing-*"))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_is_one_line(
    number: signal.Signals,
    towers: Towers,
    whole: tuple[FeatureStore, FeatureStore],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    config = towers.config(tmp_path, *ALL, f"train.cache_folder={tmp_path / 'features'}")
    write, written = FeatureStore.write, []

    def stopped(store: FeatureStore, *given: Any) -> None:
        write(store, *given)
        written.append(given[0])
        if len(written) == 2:
            os.kill(os.getpid(), number)

    monkeypatch.setattr(FeatureStore, "write", stopped)
    with pytest.raises((SystemExit, KeyboardInterrupt)) as end:
        Trainer(config, torch.device("cpu"))
    assert end.type is KeyboardInterrupt or end.value.code == 143
    (line,) = [one for one in capsys.readouterr().err.splitlines() if one.startswith("stopped")]
    assert line == "stopped: 2 of 4 shards of image features are kept; the same command goes on"
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    monkeypatch.undo()
    images, _ = built(config)
    assert contents(images) == contents(whole[0])


def test_ranks_share_the_work(
    towers: Towers, whole: tuple[FeatureStore, FeatureStore], tmp_path: Path, gloo: Pools
) -> None:
    cache = f"train.cache_folder={tmp_path / 'features'}"
    for images, texts in gloo(2, built, towers.config(tmp_path, *ALL, cache)):
        assert contents(images) == contents(whole[0])
        assert contents(texts) == contents(whole[1])


def test_other_weights_have_another_store(towers: Towers, tmp_path: Path) -> None:
    given = towers.config(tmp_path, *ALL)
    trainer = Trainer(given, torch.device("cpu"))
    assert isinstance(trainer.data, CachedData)
    for side in ("image", "text"):
        trunk = trunk_of(trainer.towers, side)
        before = trunk.facts()
        with torch.no_grad():
            next(trunk.head.parameters()).add_(1.0)
        assert trunk_of(trainer.towers, side).facts() == before, "the head is no part of it"
        name, parameter = next(
            (n, p)
            for n, p in trainer.towers.module.named_parameters()
            if n.startswith("visual.trunk" if side == "image" else "text.transformer")
        )
        with torch.no_grad():
            parameter.view(-1)[0] += 1e-3
        assert trunk_of(trainer.towers, side).facts() != before, name


def test_a_full_disk_is_one_line(towers: Towers, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = towers.config(tmp_path, *ALL, f"train.cache_folder={tmp_path / 'features'}")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    with pytest.raises(UserError, match=r"features of 1,9\d\d samples take 0\.00 GB and 0\.00 GB are free"):
        Trainer(config, torch.device("cpu"))
    monkeypatch.undo()

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(stores, "atomic", full)
    with pytest.raises(UserError, match=r"shard-00000.*cannot be written: No space left on device: free some room"):
        Trainer(config, torch.device("cpu"))


@pytest.mark.parametrize("damage", ["cut", "changed", "gone", "header"])
def test_a_damaged_shard_is_named(
    damage: str, towers: Towers, whole: tuple[FeatureStore, FeatureStore], tmp_path: Path
) -> None:
    cache = tmp_path / "features"
    shutil.copytree(towers.cache, cache)
    path = cache / whole[1].folder.name / "shard-00003.safetensors"
    content = bytearray(path.read_bytes())
    if damage == "cut":
        path.write_bytes(content[:-100])
    elif damage == "changed":
        content[-50] ^= 1
        path.write_bytes(content)
    elif damage == "header":
        content[20] ^= 1
        path.write_bytes(content)
    else:
        path.unlink()
    config = towers.config(tmp_path, *ALL, f"train.cache_folder={cache}")
    if damage == "gone":  # as in a build that was killed
        assert contents(built(config)[1]) == contents(whole[1])
        return
    with pytest.raises(UserError, match=rf"{path}: damaged"):
        Trainer(config, torch.device("cpu"))


def test_features_that_float16_does_not_hold_are_refused(tmp_path: Path) -> None:
    store = FeatureStore(tmp_path, {"side": "image"}, 4, 2, "float16", 512)
    with pytest.raises(UserError, match="too large for float16"):
        store.write(0, torch.full((4, 2), 1e5), None, {})
    with pytest.raises(UserError, match="not finite"):
        store.write(0, torch.full((4, 2), torch.nan), None, {})


def test_without_locks_ranks_divide_the_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = FeatureStore(tmp_path, {"side": "image"}, 2048, 2, "float32", 512)
    leftover = tmp_path / ".writing-shard-00001.safetensors-0123"
    leftover.write_bytes(b"of a process that still writes it")

    def refuse(*_: object) -> None:
        raise OSError(37, "No locks available")

    monkeypatch.setattr(fcntl, "lockf", refuse)
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    with _Claims(store) as claims:
        with pytest.warns(UserNotice, match="has no locks") as notices:
            mine = list(claims.take([0, 1, 2, 3]))
        assert mine == [0, 2]
        assert len(notices) == 1
        monkeypatch.setattr(distributed, "rank", lambda: 1)
        assert list(claims.take([0, 1, 2, 3])) == [1, 3]
    assert leftover.exists()


def test_rows_are_those_of_the_samples(tmp_path: Path) -> None:
    store = FeatureStore(tmp_path, {"side": "text"}, 1200, 3, "float32", 512)
    store.create()
    generator = torch.Generator().manual_seed(0)
    features, firsts = {}, {}
    for number in store.shards():
        counts = torch.randint(1, 4, (len(store.ids(number)),), generator=generator)
        first = torch.cat([torch.zeros(1, dtype=torch.int64), counts.cumsum(0)])
        features[number], firsts[number] = torch.randn(int(first[-1]), 3, generator=generator), first
        store.write(number, features[number], first, {5: "why"} if number == 0 else {})
    store.verify()
    assert store.unreadable == {5: "why"}
    ids = torch.randint(0, 1200, (64,), generator=generator)
    found = store.read(ids.numpy(), lambda sample, count: sample % count)
    for row, sample in zip(found, ids.tolist(), strict=True):
        number, place = divmod(sample, store.rows)
        begin, end = firsts[number][place : place + 2].tolist()
        assert torch.equal(row, features[number][begin + sample % (end - begin)])


def test_features_are_those_of_any_batch_of_16_or_more(towers: Towers, tmp_path: Path) -> None:
    """What lets a cache be built in other batches than a run trains with."""
    trainer = Trainer(towers.config(tmp_path), torch.device("cpu"))
    trainer.towers.module.eval()
    size = trainer.towers.image_size
    pixels = torch.randint(0, 256, (64, 3, size, size), generator=torch.Generator().manual_seed(0)).byte()
    tokens = trainer.towers.tokenizer([f"a red cat {number}" for number in range(64)])
    for side, inputs in (("image", pixels), ("text", tokens)):
        trunk = trunk_of(trainer.towers, side)
        with torch.inference_mode():
            whole = trunk(inputs)
            for rows in (16, 17, 32, 50):
                assert torch.equal(trunk(inputs[:rows]), whole[:rows]), (side, rows)


def test_a_trained_tower_is_not_cached(towers: Towers, tmp_path: Path) -> None:
    trainer = Trainer(towers.config(tmp_path, *ALL), torch.device("cpu"))
    config = trainer.config.model.model_copy(update={"unlocked_image_groups": 1})
    trainer.towers.module.requires_grad_(True)
    prepare_towers(trainer.towers.module, config)
    with pytest.raises(UserError, match=r"image tower cannot be cached: visual\.trunk"):
        trunk_of(trainer.towers, "image")
    assert trunk_of(trainer.towers, "text").head_name == "proj"
