"""Starting on several processes: where a process stands, who is met where, and how all end when one does."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch.distributed as dist

from disttempnet.cli.main import main
from disttempnet.config import CONFIG_FOLDER
from disttempnet.distributed import collectives
from disttempnet.distributed.launcher import Launch, first_host, gpu_of, launched, local_processes
from disttempnet.errors import UserError
from disttempnet.training.trainer import Trainer
from tests.distributed.srun import Srun, variables

DEBUG = str(CONFIG_FOLDER / "debug.toml")
SOON = 120.0  # seconds from the start of a run, on a busy machine; the ranks wait for each other for ten minutes

# ---- what the launcher says ----


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("node01", "node01"),
        ("node[01-04,07]", "node01"),
        ("node[07,01-04]", "node07"),
        ("gpu-a[3]", "gpu-a3"),
        ("n1,n2", "n1"),
        ("login,node[1-3]", "login"),
        ("rack[0-1]node[08-12],x", "rack0node08"),
        ("n[1-2].cluster.org,n9", "n1.cluster.org"),
        ("", ""),
    ],
)
def test_the_first_host_of_a_node_list(nodes: str, first: str) -> None:
    assert first_host(nodes) == first


def test_srun_tells_where_a_task_stands() -> None:
    environment = variables(5, 8, job=123) | {"SLURM_JOB_NODELIST": "node[01-04]", "SLURM_LOCALID": "1"}
    assert launched(environment) == Launch("srun", 5, 8, 1, "node01", 10_123)
    other = launched(environment | {"SLURM_STEP_ID": "1"})
    assert other is not None
    assert other.port != 10_123, "two steps of a job at a time"
    high = launched(environment | {"SLURM_JOB_ID": "4294967293"})
    assert high is not None
    assert 10_000 <= high.port < 30_000
    given = environment | {"MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "999"}
    assert launched(given) == Launch("srun", 5, 8, 1, "10.0.0.1", 999)
    assert Launch("srun", 5, 8, 1, "10.0.0.1", 999).endpoint == "10.0.0.1:999"
    assert Launch("srun", 5, 8, 1, "fd00::7", 999).endpoint == "[fd00::7]:999"


def test_a_step_may_be_smaller_than_its_job() -> None:
    environment = variables(0, 8, job=1) | {"SLURM_JOB_NODELIST": "node[01-04]"}
    step = environment | {"SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_NODELIST": "node03"}
    assert launched(step) == Launch("srun", 0, 2, 0, "node03", 10_001)
    assert launched(environment | {"SLURM_STEP_NUM_TASKS": "1"}) is None
    assert launched(variables(0, 1, job=1)) is None


def test_torchrun_comes_before_slurm() -> None:
    torchrun = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "MASTER_ADDR": "a", "MASTER_PORT": "7"}
    assert launched(variables(0, 2, job=1) | torchrun) == Launch("torchrun", 3, 4, 1, "a", 7)
    assert launched({}) is None
    with pytest.raises(UserError, match="start with torchrun"):
        launched({"RANK": "0", "WORLD_SIZE": "2"})
    with pytest.raises(UserError, match="start with srun"):
        launched({"SLURM_PROCID": "0", "SLURM_NTASKS": "2", "SLURM_STEP_ID": "0"})
    with pytest.raises(UserError, match="WORLD_SIZE=two, which is not a number"):
        launched(torchrun | {"WORLD_SIZE": "two"})


OPEN_MPI = {
    "OMPI_COMM_WORLD_RANK": "1",
    "OMPI_COMM_WORLD_SIZE": "2",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
    "PMIX_NAMESPACE": "prterun-host-1234@1",
}
MPICH = {"PMI_RANK": "3", "PMI_SIZE": "4", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "2"}


def test_mpirun_tells_which_rank_a_process_is() -> None:
    first, second = (
        launched(OPEN_MPI | {"OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_LOCAL_RANK": "0"}),
        launched(OPEN_MPI),
    )
    assert first is not None
    assert second == Launch("mpirun", 1, 2, 1, "127.0.0.1", first.port), "all of a job meet at one port"
    assert 10_000 <= first.port < 30_000
    other = launched(OPEN_MPI | {"PMIX_NAMESPACE": "prterun-host-1235@1"})
    assert other is not None
    assert other.port != first.port, "two jobs on a machine"
    task = variables(0, 2, job=1) | {"SLURM_JOB_NODELIST": "node[01-02]"}  # of the daemon that started it
    assert launched(task | OPEN_MPI) == second
    assert launched(OPEN_MPI | {"OMPI_COMM_WORLD_SIZE": "1", "OMPI_COMM_WORLD_RANK": "0"}) is None
    with pytest.raises(UserError, match=r"PMI_SIZE=4 on several nodes, but MASTER_ADDR is not set: export MASTER_ADDR"):
        launched(MPICH)
    met = {"MASTER_ADDR": "node01", "MASTER_PORT": "29500"}
    assert launched(MPICH | met) == Launch("mpirun", 3, 4, 1, "node01", 29_500)
    assert launched(variables(2, 4, job=5) | MPICH | met) == Launch("srun", 2, 4, 2, "node01", 29_500), (
        "srun --mpi=pmi2"
    )


@pytest.mark.parametrize(
    "environment",
    [
        {"RANK": "", "WORLD_SIZE": "", "MASTER_ADDR": "", "MASTER_PORT": "", "SLURM_PROCID": "", "PMI_RANK": ""},
        {"RANK": "0", "WORLD_SIZE": "1"},
        {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "", "MASTER_PORT": ""},
        {"RANK": "0"},
        {"WORLD_SIZE": "1"},
        {"PMI_RANK": "0", "PMI_SIZE": "1"},
    ],
)
def test_empty_variables_and_one_process_are_no_launch(environment: dict[str, str]) -> None:
    assert launched(environment) is None


def test_how_many_share_a_nodes_cores() -> None:
    for environment, count in [({}, 1), ({"LOCAL_WORLD_SIZE": ""}, 1), ({"LOCAL_WORLD_SIZE": "8"}, 8), (MPICH, 2)]:
        assert local_processes(environment) == count
    with pytest.raises(UserError, match="LOCAL_WORLD_SIZE=0: must be a whole number from 1"):
        local_processes({"LOCAL_WORLD_SIZE": "0"})


TORCHRUN = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "MASTER_ADDR": "a", "MASTER_PORT": "7"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE=0: must be a whole number from 1 to 1,000,000"),
        ({"WORLD_SIZE": "-1"}, "WORLD_SIZE=-1, which is not a number"),
        ({"WORLD_SIZE": "9" * 5000}, "which is not a number"),
        ({"MASTER_PORT": "99999"}, "MASTER_PORT=99999: must be a whole number from 1 to 65,535"),
        ({"MASTER_PORT": "0"}, "MASTER_PORT=0: must be"),
        ({"RANK": "2"}, "the environment of torchrun has rank 2 of 2: ranks count from 0"),
        ({"RANK": ""}, "one of RANK and WORLD_SIZE is set, the other is not"),
        ({"WORLD_SIZE": ""}, "one of RANK and WORLD_SIZE is set, the other is not"),
        ({"MASTER_ADDR": ""}, "start with torchrun"),
    ],
)
def test_what_cannot_be_is_named(changes: dict[str, str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        launched(TORCHRUN | changes)


def test_a_command_of_the_batch_script_is_alone() -> None:
    """SLURM numbers the script's own process too, as the first of all tasks of the job; but it is in no step."""
    script = variables(0, 8, job=1)
    del script["SLURM_STEP_ID"]
    assert launched(script) is None


