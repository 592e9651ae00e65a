"""Trackers get what metrics.jsonl and eval.jsonl get, on rank 0 alone; a resumed run stays one run. Real packages."""

from __future__ import annotations

import importlib.util
import json
import os
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from disttempnet import distributed
from disttempnet.errors import UserError
from disttempnet.training import trackers
from disttempnet.training.trainer import train
from tests.gloo import Pools
from tests.training.test_trainer import debug, losses

TASK = "eval.tasks=['emoji-concepts']"
BLOCK, HEADER = 32_768, 7  # of wandb's files: leveldb's log format


def records(path: Path) -> Iterator[Any]:
    """Records of a file of wandb: fragments with checksum, length and kind, after a header of its own."""
    from wandb.proto.wandb_internal_pb2 import Record

    content, place, parts = path.read_bytes(), HEADER, b""
    while place + HEADER <= len(content):
        if BLOCK - place % BLOCK < HEADER:
            place += BLOCK - place % BLOCK
            continue
        length, kind = int.from_bytes(content[place + 4 : place + 6], "little"), content[place + 6]
        parts += content[place + HEADER : place + HEADER + length]
        place += HEADER + length
        if kind in (1, 4):  # whole, last
            record = Record()
            record.ParseFromString(parts)
            yield record
            parts = b""


def history(path: Path) -> list[dict[str, float]]:
    """Rows of numbers in a file of wandb."""
    rows = []
    for record in records(path):
        if record.WhichOneof("record_type") == "history":
            items = {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
            rows.append(items)
    return rows


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")


def test_weights_and_biases_goes_on_with_the_same_run(
    offline: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two starts, one id; the second logs the evaluation too."""
    own = ["train.trackers=['wandb']", "train.tracker_project=clip", TASK]
    assert train(debug(tmp_path, *own, "train.stop_after_steps=9"))
    assert train(debug(tmp_path, *own, "train.epochs=2"), resume="auto")
    assert "wandb: " in capsys.readouterr().err
    run = tmp_path / "debug"
    name = json.loads((run / trackers.NAME_FILE).read_text())["name"]
    files = sorted((run / "wandb").glob(f"offline-run-*/run-{name}.wandb"))
    assert len(files) == 2
    rows = [row for file in files for row in history(file)]
    logged = {int(row["step"]): row["loss"] for row in rows if "loss" in row}
    assert logged == losses(run)
    assert [row["step"] for row in rows if "emoji-concepts/acc1" in row] == [20]
    begun = next(record.run for record in records(files[0]) if record.WhichOneof("record_type") == "run")
    assert (begun.project, begun.display_name, begun.run_id) == ("clip", "debug", name)
    settings = {item.key: json.loads(item.value_json) for item in begun.config.update}
    assert settings["optim"]["lr"] == 1e-3
    assert not (run / "tensorboard").exists(), "only what is named"


def two_processes(out: str) -> None:
    os.environ["WANDB_MODE"] = "offline"
    try:
        train(debug(Path(out), "train.trackers=['tensorboard', 'wandb']", "train.stop_after_steps=2", "eval.tasks=[]"))
    finally:
        del os.environ["WANDB_MODE"]


def test_rank_0_alone_tracks(gloo: Pools, tmp_path: Path) -> None:
    gloo(2, two_processes, str(tmp_path))
    (file,) = (tmp_path / "debug" / "wandb").glob("offline-run-*/*.wandb")
    assert len(history(file)) == 2
    board = EventAccumulator(str(tmp_path / "debug" / "tensorboard")).Reload()
    assert [event.step for event in board.Scalars("loss")] == [1, 2]
    assert len(list((tmp_path / "debug" / "tensorboard").iterdir())) == 1


def without_a_tracker(lacking: int, out: str) -> str:
    missing = trackers.LIBRARIES | ({"tensorboard": "no_such_module"} if distributed.rank() == lacking else {})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trackers, "LIBRARIES", missing)
        try:
            train(debug(Path(out), "train.stop_after_steps=1", "eval.tasks=[]"))
        except UserError as error:
            return f"{type(error).__name__}: {error}"
    return ""


def test_rank_0_alone_needs_a_tracker_and_tells_the_others(gloo: Pools, tmp_path: Path) -> None:
    assert gloo(2, without_a_tracker, 1, str(tmp_path)) == ["", ""]
    first, second = gloo(2, without_a_tracker, 0, str(tmp_path / "none"))
    assert first.startswith("UserError: train.trackers: tensorboard is not installed")
    assert second.startswith("OtherRankFailed: rank 0: train.trackers: tensorboard is not installed")


def test_a_project_without_a_tracker_that_has_projects_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"tracker_project is of wandb and trackio: name one in trackers, or leave it"):
        debug(tmp_path, "train.tracker_project=clip")
    debug(tmp_path, "train.tracker_project=disttempnet")


def test_runs_of_one_name_in_two_folders_are_two_runs(tmp_path: Path) -> None:
    names = set()
    for out in ("a", "b"):
        config = debug(tmp_path / out)
        config.folder.mkdir(parents=True)
        names |= {trackers._run_name(config), trackers._run_name(config)}
    assert len(names) == 2


@pytest.mark.skipif(
    importlib.util.find_spec("trackio") is None, reason="trackio is not installed: it wants Pillow < 13"
)
def test_trackio_goes_on_with_the_same_run(tmp_path: Path) -> None:
    own = ["debug", f"out={tmp_path}", "train.trackers=['trackio']", "train.tracker_project=clip", TASK]
    own += ["train.epochs=1", "eval.every_epochs=1"]
    environment = {**os.environ, "TRACKIO_DIR": str(tmp_path / "store"), "OMP_NUM_THREADS": "1"}
    for more in (["train.stop_after_steps=4"], ["--resume", "auto"]):
        command = [sys.executable, "-m", "disttempnet", "train", *own, *more]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        assert done.stdout == ""
        assert "trackio show --project clip" in done.stderr
    (store,) = (tmp_path / "store").glob("clip*.db")
    with sqlite3.connect(store) as database:
        rows = database.execute("select run_name, step, metrics from metrics order by id").fetchall()
    name = json.loads((tmp_path / "debug" / trackers.NAME_FILE).read_text())["name"]
    assert {row[0] for row in rows} == {name}
    numbers = [(step, json.loads(metrics)) for _, step, metrics in rows]
    assert {step: row["loss"] for step, row in numbers if "loss" in row} == losses(tmp_path / "debug")
    assert [step for step, row in numbers if "emoji-concepts/acc1" in row] == [10]


def test_what_cannot_start_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"key 'train.trackers.0': must be 'tensorboard', 'wandb' or 'trackio'"):
        debug(tmp_path, "train.trackers=['mlflow']")
    monkeypatch.setitem(trackers.LIBRARIES, "trackio", "no_such_module")
    with pytest.raises(UserError, match=r"trackio is not installed: python -m pip install 'disttempnet\[trackio\]'"):
        train(debug(tmp_path, "train.trackers=['trackio']"))
    import wandb

    def no_key(**_: object) -> None:
        raise wandb.errors.UsageError("No API key configured.")

    monkeypatch.setattr(wandb, "init", no_key)
    with pytest.raises(UserError, match=r"wandb cannot start: No API key configured.; wandb login, or WANDB_MODE=offl"):
        train(debug(tmp_path, "train.trackers=['tensorboard', 'wandb']"))
