"""data.validation: samples that a run never sees and is measured on, and a source of its own."""

from __future__ import annotations

import json
import tarfile
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
from PIL import Image

from disttempnet.cli.main import main
from disttempnet.config import CONFIG_FOLDER, Config, SourceConfig, config_from_table, load_config
from disttempnet.data import open_source
from disttempnet.data.epoch_plan import EpochPlan
from disttempnet.data.held_out import HeldOut
from disttempnet.data.open import open_training_source
from disttempnet.data.source import Source
from disttempnet.errors import UserError
from disttempnet.evaluation.validation import validation_data
from disttempnet.training.trainer import train

IMAGES = 120


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """photos/0.png, 0.txt …; list.csv names each image twice; turned.csv has its rows the other way round."""
    root = tmp_path_factory.mktemp("own")
    (root / "photos").mkdir()
    rows = []
    for i in range(IMAGES):
        colour = tuple(int(value) for value in np.random.default_rng(i).integers(0, 256, 3))
        Image.new("RGB", (8, 8), colour).save(root / "photos" / f"{i}.png")
        (root / "photos" / f"{i}.txt").write_text(f"picture {i}")
        rows += [f"photos/{i}.png,picture {i}", f"photos/{i}.png,colour {colour[0]}"]
    for name, order in (("list.csv", rows), ("turned.csv", rows[::-1])):
        (root / name).write_text("\n".join(["image,caption", *order]) + "\n")
    return root


def source_of(path: Path, share: float, **more: object) -> HeldOut:
    return HeldOut(open_source((SourceConfig(path=str(path), **more),), progress=False), share)


def held_out_names(source: HeldOut) -> set[str]:
    return {source.name(int(i)).partition(":")[2] for i in source.held_out}


def config_of(photos: Path, out: Path, *more: str) -> Config:
    own = [f"out={json.dumps(str(out))}", f"data.train={json.dumps(str(photos / 'photos'))}"]
    short = ["data.limit=0", "data.global_batch=16", "data.transform=open_clip", "eval.tasks=[]", "train.epochs=2"]
    return load_config(CONFIG_FOLDER / "debug.toml", [*own, *short, *more])


def test_what_is_held_out_depends_on_no_order(photos: Path) -> None:
    first = source_of(photos / "list.csv", 0.2)
    assert 0.1 * IMAGES < len(first.held_out) < 0.3 * IMAGES
    assert held_out_names(source_of(photos / "turned.csv", 0.2)) == held_out_names(first)
    assert held_out_names(first) < held_out_names(source_of(photos / "list.csv", 0.3)), "more of a larger share"
    mixed = [SourceConfig(path=str(photos / name), weight=2.0) for name in ("photos", "list.csv")]
    mixture = HeldOut(open_source(mixed, progress=False), 0.2)
    assert {name for name in held_out_names(mixture) if name.startswith("photos/")} == held_out_names(first)
    assert mixture.shares == open_source(mixed, progress=False).shares


def test_rows_of_one_image_are_held_out_together(photos: Path) -> None:
    rows = source_of(photos / "list.csv", 0.2, join_rows=False, index=str(photos / "rows.index"))
    names = [rows.name(int(i)) for i in rows.held_out]
    assert len(names) == 2 * len(set(names))


def test_shards_in_another_order_hold_out_the_same(photos: Path, tmp_path: Path) -> None:
    tars = ["data", "shard", str(photos / "photos"), "--out", str(tmp_path / "tars"), "--samples-per-shard", "50"]
    assert main([*tars, "--workers", "1"]) == 0
    folder = source_of(tmp_path / "tars", 0.2)
    turned = source_of(tmp_path / "tars" / "{00002,00000,00001}.tar", 0.2)
    assert folder.held_out.tolist() != turned.held_out.tolist()
    names = [{source.name(int(i)) for i in source.held_out} for source in (folder, turned)]
    assert names[0] == names[1]
    assert 0.1 * IMAGES < len(folder.held_out) < 0.3 * IMAGES


def test_an_epoch_has_all_other_samples_once(photos: Path) -> None:
    source = source_of(photos / "photos", 0.2)
    plan = EpochPlan(source, global_batch=4, lanes=2, seed=1, tail="drop")
    seen = np.concatenate([plan.batch(0, step) for step in range(plan.steps)]).tolist()
    others = set(range(IMAGES)) - set(source.held_out.tolist())
    assert len(seen) == len(set(seen)) == len(others) // 4 * 4
    assert set(seen) <= others
    assert source.digest == source.base.digest, "ids mean what they mean without validation"
    assert source.reason(int(source.held_out[0])) == "held out for validation"