def test_every_process_has_a_gpu_of_its_own() -> None:
    second = Launch("srun", 3, 4, 1, "a", 1)
    assert gpu_of(None, 8) == 0
    assert gpu_of(second, 2) == 1
    assert gpu_of(second, 1) == 0, "--gpus-per-task: each task sees its own only"
    with pytest.raises(UserError, match="local rank 1 has no GPU: 1 are visible"):
        gpu_of(second._replace(launcher="torchrun"), 1)


# ---- runs ----


def trained(out: Path, *more: str) -> list[str]:
    return ["train", DEBUG, f"out={out}", "eval.tasks=[]", *more]


def test_srun_trains_and_only_rank_0_speaks(tmp_path: Path) -> None:
    with Srun(2, tmp_path, main, trained(tmp_path / "two", "train.stop_after_steps=3")) as ranks:
        first, second = ranks.wait()
    assert (first.code, second.code) == (0, 0), first.printed + second.printed
    assert second.printed == ""
    lines = first.printed.splitlines()
    assert lines[0].startswith("2 processes on 1 node (srun), CPU, gloo, timeout 10 minutes; rank 0 is cpu on ")
    assert lines[1] == "weights of both towers: random (model.pretrained names others)"
    assert lines[2] == "debug: 320 samples an epoch, 2 epochs of 10 steps, global batch 32 = 2 × 16"
    assert main(trained(tmp_path / "one", "train.stop_after_steps=3")) == 0
    two, one = ((tmp_path / name / "debug" / "metrics.jsonl").read_text().splitlines() for name in ("two", "one"))
    assert [float(line.split('"loss": ')[1].split(",")[0]) for line in two] == pytest.approx(
        [float(line.split('"loss": ')[1].split(",")[0]) for line in one], rel=2e-4
    )


