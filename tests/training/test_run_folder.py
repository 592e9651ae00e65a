"""The folder of a run: one writer at a time, and nothing damaged is opened."""

from __future__ import annotations

import errno
import fcntl
import os
import platform
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from disttempnet import compare
from disttempnet.config import CONFIG_FOLDER, load_config
from disttempnet.errors import UserError, UserNotice
from disttempnet.training import run_folder, trainer
from disttempnet.training.run_folder import claimed
from disttempnet.training.trainer import Trainer, train

HOLDER = """
import os, sys, time
from pathlib import Path
from disttempnet.training.run_folder import claimed
with claimed(Path(sys.argv[1])):
    child = os.fork()
    if child:
        print(child, flush=True)
    time.sleep(60)
"""


def test_a_run_has_one_writer_until_it_is_killed(tmp_path: Path) -> None:
    run = tmp_path / "run"
    with subprocess.Popen([sys.executable, "-c", HOLDER, str(run)], stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        worker = int(holder.stdout.readline())
        words = f"{run}: process {holder.pid} on "
        with pytest.raises(UserError, match=re.escape(words) + ".* is training this run"):
            train(
                load_config(CONFIG_FOLDER / "debug.toml", [f"out={tmp_path}", "name=run", "train.stop_after_steps=1"])
            )
        assert [path.name for path in run.iterdir()] == [".lock"]
        holder.send_signal(signal.SIGKILL)
        holder.wait()
        with claimed(run):  # although the worker that it had forked still lives
            os.kill(worker, signal.SIGKILL)
    with claimed(run):
        assert (run / ".lock").read_text(encoding="utf-8").startswith(f"process {os.getpid()} on ")


def test_a_lock_of_a_machine_that_is_gone_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with subprocess.Popen([sys.executable, "-c", HOLDER, str(tmp_path)], stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        os.kill(int(holder.stdout.readline()), signal.SIGKILL)
        monkeypatch.setattr(platform, "node", lambda: "another")
        slept: list[float] = []
        monkeypatch.setattr(
            run_folder.time, "sleep", lambda seconds: (slept.append(seconds), holder.kill(), holder.wait())
        )
        with claimed(tmp_path):
            assert slept
            assert (tmp_path / ".lock").read_text(encoding="utf-8") == f"process {os.getpid()} on another"


def test_what_cannot_be_written_is_found_before_any_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    long = tmp_path / ("n" * 300)
    for folder, why in [
        (tmp_path / "file", f"{tmp_path}/file is not a folder"),
        (tmp_path / "file" / "run", f"{tmp_path}/file is not a folder"),
        (long / "run", "File name too long"),
        (Path("/proc/runs/run"), "No such file or directory"),
    ]:
        with pytest.raises(UserError, match=f"{re.escape(str(folder))}: cannot be written: {why}; choose"):
            run_folder.refuse_unwritable_folder(folder)
    run_folder.refuse_unwritable_folder(tmp_path / "a" / "b")
    assert [path.name for path in tmp_path.iterdir()] == ["file"], "nothing is left of the trial"
    monkeypatch.setattr(trainer, "open_training_data", lambda *_: pytest.fail("data are opened"))
    monkeypatch.setattr(trainer, "load_model", lambda *_, **__: pytest.fail("towers are loaded"))
    with pytest.raises(UserError, match="file is not a folder"):
        train(load_config(CONFIG_FOLDER / "debug.toml", [f"out={tmp_path}/file"]))


def test_a_disk_without_locks_is_written_with_a_notice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "lockf", refuse)
    monkeypatch.setattr(fcntl, "flock", refuse)
    with pytest.warns(UserNotice, match=r"its file system has no locks \(No locks available\)"), claimed(tmp_path):
        pass
    with pytest.warns(UserNotice, match="its file system has no locks"), compare._alone_in(tmp_path):
        pass


def test_a_run_that_was_trained_while_another_start_waited_is_not_trained_over(tmp_path: Path) -> None:
    config = load_config(CONFIG_FOLDER / "debug.toml", [f"out={tmp_path}", "train.stop_after_steps=1", "eval.tasks=[]"])
    late = Trainer(config, torch.device("cpu"), "auto")
    assert train(config)
    written = (tmp_path / "debug" / "metrics.jsonl").read_bytes()
    with pytest.raises(UserError, match="another process has just trained this run: start again"):
        late.run()
    assert (tmp_path / "debug" / "metrics.jsonl").read_bytes() == written
