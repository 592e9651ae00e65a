"""The batch scripts: the files are what the template gives, and bash does with them what docs/cluster.md says."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from disttempnet.cli.launch import LAUNCH
from disttempnet.cli.slurm import published
from disttempnet.config import CONFIG_FOLDER
from tests.cli.batch import DEBUG, batch, calls
from tests.evaluation.dataroot import SAMPLES, write_data_root

FOLDER = Path(__file__).parents[2] / "slurm"

# Stands for srun: keeps what it was called with, starts the tasks as srun does, and ends with their highest code.


@pytest.mark.parametrize("command", ["train", "evaluate"])
def test_the_files_are_what_the_template_gives(command: str) -> None:
    assert (FOLDER / f"{command}.sbatch").read_text(encoding="utf-8") == published(command)


def test_examples_name_the_corrected_config_where_there_is_one() -> None:
    """The published ρ keeps every τ near its lower bound."""
    named = re.findall(r"configs/(\w+)\.toml", "".join([published("train"), published("evaluate")]))
    named += re.findall(r"disttempnet launch (?!runs/)(\w+)", LAUNCH)  # shipped configs by their bare names
    assert len(named) > 2
    for name in (f"{one}.toml" for one in named if one != "evaluate"):
        assert (CONFIG_FOLDER / name).is_file(), name
        assert not (CONFIG_FOLDER / name.replace(".toml", "_corrected.toml")).exists(), name


@pytest.mark.parametrize("code", [0, 1, 2, 143, 138])
@pytest.mark.parametrize(
    ("command", "given", "called"),
    [
        ("train", [DEBUG, "optim.lr=1e-3"], ["train", DEBUG, "optim.lr=1e-3", "--resume", "auto"]),
        ("evaluate", ["runs/a b", "--data-root", "/data"], ["evaluate", "runs/a b", "--data-root", "/data"]),
    ],
    ids=["train", "evaluate"],
)
def test_only_what_was_told_to_save_is_requeued(
    command: str, given: list[str], called: list[str], code: int, cluster: Path
) -> None:
    text = published(command)
    assert "#SBATCH --requeue\n" in text
    assert "#SBATCH --signal=USR1@120\n" in text
    script = batch(text, *given, FAKE_CODE=str(code))
    printed, _ = script.communicate(timeout=300)
    assert script.returncode == code, printed
    (call,) = calls(cluster)
    assert call["arguments"][-len(called) - 2 :] == ["-m", "disttempnet", *called]
    assert call["cpus"] == "8"
    requeued = (cluster / "scontrol").read_text() if (cluster / "scontrol").exists() else ""
    assert requeued == ("requeue 4711\n" if code == 138 else "")


def test_an_array_is_a_run_a_seed(cluster: Path) -> None:
    for command, arguments in (("train", [DEBUG]), ("evaluate", ["runs/demo", "--tasks", "emoji-concepts"])):
        script = batch(published(command), *arguments, SLURM_ARRAY_TASK_ID="3", FAKE_CODE="0")
        printed, _ = script.communicate(timeout=300)
        assert script.returncode == 0, printed
    train, evaluate = (call["arguments"] for call in calls(cluster))
    assert train[-5:] == [DEBUG, "name=demo--seed-3", "train.seed=3", "--resume", "auto"]
    assert evaluate[-4:] == ["evaluate", "runs/demo--seed-3", "--tasks", "emoji-concepts"]


def test_evaluate_asks_for_a_run(cluster: Path) -> None:
    script = batch(published("evaluate"))
    printed, _ = script.communicate(timeout=300)
    assert script.returncode
    assert "which run? give its folder" in printed


def told_to_stop(script: subprocess.Popen[str], cluster: Path, written: Path, lines: int) -> str:
    """What a script prints that gets SIGUSR1 when its tasks have written so many lines; it must requeue its job."""
    deadline = time.monotonic() + 300
    while not (written.exists() and written.read_text().count("\n") >= lines):
        assert time.monotonic() < deadline
        assert script.poll() is None, script.communicate()
        time.sleep(0.02)
    subprocess.run(["kill", "-USR1", *(cluster / "pids").read_text().split()], check=True)
    printed, _ = script.communicate(timeout=300)
    assert script.returncode == 138, printed
    assert (cluster / "scontrol").read_text() == "requeue 4711\n"
    return printed


@pytest.mark.slow
def test_a_job_that_is_told_to_stop_is_requeued_and_goes_on(cluster: Path) -> None:
    """The whole way: two tasks, SIGUSR1, checkpoint, code 138, scontrol requeue, the same script once more."""
    text = published("train")
    wanted = [DEBUG, "train.epochs=20", "train.stop_after_steps=100", "eval.tasks=[]", "train.keep=1"]
    script = batch(text, *wanted, PYTHON=sys.executable)
    metrics = cluster / "runs" / "debug" / "metrics.jsonl"
    told_to_stop(script, cluster, metrics, lines=6)
    stopped = len(metrics.read_text().splitlines())
    assert stopped < 100

    again = batch(text, *wanted, PYTHON=sys.executable)
    printed, _ = again.communicate(timeout=300)
    assert again.returncode == 0, printed
    assert f"from step {stopped}" in printed
    assert [json.loads(line)["step"] for line in metrics.read_text().splitlines()] == list(range(1, 101))


@pytest.mark.slow
def test_an_evaluation_that_is_told_to_stop_is_requeued_and_goes_on(cluster: Path) -> None:
    """Two tasks, SIGUSR1 between the first and the last of forty data sets, and the same script once more."""
    (cluster / "root").mkdir()
    write_data_root(cluster / "root")
    wanted = ["open_clip:demo-vit-32", "--data-root", "root", "--out", "out", "--batch", "2"]
    cache = {"PYTHON": sys.executable, "DISTTEMPNET_CACHE": str(cluster / "cache")}
    script = batch(published("evaluate"), *wanted, **cache)
    results = cluster / "out" / "eval_results.jsonl"
    printed = told_to_stop(script, cluster, results, lines=2)
    finished = results.read_text().splitlines()
    assert 1 < len(finished) < len(SAMPLES)
    assert "Traceback" not in printed

    again = batch(published("evaluate"), *wanted, **cache)
    printed, _ = again.communicate(timeout=300)
    assert again.returncode == 0, printed
    lines = results.read_text().splitlines()
    assert lines[: len(finished)] == finished
    assert {line["key"]: line["samples"] for line in map(json.loads, lines)} == SAMPLES