def is_rank(rank: int) -> bool:
    return os.environ["SLURM_PROCID"] == str(rank)


def dies_in_step_3(culprit: int, how: str, arguments: list[str]) -> int:
    """`disttempnet train …`, where one rank comes to an end in its third step."""
    step = Trainer.train_step

    def train_step(self: Trainer, batch: object) -> object:
        if self.step == 2 and is_rank(culprit):
            if how == "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            raise UserError("the disk is full") if how == "user" else ValueError("boom")
        return step(self, batch)  # type: ignore[arg-type]

    Trainer.train_step = train_step  # type: ignore[assignment, method-assign]
    return main(arguments)


REASONS = {
    "killed": "ended without a message: killed, or out of memory",
    "raises": "failed: ValueError: boom",
    "user": "failed: the disk is full",
}


@pytest.mark.parametrize("how", REASONS)
@pytest.mark.parametrize(("tasks", "culprit"), [(2, 0), (4, 3)])
def test_a_rank_that_dies_ends_all_with_one_line(tasks: int, culprit: int, how: str, tmp_path: Path) -> None:
    with Srun(tasks, tmp_path, dies_in_step_3, culprit, how, trained(tmp_path, "train.stop_after_steps=6")) as ranks:
        ends = ranks.wait()
    assert ends[culprit].code == {"killed": -9, "raises": 1, "user": 2}[how]
    if how == "raises":
        assert "ValueError: boom" in ends[culprit].printed
        assert "Traceback" in ends[culprit].printed, "a fault of the program stays loud"
    for rank, end in enumerate(ends):
        if rank != culprit:
            assert end.code == 2
            assert end.seconds < SOON
            said = end.printed.splitlines()
            assert said[-1].startswith(f"disttempnet: rank {culprit} on ")
            assert said[-1].endswith(REASONS[how])
            assert len(said) == 1 or rank == 0, said


def sleeps_while_another_dies(arguments: list[str]) -> int:
    """Rank 1 is killed while rank 0 is where no error reaches it, as in a collective of NCCL."""

    def train_step(self: Trainer, batch: object) -> None:
        if is_rank(1):
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(600)

    Trainer.train_step = train_step  # type: ignore[assignment, method-assign]
    return main(arguments)


def test_a_rank_that_is_stuck_is_ended_too(tmp_path: Path) -> None:
    with Srun(2, tmp_path, sleeps_while_another_dies, trained(tmp_path)) as ranks:
        ends = ranks.wait()
    assert [end.code for end in ends] == [2, -9]
    assert ends[0].seconds < SOON
    assert ends[0].printed.splitlines()[-1].startswith("disttempnet: rank 1 on ")


