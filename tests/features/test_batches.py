"""Training on cached features is training on the towers that gave them."""

from __future__ import annotations

import json
from pathlib import Path
from unittest import mock

import pytest
import torch

from disttempnet.config import CONFIG_FOLDER, Config, load_config
from disttempnet.errors import UserError, UserNotice
from disttempnet.features.batches import CachedData
from disttempnet.models import load_model, save_model
from disttempnet.training.checkpoint import load_run
from disttempnet.training.run_folder import list_checkpoints
from disttempnet.training.trainer import Trainer, train
from tests.data.pictures import encoded, gradient
from tests.features.locked import CACHED, Towers, final_weights, same_weights, write_towers
from tests.gloo import Pools
from tests.training.test_trainer import losses

import open_clip  # isort: skip (after disttempnet.models)


@pytest.fixture(scope="module")
def towers(tmp_path_factory: pytest.TempPathFactory) -> Towers:
    return write_towers(tmp_path_factory.mktemp("towers"))


@pytest.fixture(scope="module")
def uncached(towers: Towers, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("uncached")
    assert train(towers.config(out))
    return out / "debug"


def test_cached_training_is_uncached_training_to_the_last_bit(towers: Towers, uncached: Path, tmp_path: Path) -> None:
    assert train(towers.config(tmp_path, CACHED))
    assert losses(tmp_path / "debug") == losses(uncached)
    assert same_weights(tmp_path / "debug", uncached)
    start = load_model(towers.name, image_pretrained=str(towers.image), text_pretrained=str(towers.text))
    trained = final_weights(uncached)["visual.head.proj.weight"]
    assert not torch.equal(trained, start.module.state_dict()["visual.head.proj.weight"]), "heads are trained"


def test_float16_rounds_and_no_more(towers: Towers, uncached: Path, tmp_path: Path) -> None:
    assert train(towers.config(tmp_path, CACHED, "train.cache_dtype=float16"))
    found, wanted = losses(tmp_path / "debug"), losses(uncached)
    assert found != wanted
    assert found == pytest.approx(wanted, rel=2e-3)


@pytest.mark.parametrize("side", ["image", "text"])
def test_one_tower_is_locked_and_one_trained(side: str, towers: Towers, tmp_path: Path) -> None:
    unlocked = {"image": "model.lock_text=false", "text": "model.lock_image=false"}[side]
    given = [unlocked, "train.stop_after_steps=6", "data.workers=1", "model.batch_norm=frozen"]
    assert train(towers.config(tmp_path / "uncached", *given))
    assert train(towers.config(tmp_path / "cached", CACHED, *given))
    assert losses(tmp_path / "cached" / "debug") == losses(tmp_path / "uncached" / "debug")
    assert same_weights(tmp_path / "cached" / "debug", tmp_path / "uncached" / "debug")


def test_frozen_towers_are_cached_as_embeddings(tmp_path: Path) -> None:
    torch.manual_seed(7)
    start = tmp_path / "start"
    start.mkdir()
    save_model(load_model("demo-vit-32"), start, logit_scale=10.0)

    def config(out: str, *given: str) -> Config:
        own = [f"out={tmp_path / out}", f"model.pretrained={start}"]
        frozen = ["train.freeze=towers", "data.transform=evaluation", "train.stop_after_steps=6", "eval.tasks=[]"]
        return load_config(CONFIG_FOLDER / "debug.toml", [*own, *frozen, *given])

    assert train(config("uncached"))
    trainer = Trainer(config("cached", CACHED, f"train.cache_folder={tmp_path / 'features'}"), torch.device("cpu"))
    assert isinstance(trainer.data, CachedData)
    assert {store.width for store in (*trainer.data.images, trainer.data.texts) if store} == {trainer.towers.embed_dim}
    assert trainer.run()
    found, wanted = losses(tmp_path / "cached" / "debug"), losses(tmp_path / "uncached" / "debug")
    # captions are cut after the longest of other batches: the order of sums in attention is another
    assert found == pytest.approx(wanted, rel=1e-5)


def steps_of(config: Config) -> dict[int, float]:
    assert train(config)
    return losses(config.folder)


def test_world_size_does_not_show(towers: Towers, uncached: Path, tmp_path: Path, gloo: Pools) -> None:
    cache = f"train.cache_folder={tmp_path / 'features'}"
    wanted = {step: loss for step, loss in losses(uncached).items() if step <= 5}
    for found in gloo(2, steps_of, towers.config(tmp_path, CACHED, cache, "train.stop_after_steps=5")):
        assert found == pytest.approx(wanted, rel=1e-5)
    shards = sorted((tmp_path / "features").glob("*/shard-*"))
    assert len(shards) == 2, "320 samples, the limit, are in the first shard of each side"


def test_a_run_goes_on_with_the_same_features(towers: Towers, uncached: Path, tmp_path: Path) -> None:
    assert train(towers.config(tmp_path, CACHED, "train.stop_after_steps=7"))
    before = {path: path.stat().st_mtime_ns for path in towers.cache.glob("*/shard-*")}
    assert train(towers.config(tmp_path, CACHED), resume="auto")
    assert {path: path.stat().st_mtime_ns for path in towers.cache.glob("*/shard-*")} == before
    assert losses(tmp_path / "debug") == losses(uncached)
    assert same_weights(tmp_path / "debug", uncached)


def test_views_come_in_turn(towers: Towers, tmp_path: Path) -> None:
    given = [CACHED, "data.transform=emoji", "data.views=2", f"train.cache_folder={tmp_path / 'features'}"]
    trainer = Trainer(towers.config(tmp_path, *given, "train.seed=1"), torch.device("cpu"))
    assert isinstance(trainer.data, CachedData)
    ids = next(trainer.data.loader_from(0)).ids.numpy()
    first, second = (store.read(ids) for store in trainer.data.images)
    assert not torch.equal(first, second)
    for epoch, wanted in enumerate((trainer.data.images[0], trainer.data.images[1], trainer.data.images[0])):
        batch = next(trainer.data.loader_from(epoch))
        assert torch.equal(batch.images, wanted.read(batch.ids.numpy()))
    assert len(list((tmp_path / "features").glob("image-*"))) == 2
    other = Trainer(towers.config(tmp_path / "other", *given, "train.seed=2"), torch.device("cpu"))
    assert isinstance(other.data, CachedData)
    assert [store.folder for store in other.data.images] == [store.folder for store in trainer.data.images]


def test_samples_that_cannot_be_read_are_replaced_as_without_a_cache(towers: Towers, tmp_path: Path) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    rows = []
    for number in range(96):
        broken = number in (3, 40, 41, 77)
        (folder / f"{number:03d}.png").write_bytes(b"no image" if broken else encoded(gradient(40 + number), "PNG"))
        texts = [f"a {number} red cat", *("two dogs", "an apple")[: number % 3]]
        rows.append(json.dumps({"image": f"{number:03d}.png", "captions": texts}))
    (folder / "list.jsonl").write_text("\n".join(rows) + "\n", "utf-8")
    given = [f"data.train={folder / 'list.jsonl'}", "data.limit=0", "train.stop_after_steps=6"]
    assert train(towers.config(tmp_path / "uncached", *given))
    assert train(towers.config(tmp_path / "cached", CACHED, *given))
    found, wanted = (tmp_path / name / "debug" for name in ("cached", "uncached"))
    assert losses(found) == losses(wanted)
    skipped = [json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])["skipped"] for run in (found, wanted)]
    assert skipped == [4, 4]


