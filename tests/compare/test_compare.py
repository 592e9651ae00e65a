"""A comparison's grid: checked before it starts, trained as `train` does, interrupted and continued."""

from __future__ import annotations

import fcntl
import json
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
from typing import Any

import pytest

from disttempnet.cli.main import main
from disttempnet.compare import display, pool, worker
from disttempnet.compare.grid import load_grid, run_state
from disttempnet.config import CONFIG_FOLDER, load_config
from disttempnet.errors import UserError
from disttempnet.losses import OBJECTIVES
from disttempnet.training import trainer
from disttempnet.training.trainer import train

GRID = """
config = "debug.toml"
seeds = [1, 2]
[common]
eval.tasks = ["emoji-concepts"]
"data.limit" = 64
[runs.clip]
loss = { name = "clip" }
[runs.v1]
loss = { name = "disttempnet-v1", rho = 2.0 }
"""


def write(folder: Path, text: str = GRID, out: str = "") -> Path:
    path = folder / "grid.toml"
    path.write_text(f"out = {json.dumps(out or str(folder / 'out'))}\n{text}", encoding="utf-8")
    return path


def losses(run: Path) -> list[tuple[int, float]]:
    lines = map(json.loads, (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
    return [(line["step"], line["loss"]) for line in lines]


@pytest.fixture(autouse=True)
def one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # sums come in one order here and in the workers


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The grid file of a finished comparison, two runs at a time."""
    path = write(tmp_path_factory.mktemp("grid"))
    assert main(["compare", str(path), "--jobs", "2"]) == 0
    return path


def test_the_shipped_grid_is_valid_and_the_first_seed_comes_first() -> None:
    grid = load_grid(CONFIG_FOLDER / "compare.toml", ["vary.data.global_batch=[32,64]"])
    names = [config.name for config in grid.configs]
    assert names[0] == "clip--global_batch-32--seed-1"
    each = len(names) // 3
    assert [name.rpartition("-")[2] for name in names] == ["1"] * each + ["2"] * each + ["3"] * each
    assert each == 2 * len({name.partition("--")[0] for name in names})
    assert {config.data.global_batch for config in grid.configs if "global_batch-64" in config.name} == {64}
    assert grid.configs[-1].train.seed == 3


def test_a_run_lays_its_keys_over_the_base_and_replaces_its_loss(tmp_path: Path) -> None:
    path = write(
        tmp_path, GRID + '[runs.slow]\noptim.lr = 5e-4\nloss.name = "sogclr"\n[vary]\n"loss.temperature" = [0.1]'
    )
    with pytest.raises(UserError, match=r"grid.toml: v1--temperature-0.1--seed-1: .*unknown argument .*'temperature'"):
        load_grid(path)
    path = write(tmp_path, GRID + '[runs.slow]\noptim.lr = 5e-4\nloss.name = "sogclr"\n')
    configs = {config.name: config for config in load_grid(path, ["optim.grad_clip=2", "seeds=[7]"]).configs}
    assert list(configs) == ["clip--seed-7", "v1--seed-7", "slow--seed-7"]
    slow = configs["slow--seed-7"]
    assert (slow.optim.lr, slow.optim.grad_clip, slow.optim.warmup_steps) == (5e-4, 2, 5)
    # nothing of debug.toml's rho, and every argument written out
    assert (slow.loss.name, slow.loss.arguments) == ("sogclr", OBJECTIVES["sogclr"].arguments)
    assert slow.data.limit == 64


def test_no_loss_key_is_lost(tmp_path: Path) -> None:
    """debug.toml's loss is disttempnet-v1 with its own arguments."""
    base = load_config(CONFIG_FOLDER / "debug.toml").loss.arguments
    text = 'config = "debug.toml"\nseeds = [1]\n[common]\nloss.tau_max = 0.3\nloss.tau_min = 0.02\n'
    text += '[runs]\na.loss = { name = "disttempnet-v1", rho = 1.5, tau_min = 0.01 }\nb.loss.rho = 2.5\n'
    arguments = [config.loss.arguments for config in load_grid(write(tmp_path, text)).configs]
    defaults = OBJECTIVES["disttempnet-v1"].arguments
    assert arguments[0] == defaults | {"tau_max": 0.3, "tau_min": 0.01, "rho": 1.5}
    assert arguments[1] == defaults | base | {"tau_max": 0.3, "tau_min": 0.02, "rho": 2.5}
    grid = load_grid(write(tmp_path, text), ["vary={loss.tau_max=[0.4, 0.5], optim.lr=[1e-3]}"])
    assert [config.loss.arguments["tau_max"] for config in grid.configs] == [0.4, 0.4, 0.5, 0.5]
    with pytest.raises(UserError, match=r"c--seed-1: .*unknown argument .*'tau_max'"):
        load_grid(write(tmp_path, text + 'c.loss = { name = "clip-constant" }\n'))
    alone = load_grid(write(tmp_path, 'config = "debug.toml"\nseeds = [1]\n[common]\nloss.name = "clip"\n[runs.x]'))
    assert alone.configs[0].loss.model_dump() == {"name": "clip", **OBJECTIVES["clip"].arguments}


def test_values_in_names(tmp_path: Path) -> None:
    text = 'config = "debug.toml"\nseeds = [1]\n[runs]\na.loss = { name = "siglip" }\n'
    vary = 'vary={loss.bias=[-5.0, 2], eval.tasks=[["emoji-concepts"]]}'
    names = [config.name for config in load_grid(write(tmp_path, text), [vary]).configs]
    assert names == ["a--bias--5.0--tasks-emoji-concepts--seed-1", "a--bias-2--tasks-emoji-concepts--seed-1"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (GRID.replace("seeds", "seed"), r"grid.toml: unknown key 'seed'. Did you mean 'seeds'"),
        (GRID.replace("[1, 2]", "[1, 1]"), r"seeds holds a number twice"),
        (GRID.replace("[1, 2]", "[]"), r"grid.toml: key 'seeds'"),
        (GRID.replace("debug.toml", "nope.toml"), r"config: .*nope.toml: no such file"),
        (GRID.replace("data.limit", "data.limt"), r"clip--seed-1: unknown key 'data.limt'. Did you mean 'data.limit'"),
        (GRID.replace("rho", "roh"), r"v1--seed-1: \[loss\] .*'roh'. Did you mean 'rho'"),
        (GRID.replace('"clip" }', '"clap" }'), r"clip--seed-1: .*unknown objective 'clap'. Did you mean 'clip'"),
        (GRID.replace("emoji-concepts", "emoji-concept"), r"clip--seed-1: .*Did you mean 'emoji-concepts'"),
        (GRID.replace("data.limit", "train.seed"), r"common: 'train.seed' cannot be set there; it comes from seeds"),
        (GRID + "[vary]\ntrain.epochs = 3", r"vary: 'train.epochs' is not a list"),
        (GRID + '[runs."v 2"]\n[runs."v-2"]', r"two runs have the name"),
        ("config = 'debug.toml'\nseeds = [1]", r"grid.toml: key 'runs' is missing"),
    ],
)
def test_mistakes_are_named_before_anything_is_trained(text: str, message: str, tmp_path: Path) -> None:
    path = write(tmp_path, text)
    with pytest.raises(UserError, match=message) as caught:
        load_grid(path)
    assert "\n" not in str(caught.value)
    assert [p.name for p in tmp_path.iterdir()] == ["grid.toml"]


def test_a_run_of_the_grid_is_the_same_as_train(finished: Path, tmp_path: Path) -> None:
    config = load_grid(finished).configs[3]
    assert config.name == "v1--seed-2"
    assert train(config.model_copy(update={"out": str(tmp_path)}))
    assert losses(tmp_path / "v1--seed-2") == losses(config.folder)


def test_what_it_leaves(finished: Path) -> None:
    out = finished.parent / "out"
    lines = [json.loads(line) for line in (out / "results.jsonl").read_text(encoding="utf-8").splitlines()]
    assert {(line["name"], line["seed"]) for line in lines} == {
        (f"{run}--seed-{seed}", seed) for run in ("clip", "v1") for seed in (1, 2)
    }
    assert "2 configurations, 2 seeds each" in (out / "report.html").read_text(encoding="utf-8")
    assert (out / "workers.log").read_text() == ""


def test_finished_runs_are_skipped(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = [config.folder for config in load_grid(finished).configs]
    before = {file: file.stat().st_mtime_ns for run in runs for file in run.rglob("*")}
    assert main(["compare", str(finished)]) == 0
    assert {file: file.stat().st_mtime_ns for run in runs for file in run.rglob("*")} == before
    assert "DistTempNet-v1" in capsys.readouterr().out
    assert main(["compare", str(finished), "--list"]) == 0
    assert "4 of 4 runs are done" in capsys.readouterr().out


def test_a_folder_with_another_config_is_an_error(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", str(finished), "optim.lr=0.5"]) == 2
    assert "clip--seed-1: optim.lr was 0.001 and is 0.5 now" in capsys.readouterr().err
    assert main(["compare", str(finished), "data.workers=1", "--list"]) == 0  # no matter to the result
    assert "4 of 4 runs are done" in capsys.readouterr().out


def test_one_command_at_a_time_in_a_folder(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with (finished.parent / "out" / "lock").open("a") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        assert main(["compare", str(finished)]) == 2
        error = capsys.readouterr().err.strip()
        assert "another compare is running here" in error
        assert "\n" not in error
        assert main(["compare", str(finished), "--list"]) == 0
    assert main(["compare", str(finished)]) == 0


def test_an_out_that_cannot_be_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path, out=str(tmp_path / "grid.toml" / "out"))
    assert main(["compare", str(path)]) == 2
    error = capsys.readouterr().err.strip()
    assert "grid.toml is not a folder" in error
    assert "\n" not in error


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


def test_a_run_that_fails_at_its_start_does_not_shorten_the_eta(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(display.time, "monotonic", lambda: now[0])
    shown = display.GridDisplay(4, 0)
    metrics: dict[str, Any] = {}
    shown.began("bad")
    now[0] = 2.0
    shown.ended("bad", "failed", "by hand", 2.0)
    assert "ETA" not in shown._overall(), "nothing is known of the speed yet"
    shown.began("good")
    shown.progress("good", 0, 10, metrics)
    now[0] = 12.0
    shown.progress("good", 5, 10, metrics)
    assert shown._overall().endswith("ETA 0:01:00")  # half a run in 12 s; 2.5 are left
    shown.ended("good", "failed", "half way", 10.0)
    assert shown._overall().endswith("ETA 0:00:48")  # 2 are left


def test_a_fault_of_the_program_is_named_and_logged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(*_: object, **__: object) -> bool:
        raise ZeroDivisionError("by hand\nsecond line")

    monkeypatch.setattr(trainer, "train", broken)
    config = load_grid(write(tmp_path)).configs[0]
    end = worker._run(config, None)  # type: ignore[arg-type]
    assert end == worker.RunEnd("failed", "ZeroDivisionError: by hand")
    assert 'raise ZeroDivisionError("by hand' in capsys.readouterr().err


def wait_for_step(run: Path, step: int, process: subprocess.Popen) -> None:
    for _ in range(3000):
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
        out, err = process.communicate(timeout=60)
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
