"""The pool of a comparison: signals, dead workers and failed runs do not end the others."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from multiprocessing.connection import Connection
from pathlib import Path
from types import SimpleNamespace

import pytest

from disttempnet.cli.main import main
from disttempnet.compare import display, pool
from disttempnet.compare.grid import load_grid, run_state
from disttempnet.training.trainer import train
from tests.compare.grids import GRID, losses, write


class Shown(display.GridDisplay):
    """A display that ends a pool which waits for nothing."""

    ticks = 0

    def tick(self) -> None:
        self.ticks += 1
        assert self.ticks < 4, "it waits for ever"


@pytest.mark.parametrize("moment", [0, 1])
def test_a_signal_while_workers_start_ends_them_all(
    moment: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[str] = []

    class Process:
        """A worker that has not come so far as to notice a signal: it ends at the word of the pool only."""

        def __init__(self, target: object, args: tuple[Connection, object], name: str) -> None:
            self.connection, self.name = Connection(os.dup(args[0].fileno())), name
            self.thread = threading.Thread(target=self.work, daemon=True)

        def work(self) -> None:
            assert self.connection.recv() is None
            self.connection.close()

        def start(self) -> None:
            if self.name == f"worker-{moment}":
                os.kill(os.getpid(), signal.SIGINT)
                time.sleep(0)  # a handler runs between two steps of the interpreter
            self.thread.start()

        def is_alive(self) -> bool:
            return self.thread.is_alive()

        def join(self) -> None:
            self.thread.join(5)
            assert not self.is_alive()

        def terminate(self) -> None:
            told.append(self.name)

        def kill(self) -> None:
            pass

    context = SimpleNamespace(Process=Process, Pipe=multiprocessing.Pipe)
    monkeypatch.setattr(pool.multiprocessing, "get_context", lambda _: context)
    configs = load_grid(write(tmp_path)).configs
    outcome = pool.Pool(configs, 3, [], Shown(len(configs), 0), tmp_path / "log").run()
    assert outcome == pool.GridOutcome(stopped=True)
    assert told == [f"worker-{number}" for number in range(moment)]


def wait_for_step(run: Path, step: int, process: subprocess.Popen) -> None:
    for _ in range(20_000):  # on a busy machine
        if (run / "metrics.jsonl").is_file() and len((run / "metrics.jsonl").read_text().splitlines()) >= step:
            return
        assert process.poll() is None, "it ended early"
        time.sleep(0.01)
    raise AssertionError("the run did not get going")


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="finds the worker in /proc")
def test_failed_killed_and_interrupted_runs_do_not_end_the_others_and_lose_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = (
        GRID.replace("[1, 2]", "[1]").replace("64", "160").replace("[common]", "[common]\ntrain.checkpoint_every = 2")
    )
    path = write(tmp_path, text.replace("[runs.v1]", '[runs.bad]\nmodel.name = "ViT-B-23"\n[runs.v1]'))
    first, bad, second = load_grid(path).configs
    command = [sys.executable, "-m", "disttempnet", "compare", str(path)]
    with subprocess.Popen(command, stdout=-1, stderr=-1, text=True, start_new_session=True) as process:
        wait_for_step(first.folder, 3, process)
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        workers = [int(pid) for pid in children if b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes()]
        assert len(workers) == 1
        os.kill(workers[0], signal.SIGKILL)
        wait_for_step(second.folder, 3, process)
        os.killpg(process.pid, signal.SIGINT)  # as a terminal's Ctrl-C
        out, err = process.communicate(timeout=300)
    assert process.returncode == 143
    assert "resume with the same command" in out
    assert "clip--seed-1  FAILED: its process ended unexpectedly (SIGKILL)" in err
    assert "v1--seed-1  stopped" in err
    states = [run_state(config) for config in (first, bad, second)]
    assert [state.kind for state in states] == ["begun", "new", "begun"]
    assert states[2].why == f"saved at step {len(losses(second.folder))}"

    assert main(["compare", str(path)]) == 1
    shown = capsys.readouterr()
    assert "bad--seed-1  FAILED: " in shown.err
    assert "1 of 3 runs failed" in shown.out
    assert "Did you mean 'ViT-B-32'" in shown.out
    for config in (first, second):
        assert train(config.model_copy(update={"out": str(tmp_path / "straight")}))
        assert losses(config.folder) == losses(tmp_path / "straight" / config.name)
