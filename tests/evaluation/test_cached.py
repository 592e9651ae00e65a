"""Evaluation on cached features is evaluation of the towers in full; only heads are run again."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from disttempnet.cli.main import main
from disttempnet.config import CONFIG_FOLDER, load_config
from disttempnet.errors import UserError
from disttempnet.evaluation import evaluate
from disttempnet.evaluation.cached import FeatureCache
from disttempnet.evaluation.tasks import TaskData, embedded_data
from disttempnet.models import Towers, load_model, save_model
from disttempnet.models.locks import lock_image_tower, lock_text_tower
from disttempnet.models.trunk import TOWER_SIDES, trunk_of
from disttempnet.training.trainer import train
from tests.evaluation.toy import toy_task, write_shard
from tests.features import locked
from tests.gloo import Pools

CACHED = "train.cache_features=true"
TASKS = 'eval.tasks=["emoji-concepts"]'
COLOURS = ("red", "green", "blue", "black", "white", "yellow")


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> locked.Towers:
    return locked.write_towers(tmp_path_factory.mktemp("towers"))


def opened(files: locked.Towers) -> Towers:
    """The towers with their trunks locked and heads that are the same every time."""
    torch.manual_seed(locked.RANDOM_HEADS)
    towers = load_model(files.name, image_pretrained=str(files.image), text_pretrained=str(files.text))
    lock_image_tower(towers.module)
    lock_text_tower(towers.module)
    return towers


def cache_of(towers: Towers, folder: Path, dtype: str = "float32") -> FeatureCache:
    return FeatureCache({side: trunk_of(towers, side) for side in TOWER_SIDES}, folder, dtype)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> TaskData:
    """Classification and retrieval of 45 images, of which two cannot be read."""
    folder = tmp_path_factory.mktemp("data")
    shown = [COLOURS[number % len(COLOURS)] for number in range(45)]
    rows = [(colour, f"a {colour} cat {number}\ntwo {colour}", colour) for number, colour in enumerate(shown)]
    rows[7] = rows[40] = ("corrupt", "a red cat", "red")
    write_shard(folder / "0.tar", rows)
    return toy_data(folder)


def toy_data(folder: Path) -> TaskData:
    return embedded_data(toy_task(folder, templates=("a {c} cat", "the {c} photo", "{c}")))


def plain(result: object) -> dict[str, Any]:
    """A result as values that `==` compares to the last bit."""
    return {key: value.tolist() if isinstance(value, Tensor) else value for key, value in vars(result).items()}


def score(towers: Towers, data: TaskData, cache: FeatureCache | None = None, batch: int = 16) -> dict[str, Any]:
    return plain(evaluate(towers, [data], device="cpu", batch=batch, cache=cache)["toy"])


@contextmanager
def calls(*modules: nn.Module) -> Iterator[list[int]]:
    """Rows that modules are called with inside."""
    rows: list[int] = []
    hooks = [
        module.register_forward_pre_hook(
            lambda _, args, kwargs: rows.append(len((args or tuple(kwargs.values()))[0])), with_kwargs=True
        )
        for module in modules
    ]
    yield rows
    for hook in hooks:
        hook.remove()


def test_scores_and_features_are_the_same_to_the_last_bit(files: locked.Towers, data: TaskData, tmp_path: Path) -> None:
    towers = opened(files)
    wanted = score(towers, data)
    assert len(wanted["corrupt"]) == 2
    cache = cache_of(towers, tmp_path)
    with calls(towers.module.visual.trunk, towers.module.text.transformer) as rows:
        assert score(towers, data, cache) == wanted
        assert rows, "features are computed"
        rows.clear()
        assert score(towers, data, cache, batch=17) == wanted, "of other batches too"
        again = cache_of(towers, tmp_path)
        assert score(towers, data, again) == wanted
    assert rows == [1, 1], "only a first row that tells the width"
    assert (again.read, again.computed) == (45 + len(texts_of(data)), 0)
    assert (cache.read, cache.computed) == (0, 45 + len(texts_of(data)))


def texts_of(data: TaskData) -> set[str]:
    names, templates = data.heads[0]
    return {template.replace("{c}", name) for name in names for template in templates} | {
        caption for sample in data.samples for caption in sample.captions
    }


def test_heads_are_those_of_now(files: locked.Towers, data: TaskData, tmp_path: Path) -> None:
    towers = opened(files)
    cache = cache_of(towers, tmp_path)
    before = score(towers, data, cache)
    with torch.no_grad():
        towers.module.visual.head.proj.weight.mul_(torch.linspace(-1, 1, towers.embed_dim)[:, None])
        towers.module.text.proj.weight.mul_(torch.linspace(1, -1, towers.embed_dim)[:, None])
    after = score(towers, data, cache)
    assert after == score(towers, data)
    assert after["image_features"] != before["image_features"]
    assert after["class_features"] != before["class_features"]


@pytest.mark.parametrize("side", TOWER_SIDES)
def test_one_tower_is_cached_and_one_run(side: str, files: locked.Towers, data: TaskData, tmp_path: Path) -> None:
    towers = opened(files)
    wanted = score(towers, data)
    cache = FeatureCache({side: trunk_of(towers, side)}, tmp_path)
    assert score(towers, data, cache) == wanted
    assert [path.name.split("-")[0] for path in tmp_path.iterdir()] == [side]


def test_float16_rounds_and_no_more(files: locked.Towers, data: TaskData, tmp_path: Path) -> None:
    towers = opened(files)
    found, wanted = score(towers, data, cache_of(towers, tmp_path, "float16")), score(towers, data)
    for key in ("image_features", "text_features", "class_features"):
        assert found[key] != wanted[key]
        np.testing.assert_allclose(found[key], wanted[key], atol=2e-3)


def test_other_weights_and_other_data_are_computed_anew(files: locked.Towers, tmp_path: Path) -> None:
    rows = [(colour, f"a {colour} cat", colour) for colour in COLOURS]
    write_shard(tmp_path / "0.tar", rows)
    towers, data, folder = opened(files), toy_data(tmp_path), tmp_path / "features"
    score(towers, data, cache_of(towers, folder))

    with torch.no_grad():
        next(iter(towers.module.visual.trunk.parameters())).flatten()[0] += 1
    changed = cache_of(towers, folder)
    assert score(towers, data, changed) == score(towers, data)
    assert (changed.read, changed.computed) == (len(texts_of(data)), 6), "the text tower is the same"

    stamp = os.stat(tmp_path / "0.tar").st_mtime_ns
    os.utime(tmp_path / "0.tar", ns=(stamp, stamp + 1))
    replaced = cache_of(towers, folder)
    score(towers, data, replaced)
    assert (replaced.read, replaced.computed) == (len(texts_of(data)), 6)


def test_a_damaged_file_is_named(files: locked.Towers, data: TaskData, tmp_path: Path) -> None:
    towers = opened(files)
    score(towers, data, cache_of(towers, tmp_path))
    path = next(tmp_path.glob("image-*/shard-00000.safetensors"))
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(UserError, match=rf"{path}: damaged: it is not what was written: remove it"):
        score(towers, data, cache_of(towers, tmp_path))
    path.unlink()
    assert score(towers, data, cache_of(towers, tmp_path)) == score(towers, data)


def score_on_a_rank(files: locked.Towers, data: TaskData, folder: Path) -> dict[str, Any]:
    towers = opened(files)
    cache = cache_of(towers, folder)
    score(towers, data, cache, batch=16)
    return score(towers, data, cache, batch=16)


def test_world_size_does_not_show(files: locked.Towers, data: TaskData, tmp_path: Path, gloo: Pools) -> None:
    wanted = score(opened(files), data)
    for found in gloo(2, score_on_a_rank, files, data, tmp_path):
        assert found == wanted


def evaluations(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "eval.jsonl").read_text().splitlines()]


def test_training_evaluates_on_cached_features(files: locked.Towers, tmp_path: Path) -> None:
    given = [TASKS, "eval.every_epochs=1", "eval.batch=64", "data.validation=0.1", "train.stop_after_steps=20"]
    assert train(files.config(tmp_path / "uncached", *given))
    assert train(files.config(tmp_path / "cached", CACHED, *given))
    cached, uncached = (tmp_path / name / "debug" for name in ("cached", "uncached"))
    assert evaluations(cached) == evaluations(uncached)
    assert len(evaluations(cached)) == 2
    first, second = (np.load(next((run / "temperatures").glob("*.npz"))) for run in (cached, uncached))
    assert np.array_equal(first["image"], second["image"])


def test_the_command_reads_what_training_computed(
    files: locked.Towers, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(files.config(tmp_path, CACHED, TASKS, "train.stop_after_steps=2"))
    run = tmp_path / "debug"
    capsys.readouterr()
    results = {}
    for name, given in (("cached", []), ("full", ["--cache-features", "none"])):
        path = tmp_path / f"{name}.json"
        assert main(["evaluate", str(run), "--out", str(path), *given]) == 0
        results[name] = json.loads(path.read_text())
        shown = "".join(capsys.readouterr())
        assert ("read, 0 computed now" in shown) == (name == "cached"), shown
    assert results["cached"] == results["full"]


def test_a_model_without_a_run_is_cached_as_embeddings(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], data: TaskData
) -> None:
    torch.manual_seed(7)
    start = tmp_path / "start"
    start.mkdir()
    save_model(load_model("demo-vit-32"), start, logit_scale=10.0)
    spec = f"shards:{data.samples[0].shard}?label=label"
    out = [tmp_path / f"{number}.json" for number in range(3)]
    given = ["evaluate", str(start), "--tasks", spec]
    features = ["--cache-features", str(tmp_path / "features")]
    for path, more in zip(out, ([], features, features), strict=True):
        assert main([*given, "--out", str(path), *more]) == 1, "two images are unreadable"
    shown = "".join(capsys.readouterr())
    assert "0 read" in shown
    assert "0 computed now" in shown
    found = [json.loads(path.read_text()) for path in out]
    assert found[1] == found[2] == found[0]


def test_frozen_towers_are_evaluated_as_embeddings(tmp_path: Path) -> None:
    torch.manual_seed(7)
    start = tmp_path / "start"
    start.mkdir()
    save_model(load_model("demo-vit-32"), start, logit_scale=10.0)
    own = [f"model.pretrained={start}", "train.freeze=towers"]
    found = []
    for name, more in (("uncached", []), ("cached", [CACHED, f"train.cache_folder={tmp_path / 'features'}"])):
        config = load_config(
            CONFIG_FOLDER / "debug.toml", [f"out={tmp_path / name}", *own, *more, TASKS, "data.transform=evaluation"]
        )
        assert train(config)
        found.append(evaluations(config.folder)[-1])
    assert json.dumps(found[0]) == json.dumps(found[1])


def test_a_cache_that_cannot_be_written_to_is_left_out(
    files: locked.Towers, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = files.config(tmp_path, CACHED, TASKS, f"train.cache_folder={tmp_path / 'features'}")
    assert train(config.model_copy(update={"train": config.train.model_copy(update={"stop_after_steps": 1})}))
    (tmp_path / "features").rename(tmp_path / "gone")
    (tmp_path / "features").write_text("in the way")
    capsys.readouterr()
    assert main(["evaluate", str(tmp_path / "debug"), "--out", str(tmp_path / "results.json")]) == 0
    assert "features cannot be written to: towers are run in full (--cache-features" in "".join(capsys.readouterr())