def test_a_mixture_is_cached(towers: Towers, tmp_path: Path) -> None:
    given = ["data.train=embedded:emoji/train::embedded:emoji/val", "data.limit=0", "data.validation=0.1"]
    given += ["train.stop_after_steps=2", "data.global_batch=32"]
    assert train(towers.config(tmp_path / "uncached", *given))
    assert train(towers.config(tmp_path / "cached", CACHED, *given))
    assert losses(tmp_path / "cached" / "debug") == losses(tmp_path / "uncached" / "debug")


def test_a_finished_run_is_a_whole_model(towers: Towers, tmp_path: Path) -> None:
    """open_clip opens it by itself where it knows both towers: here those of its own, frozen."""
    torch.manual_seed(7)
    start = tmp_path / "start"
    start.mkdir()
    save_model(load_model("demo-vit-32"), start, logit_scale=10.0)
    own = [f"out={tmp_path}", f"model.pretrained={start}", f"train.cache_folder={tmp_path / 'features'}", CACHED]
    own += ["data.transform=evaluation", "train.freeze=towers", "train.stop_after_steps=2"]
    config = load_config(CONFIG_FOLDER / "debug.toml", own)
    assert train(config)
    checkpoint = list_checkpoints(config.folder)[-1]
    model, _, _ = open_clip.create_model_and_transforms(f"local-dir:{checkpoint}")
    given = load_model("demo-vit-32", str(start)).module.state_dict()
    assert all(torch.equal(value, given[key]) for key, value in model.state_dict().items() if key != "logit_scale")


