"""Two nodes for real: network namespaces with an address each, joined by a virtual cable."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from disttempnet.cli.main import main
from disttempnet.config import CONFIG_FOLDER
from tests.distributed.srun import variables

DEBUG = str(CONFIG_FOLDER / "debug.toml")
ADDRESSES = ("10.231.77.1", "10.231.77.2")


def ip(*words: str) -> subprocess.CompletedProcess:
    return subprocess.run(["ip", *words], capture_output=True, text=True)


@pytest.fixture
def nodes() -> Iterator[list[str]]:
    """Names of two namespaces whose interfaces `cable` see each other."""
    if shutil.which("ip") is None:
        pytest.skip("two nodes need `ip` (iproute2)")
    names = [f"dtn-{os.getpid()}-{number}" for number in (0, 1)]
    try:
        for name in names:
            made = ip("netns", "add", name)
            if made.returncode:
                pytest.skip(f"network namespaces are not permitted here: {made.stderr.strip()}")
        first, second = names
        steps = [["link", "add", "cable", "netns", first, "type", "veth", "peer", "name", "cable", "netns", second]]
        for name, address in zip(names, ADDRESSES, strict=True):
            steps += [["-n", name, "addr", "add", f"{address}/24", "dev", "cable"]]
            steps += [["-n", name, "link", "set", device, "up"] for device in ("cable", "lo")]
        for step in steps:
            done = ip(*step)
            assert done.returncode == 0, (step, done.stderr)
        yield names
    finally:
        for name in names:
            ip("netns", "del", name)


def losses(run: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def start(node: str, number: int, out: Path, *more: str, srun: bool = False) -> subprocess.Popen:
    """torchrun as called on one of two nodes, or a task of srun. Both nodes have the machine's host name, which is
    no address of theirs: so torchrun is told which it is, and gloo which interface, as a name that resolves would."""
    torchrun = ["-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1"]
    torchrun += ["--rdzv-backend", "c10d", "--rdzv-endpoint", f"{ADDRESSES[0]}:29431", "--rdzv-id", "nodes"]
    torchrun += ["--local-addr", ADDRESSES[number], "--rdzv-conf", f"is_host={int(number == 0)},join_timeout=120"]
    task = variables(number, 2, job=os.getpid()) | {"SLURM_JOB_NODELIST": ",".join(ADDRESSES), "SLURM_LOCALID": "0"}
    train = ["-m", "disttempnet", "train", DEBUG, f"out={out}", "eval.tasks=[]", *more]
    return subprocess.Popen(
        ["ip", "netns", "exec", node, sys.executable, *([] if srun else torchrun), *train],
        env={**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "cable", **(task if srun else {})},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["torchrun", "srun"])
def test_two_nodes_meet_and_train_the_same_curve(launcher: str, nodes: list[str], tmp_path: Path) -> None:
    out, srun = tmp_path / "two", launcher == "srun"
    both = [start(node, number, out, "train.stop_after_steps=4", srun=srun) for number, node in enumerate(nodes)]
    try:
        printed = [process.communicate(timeout=300)[0] for process in both]
    finally:
        for process in both:
            process.kill()
    assert [process.returncode for process in both] == [0, 0], printed
    assert sum(f"2 processes on 1 node ({launcher}), CPU, gloo" in text for text in printed) == 1, (
        "one host name, though"
    )
    assert main(["train", DEBUG, f"out={tmp_path / 'one'}", "eval.tasks=[]", "train.stop_after_steps=4"]) == 0
    assert losses(tmp_path / "two" / "debug") == pytest.approx(losses(tmp_path / "one" / "debug"), rel=2e-4)


@pytest.mark.slow
def test_a_node_that_fails_ends_the_other(nodes: list[str], tmp_path: Path) -> None:
    """The process of one node is killed; the other node ends soon, and says which was lost."""
    long = ["train.epochs=400", "train.keep=1"]
    both = [start(node, number, tmp_path, *long) for number, node in enumerate(nodes)]
    try:
        metrics = tmp_path / "debug" / "metrics.jsonl"
        for _ in range(2400):
            if metrics.exists() and len(metrics.read_text().splitlines()) > 3:
                break
            try:
                both[0].wait(0.1)
            except subprocess.TimeoutExpired:
                continue
            raise AssertionError(both[0].communicate()[0])
        kill_workers(both[1].pid)
        printed = [process.communicate(timeout=300)[0] for process in both]
    finally:
        for process in both:
            process.kill()
    assert all(process.returncode for process in both)
    assert any("ended without a message: killed" in text for text in printed), printed


def kill_workers(torchrun: int) -> None:
    """SIGKILL to the children of a torchrun."""
    children = Path(f"/proc/{torchrun}/task/{torchrun}/children").read_text().split()
    subprocess.run(["kill", "-KILL", *children], check=True)