def test_without_validation_the_source_is_what_it_was(photos: Path, tmp_path: Path) -> None:
    source: Source = open_training_source(config_of(photos, tmp_path).data, progress=False)
    assert not isinstance(source, HeldOut)
    assert validation_data(config_of(photos, tmp_path).data) is None


def test_a_share_that_leaves_nothing(photos: Path) -> None:
    with pytest.raises(UserError, match=r"validation = 1e-09 holds out none of the 120 usable samples of .*: raise it"):
        source_of(photos / "photos", 1e-9)
    base = open_source((SourceConfig(path=str(photos / "photos")),), progress=False)
    alike = mock.patch.object(type(base), "hashes", return_value=np.zeros(IMAGES, np.uint64))
    with alike, pytest.raises(UserError, match=r"holds out all of the 120 usable samples of .*: lower it"):
        HeldOut(base, 0.2)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("0.6", "must be a number from 0 to 0.5"),
        ("-0.1", "must be a number from 0 to 0.5"),
        ("nan", "must be a number from 0 to 0.5"),
        ('""', "must be a share from 0 to 0.5, or name a source"),
        ("[]", "must be a number from 0 to 0.5"),
    ],
)
def test_wrong_values(given: str, message: str, photos: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError) as raised:
        validation_data(config_of(photos, tmp_path, f"data.validation={given}").data)
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)


def test_a_boolean_is_no_share(photos: Path, tmp_path: Path) -> None:
    table = config_of(photos, tmp_path).model_dump()
    table["data"]["validation"] = True
    with pytest.raises(UserError, match=r"data\.validation\] must be a number from 0 to 0\.5"):
        config_from_table(table, "x.toml")