def test_heads_may_be_mlps(towers: Towers, tmp_path: Path) -> None:
    given = [CACHED, "model.head=mlp", "train.stop_after_steps=3"]
    assert train(towers.config(tmp_path, *given))
    assert train(towers.config(tmp_path, *given[:2], "train.stop_after_steps=5"), resume="auto")
    weights = final_weights(tmp_path / "debug")
    shapes = {name: tuple(value.shape) for name, value in weights.items() if "head" in name or "text.proj" in name}
    assert shapes["visual.head.mlp.fc1.weight"] == (32, 96)
    assert shapes["text.proj.0.weight"] == (24, 32)
    opened = load_run(tmp_path / "debug").towers.module.state_dict()
    assert all(torch.equal(opened[name], value) for name, value in weights.items())
    with pytest.raises(UserError, match=r"model.head = 'mlp' is for towers of timm and Hugging Face"):
        load_model("demo-vit-32", head="mlp")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["model.lock_image=false", "model.lock_text=false", CACHED], "locked as a whole"),
        (["model.unlocked_image_groups=1", "model.lock_text=false", CACHED], "locked as a whole"),
        (["data.views=2", "data.transform=emoji"], "data.views is for a cached image tower"),
        (["data.views=2", CACHED], "all views are alike"),
        (["train.shard=true", CACHED], "shard and cache_features"),
        (
            ["data.transform=emoji", CACHED],
            r"debug.toml: data.transform = 'emoji' has no effect on an image tower that is cached once: set "
            "data.transform = 'evaluation', or data.views to the number of augmented views that are cached$",
        ),
        (["train.compile=true", CACHED], "train.compile has nothing to compile where both towers are cached"),
        (["train.cache_dtype=float16"], r"\[train\] cache_dtype is for cached features: set cache_features = true"),
        (["train.cache_folder=/features"], r"\[train\] cache_folder is for cached features"),
    ],
)
def test_what_does_not_go_together_is_refused(
    overrides: list[str], message: str, towers: Towers, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=message):
        towers.config(tmp_path, *overrides)


def test_keys_of_one_cached_side_leave_the_other_free(towers: Towers, tmp_path: Path) -> None:
    """A text tower alone is cached: images are augmented as ever, and their tower may be compiled."""
    given = [CACHED, "model.lock_image=false", "data.transform=emoji", "train.compile=true"]
    assert towers.config(tmp_path, *given).cached_sides == ("text",)


@pytest.mark.filterwarnings("always::disttempnet.errors.UserNotice")
def test_a_run_of_an_older_version_that_ignored_its_transform_goes_on(towers: Towers, tmp_path: Path) -> None:
    config = towers.config(tmp_path, CACHED)
    data = config.data.model_copy(update={"transform": "emoji"})
    older = config.model_copy(update={"data": data, "train": config.train.model_copy(update={"stop_after_steps": 1})})
    with pytest.raises(UserError, match=r"^data.transform = 'emoji' has no effect"):
        train(older)
    with mock.patch("disttempnet.training.checkpoint.refuse_out_of_bounds"):
        assert train(older)
    longer = older.model_copy(update={"train": config.train.model_copy(update={"stop_after_steps": 2})})
    with pytest.warns(UserNotice, match=r"data.transform = 'emoji' has no effect.*: kept, as the run began with this"):
        assert train(longer, resume="auto")
    other = longer.model_copy(update={"optim": longer.optim.model_copy(update={"lr": 0.5})})
    with pytest.raises(UserError, match=r"^data.transform = 'emoji' has no effect"):
        train(other, resume="auto")