def never_gets_out(arguments: list[str]) -> int:
    """Rank 0 fails, and then hangs where it leaves the group."""
    collectives.LEAVE_SECONDS = 5.0
    if is_rank(0):
        dist.destroy_process_group = lambda: time.sleep(600)
    return dies_in_step_3(0, "user", arguments)


def test_a_failed_rank_that_hangs_at_its_end_is_ended(tmp_path: Path) -> None:
    with Srun(2, tmp_path, never_gets_out, trained(tmp_path)) as ranks:
        ends = ranks.wait()
    assert [end.code for end in ends] == [1, 2]
    assert ends[1].printed.splitlines()[-1].endswith(REASONS["user"])
    assert "Timeout" in ends[0].printed, "the stacks say where it hung"


def waits_for_ever(arguments: list[str]) -> int:
    """Rank 1's main thread does not end its third step, while its process runs and sends beats."""
    step = Trainer.train_step

    def train_step(self: Trainer, batch: object) -> object:
        while self.step == 2 and is_rank(1):
            time.sleep(1)
        return step(self, batch)  # type: ignore[arg-type]

    Trainer.train_step = train_step  # type: ignore[assignment, method-assign]
    return main(arguments)


@pytest.mark.slow
def test_a_rank_in_an_endless_loop_is_named_and_not_the_one_that_waits(tmp_path: Path) -> None:
    with Srun(2, tmp_path, waits_for_ever, trained(tmp_path, "train.timeout_minutes=0.3")) as ranks:
        ends = ranks.wait()
    assert [end.code for end in ends] == [2, 2], "\n".join(end.printed for end in ends)
    for end in ends:
        line = end.printed.splitlines()[-1]
        assert line.startswith("disttempnet: rank 1 on ")
        assert "has kept the others waiting for 0.3 minutes: it is in an endless loop" in line


def never_comes(arguments: list[str]) -> int:
    return 3 if is_rank(1) else main(arguments)


def test_processes_that_do_not_meet_say_so(tmp_path: Path) -> None:
    with Srun(2, tmp_path, never_comes, trained(tmp_path, "train.timeout_minutes=0.03")) as ranks:
        ends = ranks.wait()
    assert [end.code for end in ends] == [2, 3]
    (line,) = ends[0].printed.splitlines()
    assert line.startswith("disttempnet: rank 0 did not meet all 2 processes at localhost:")


# ---- signals ----


def descendants(pid: int) -> list[int]:
    children = [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    return children + [one for child in children for one in descendants(child)]


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="needs /proc")
@pytest.mark.parametrize(("number", "code"), [(signal.SIGUSR1, 138), (signal.SIGTERM, 143)])
def test_a_signal_to_every_process_of_the_job_saves_and_ends(number: int, code: int, tmp_path: Path) -> None:
    """As SLURM sends it: loader workers get it too. SIGUSR1: start me again; SIGTERM: do not."""
    arguments = trained(tmp_path, "data.workers=1", "train.epochs=400", "train.keep=1")
    with Srun(2, tmp_path, main, arguments) as ranks:
        metrics = tmp_path / "debug" / "metrics.jsonl"
        wait_until(lambda: metrics.exists() and len(metrics.read_text().splitlines()) > 12, ranks)
        pids = [process.pid or 0 for process in ranks.processes]
        for pid in [*(one for parent in pids for one in descendants(parent)), *pids]:
            os.kill(pid, number)
        ends = ranks.wait()
    assert [end.code for end in ends] == [code, code], "\n".join(end.printed for end in ends)
    step = len(metrics.read_text().splitlines())
    assert f"stopped at step {step}: continue with --resume auto" in ends[0].printed
    assert (tmp_path / "debug" / "checkpoints" / f"step-{step:08d}").is_dir()
    assert ends[1].printed == ""


def wait_until(condition: Callable[[], bool], ranks: Srun) -> None:
    deadline = time.monotonic() + 300
    while not condition():
        assert time.monotonic() < deadline, ranks.printed()
        assert all(process.exitcode is None for process in ranks.processes), ranks.printed()
        time.sleep(0.02)