def test_a_run_is_measured_on_what_it_never_saw(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = config_of(photos, tmp_path, "data.validation=0.2", "eval.every_epochs=1")
    assert train(config)
    run = tmp_path / "debug"
    held = source_of(photos / "photos", 0.2).held_out
    said = "".join(capsys.readouterr())
    share = f"{len(held)} of {IMAGES} ({100 * len(held) / IMAGES:.1f} %)"
    assert f"data.validation = 0.2 holds out {share}: each image is drawn by a hash" in said
    chance = np.mean([min(k / len(held), 1) for k in (1, 5, 10)])  # k of N: every caption is another one
    assert f"(chance {chance:.3f})" in said
    assert f"{IMAGES} samples: {IMAGES - len(held)} to train on, {len(held)} held out for validation\n" in said
    assert "weights of both towers: random" in said
    assert f"among the nearest 1, 5, 10 of {len(held)} in " in said
    assert f"by chance {100 * chance:.1f} %" in said
    assert f"  checkpoint: {max((run / 'checkpoints').glob('step-*'))}" in said
    for command in (f"report {run} --out {run}/report.html", f"evaluate {run}", f"search {run} {photos / 'photos'} "):
        assert f"disttempnet {command}" in said
    logged = [json.loads(line) for line in (run / "eval.jsonl").read_text().splitlines()]
    assert [set(line["results"]) for line in logged] == [{"validation"}] * 2
    assert logged[-1]["samples"]["validation"] == len(held)
    scores = [line["results"]["validation"]["mean_recall"] for line in logged]
    best = json.loads((run / "checkpoints" / "best.json").read_text())
    assert best["mean_recall"] == max(scores)
    capsys.readouterr()
    last = max((run / "checkpoints").glob("step-*"))
    assert main(["evaluate", str(last), "--out", str(tmp_path / "again.json")]) == 0
    assert f"Validation ({len(held)} images)" in capsys.readouterr().out
    again = json.loads((tmp_path / "again.json").read_text())["results"]["validation"]
    assert again["mean_recall"] == pytest.approx(scores[-1], abs=1e-6)
    assert again.keys() == logged[-1]["standard_errors"]["validation"].keys()
    with pytest.raises(UserError, match=r"data\.validation was 0\.2 and is 0\.1 now"):
        train(config_of(photos, tmp_path, "data.validation=0.1", "train.epochs=2"), resume="auto")


def test_validation_alone_chooses_the_best_checkpoint(photos: Path, tmp_path: Path) -> None:
    """Never a benchmark that is evaluated beside it."""
    tasks = "eval.tasks=['emoji-concepts']"
    assert train(config_of(photos, tmp_path, "data.validation=0.2", "eval.every_epochs=1", tasks))
    run = tmp_path / "debug"
    logged = [json.loads(line) for line in (run / "eval.jsonl").read_text().splitlines()]
    assert [set(line["results"]) for line in logged] == [{"validation", "emoji-concepts"}] * 2
    best = json.loads((run / "checkpoints" / "best.json").read_text())
    assert best["mean_recall"] == max(line["results"]["validation"]["mean_recall"] for line in logged)


def test_a_source_of_its_own(photos: Path, tmp_path: Path) -> None:
    for spec in (photos / "list.csv", f"captions:{photos / 'list.csv'}"):
        data = validation_data(config_of(photos, tmp_path, f"data.validation={json.dumps(str(spec))}").data)
        assert data is not None
        assert (data.task.name, data.task.protocols, len(data.samples)) == ("validation", ("retrieval",), IMAGES)
        assert len(data.samples[0].captions) == 2
        assert data.samples[0].image().size == (8, 8)
    trained = open_source((SourceConfig(path=str(photos / "photos")),), progress=False)
    same = config_of(photos, tmp_path, f"data.validation={json.dumps(str(photos / 'photos'))}").data
    with pytest.raises(UserError, match="is also trained on: name other samples, or a share of these"):
        validation_data(same, trained)
    with pytest.raises(UserError, match="is also trained on"):
        validation_data(same)  # `evaluate RUN`, where the training source is not opened
    with pytest.raises(UserError, match="no such"):
        validation_data(config_of(photos, tmp_path, "data.validation=nowhere/x.csv").data)


def test_training_data_that_is_not_here_is_noted(photos: Path, tmp_path: Path) -> None:
    """A run may be evaluated on another machine than it was trained on."""
    for spec in (photos / "list.csv", f"captions:{photos / 'list.csv'}"):
        data = validation_data(config_of(photos, tmp_path, f"data.validation={quoted(spec)}", "data.train=gone").data)
        assert data is not None
        assert len(data.samples) == IMAGES
        assert data.notes[-1] == "gone is not here: not checked whether its samples are those of validation"


def quoted(value: object) -> str:
    return json.dumps(str(value))


def test_what_is_trained_on_is_refused_in_any_form(photos: Path, tmp_path: Path) -> None:
    listing, turned, folder = (photos / name for name in ("list.csv", "turned.csv", "photos"))
    (tmp_path / "tars").mkdir()
    for number in range(2):
        with tarfile.open(tmp_path / "tars" / f"{number}.tar", "w") as tar:
            for suffix in ("png", "txt"):
                tar.add(folder / f"{number}.{suffix}", f"{number}.{suffix}")
    (tmp_path / "link.csv").symlink_to(listing)
    both, one = tmp_path / "tars" / "{0..1}.tar", tmp_path / "tars" / "1.tar"
    for train_on, given in (
        (quoted(f"{listing}::{turned}"), listing),
        (f'[{{path="{listing}",weight=2}}]', listing),
        (quoted(listing), f"captions:{listing}"),
        (quoted(listing), f"captions:{tmp_path / 'link.csv'}?images={photos}"),
        (quoted(folder), f"folder:{folder}"),
        (quoted(folder), f"captions:{folder}"),
        (quoted(f"{turned}::{both}"), one),
        (quoted(both), f"shards:{one}"),
    ):
        config = config_of(photos, tmp_path, f"data.validation={quoted(given)}", f"data.train={train_on}").data
        with pytest.raises(UserError, match=r"is also trained on: name other samples, or a share of these$"):
            validation_data(config, open_training_source(config, progress=False))
    others = config_of(photos, tmp_path, f"data.train={quoted(listing)}", f'data.validation="shards:{one}"').data
    data = validation_data(others, open_training_source(others, progress=False))
    assert data is not None
    assert len(data.samples) == 1


def test_a_copy_of_a_part_of_what_is_trained_on_is_refused(photos: Path, tmp_path: Path) -> None:
    listing, turned, copy = (photos / name for name in ("list.csv", "turned.csv", "copy.csv"))
    copy.write_bytes(listing.read_bytes())
    words = [f"data.train={quoted(f'{listing}::{turned}')}", f"data.validation={quoted(copy)}"]
    config = config_of(photos, tmp_path, *words).data
    with pytest.raises(UserError, match=r"copy\.csv' is also trained on"):
        validation_data(config, open_training_source(config, progress=False))
