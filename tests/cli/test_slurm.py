"""The batch scripts: the files are what the template gives, and bash does with them what docs/cluster.md says."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from disttempnet.cli.launch import LAUNCH
from disttempnet.cli.main import main
from disttempnet.cli.slurm import published
from disttempnet.config import CONFIG_FOLDER
from tests.evaluation.dataroot import SAMPLES, write_data_root

FOLDER = Path(__file__).parents[2] / "slurm"
DEBUG = str(CONFIG_FOLDER / "debug.toml")

# Stands for srun: keeps what it was called with, starts the tasks as srun does, and ends with their highest code.
SRUN = """
import json, os, subprocess, sys
with open("srun.jsonl", "a") as file:
    print(json.dumps({"arguments": sys.argv[1:], "cpus": os.environ["SRUN_CPUS_PER_TASK"]}), file=file)
if "FAKE_CODE" in os.environ:
    sys.exit(int(os.environ["FAKE_CODE"]))
words = [word for word in sys.argv[1:] if not word.startswith(("--kill", "--wait"))]
tasks = int(os.environ["SLURM_NTASKS"])
places = [{"SLURM_PROCID": str(i), "SLURM_LOCALID": str(i), "SLURM_STEP_ID": "0"} for i in range(tasks)]
running = [subprocess.Popen(words, env={**os.environ, **place}) for place in places]
open("pids", "w").write(" ".join(str(one.pid) for one in running))
codes = [one.wait() for one in running]
sys.exit(max(128 - code if code < 0 else code for code in codes))
"""
SCONTROL = 'import sys; open("scontrol", "a").write(" ".join(sys.argv[1:]) + "\\n")'
SBATCH = 'import sys; open("submitted", "w").write(sys.stdin.read()); print("Submitted batch job 7")'


@pytest.mark.parametrize("command", ["train", "evaluate"])
def test_the_files_are_what_the_template_gives(command: str) -> None:
    assert (FOLDER / f"{command}.sbatch").read_text(encoding="utf-8") == published(command)


def test_examples_name_the_corrected_config_where_there_is_one() -> None:
    """The published ρ keeps every τ near its lower bound."""
    named = re.findall(r"configs/(\w+\.toml)", "".join([LAUNCH, published("train"), published("evaluate")]))
    assert len(named) > 2
    for name in named:
        assert (CONFIG_FOLDER / name).is_file()
        assert not (CONFIG_FOLDER / name.replace(".toml", "_corrected.toml")).exists(), name


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder, with commands on the path that stand for SLURM's."""
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL), ("sbatch", SBATCH)):
        command = tmp_path / "bin" / name
        command.parent.mkdir(exist_ok=True)
        command.write_text(f"#!{sys.executable}\n{text}", encoding="utf-8")
        command.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def batch(text: str, *arguments: str, **variables: str) -> subprocess.Popen:
    """Run a script as SLURM runs it, on one node with two tasks."""
    job = {"SLURM_JOB_ID": "4711", "SLURM_JOB_NAME": "demo", "SLURM_CPUS_PER_TASK": "8", "SLURM_NTASKS": "2"}
    environment = {**os.environ, **job, "SLURM_JOB_NODELIST": "localhost", "OMP_NUM_THREADS": "1", **variables}
    Path("job.sbatch").write_text(text, encoding="utf-8")
    return subprocess.Popen(["bash", "job.sbatch", *arguments], env=environment, stdout=-1, stderr=-2, text=True)


def calls(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "srun.jsonl").read_text().splitlines()]


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
    printed, _ = script.communicate(timeout=60)
    assert script.returncode == code, printed
    (call,) = calls(cluster)
    assert call["arguments"][-len(called) - 2 :] == ["-m", "disttempnet", *called]
    assert call["cpus"] == "8"
    requeued = (cluster / "scontrol").read_text() if (cluster / "scontrol").exists() else ""
    assert requeued == ("requeue 4711\n" if code == 138 else "")


def test_an_array_is_a_run_a_seed(cluster: Path) -> None:
    for command, arguments in (("train", [DEBUG]), ("evaluate", ["runs/demo", "--tasks", "emoji-concepts"])):
        script = batch(published(command), *arguments, SLURM_ARRAY_TASK_ID="3", FAKE_CODE="0")
        printed, _ = script.communicate(timeout=60)
        assert script.returncode == 0, printed
    train, evaluate = (call["arguments"] for call in calls(cluster))
    assert train[-5:] == [DEBUG, "name=demo--seed-3", "train.seed=3", "--resume", "auto"]
    assert evaluate[-4:] == ["evaluate", "runs/demo--seed-3", "--tasks", "emoji-concepts"]


