"""`disttempnet launch`: prints or submits one script, and refuses in one line."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from disttempnet.cli.main import main
from tests.cli.batch import DEBUG, batch, calls


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
    script.communicate(timeout=300)
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
    script.communicate(timeout=300)
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


def test_data_that_is_not_here_is_said(cluster: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The script is printed all the same: the nodes may have it."""
    (tmp_path / "here").mkdir()
    there = [f"data.train={tmp_path}/there/{{00000..00009}}.tar", "eval.data_root=/nowhere/at/all"]
    there.append("data.validation=s3://b/x.tar")
    assert main(["launch", DEBUG, *there, "--nodes", "1", "--gpus", "1", "--dry-run"]) == 0
    shown = capsys.readouterr()
    assert shown.out.startswith("#!")
    assert shown.err.splitlines() == [
        f"note: data.train = {tmp_path}/there/{{00000..00009}}.tar: not on this machine; the nodes must have it",
        "note: eval.data_root = /nowhere/at/all: not on this machine; the nodes must have it",
    ]
    here = f"data.train={tmp_path}/here/{{00000..00009}}.tar"
    for train in (here, "data.train=embedded:emoji/train"):
        assert main(["launch", DEBUG, train, "--nodes", "1", "--gpus", "1", "--dry-run"]) == 0
        assert capsys.readouterr().err == ""