def test_evaluate_asks_for_a_run(cluster: Path) -> None:
    script = batch(published("evaluate"))
    printed, _ = script.communicate(timeout=60)
    assert script.returncode
    assert "which run? give its folder" in printed


def test_launch_prints_or_submits_one_run(cluster: Path, capsys: pytest.CaptureFixture[str]) -> None:
    loss = 'loss={name="siglip", bias=-5.0}'
    wanted = ["launch", DEBUG, loss, "name=mine", "--nodes", "1", "--gpus", "2", "--partition", "gpu", "--time", "2-0"]
    assert main([*wanted, "--account", "a1", "--dry-run"]) == 0
    text = capsys.readouterr().out
    options = {line.removeprefix("#SBATCH ") for line in text.splitlines() if line.startswith("#SBATCH")}
    assert options >= {
        "--job-name=mine", "--nodes=1", "--ntasks-per-node=2", "--gpus-per-node=2", "--cpus-per-task=2",
        "--partition=gpu", "--account=a1", "--time=2-0", "--requeue", "--signal=USR1@120",
    }  # fmt: skip
    assert not any("array" in option for option in options)
    assert not (cluster / "submitted").exists()
    script = batch(text, FAKE_CODE="0")
    script.communicate(timeout=60)
    expected = [sys.executable, "-m", "disttempnet", "train", DEBUG, loss, "name=mine", "--resume", "auto"]
    assert calls(cluster)[0]["arguments"][2:] == expected, "quoting survives the shell"

    assert main([*wanted, "--account", "a1"]) == 0
    assert capsys.readouterr().out == "Submitted batch job 7\n"
    assert (cluster / "submitted").read_text() == text


def test_launch_of_seeds_is_an_array(cluster: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["launch", DEBUG, "name=mine", "--dry-run", "--seeds", "5", "7", "train.epochs=3"]) == 0
    text = capsys.readouterr().out
    assert "#SBATCH --array=5,7\n" in text
    script = batch(text, SLURM_ARRAY_TASK_ID="7", SLURM_JOB_NAME="mine", FAKE_CODE="0")
    script.communicate(timeout=60)
    assert calls(cluster)[0]["arguments"][6:] == [
        DEBUG, "train.epochs=3", "name=mine--seed-7", "train.seed=7", "--resume", "auto",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["optim.lrr=1"], "Did you mean 'optim.lr'"),
        (["--nodes", "3"], "3 nodes × 2 GPUs are 6 processes, which cannot share data.lanes = 8 evenly"),
        (["train.accumulate=5"], "train.accumulate = 5 is more than the 4 rows of a process"),
        (["loss.name=sogclrr"], "Did you mean 'sogclr'?"),
        (["loss.rhoo=1"], "[loss]"),
        (["--nodes", "0"], "--nodes: must be a whole number from 1 to 100,000 (got 0)"),
        (["--time", "tomorrow"], "--time tomorrow: give minutes"),
        (["--partition", "a\nb"], "is not a valid SLURM name"),
        (["--seeds", "1", "1"], "--seeds 1 1: give different integers"),
        (["--seeds", "one"], "--seeds: must be a whole number from 0"),
        (["--seeds", "1", "--nodes", "4", "train.seed=3"], "give one"),
        ([], "sbatch was not found"),
    ],
)
def test_launch_refuses_in_one_line(
    arguments: list[str], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    assert main(["launch", DEBUG, *arguments]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line


def test_launch_passes_on_why_sbatch_refuses(cluster: Path, capsys: pytest.CaptureFixture[str]) -> None:
    refusal = "import sys; print('sbatch: error: invalid partition', file=sys.stderr); sys.exit(1)"
    (cluster / "bin" / "sbatch").write_text(f"#!{sys.executable}\n{refusal}", encoding="utf-8")
    assert main(["launch", DEBUG]) == 2
    assert "sbatch refused the script: sbatch: error: invalid partition" in capsys.readouterr().err


def told_to_stop(script: subprocess.Popen[str], cluster: Path, written: Path, lines: int) -> str:
    """What a script prints that gets SIGUSR1 when its tasks have written so many lines; it must requeue its job."""
    deadline = time.monotonic() + 240
    while not (written.exists() and written.read_text().count("\n") >= lines):
        assert time.monotonic() < deadline
        assert script.poll() is None, script.communicate()
        time.sleep(0.02)
    subprocess.run(["kill", "-USR1", *(cluster / "pids").read_text().split()], check=True)
    printed, _ = script.communicate(timeout=240)
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
    printed, _ = again.communicate(timeout=240)
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
    printed, _ = again.communicate(timeout=240)
    assert again.returncode == 0, printed
    lines = results.read_text().splitlines()
    assert lines[: len(finished)] == finished
    assert {line["key"]: line["samples"] for line in map(json.loads, lines)} == SAMPLES
