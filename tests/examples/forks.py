"""Processes that run an example, without the seconds that its imports take: forks of a server that has made them.

`Server().run("ddp.py", "--epochs", 1, processes=2)` starts what torchrun starts, and returns what was printed. As a
program this file is the server: it reads jobs from standard input, a line of JSON each, and answers with exit codes.
"""

from __future__ import annotations

import json
import os
import runpy
import selectors
import socket
import subprocess
import sys
import tempfile
import traceback
from pathlib import Path

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"
TIMEOUT_S = 300.0


def environment() -> dict[str, str]:
    """Return the variables of an example's process: this checkout's package, one thread, no network."""
    paths = [str(ROOT / "src"), os.environ.get("PYTHONPATH", "")]
    return os.environ | {"PYTHONPATH": os.pathsep.join(paths), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}


class Server:
    """The server, started at the first run."""

    def __init__(self) -> None:
        self.process: subprocess.Popen[str] | None = None

    def run(self, example: str, *arguments: object, processes: int = 1, torchrun: bool = False) -> str:
        """Return standard output and error of the first of the processes.

        Args:
            example: a file of examples/, with its arguments.
            processes: how many.
            torchrun: set torchrun's variables for one process too.

        Raises:
            AssertionError: one of them fails, or they take too long.
        """
        if self.process is None:
            self.process = subprocess.Popen(
                [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
                env=environment(), start_new_session=True,
            )  # fmt: skip
        assert self.process.stdin is not None
        with tempfile.TemporaryDirectory() as folder:
            logs = [Path(folder, str(rank)) for rank in range(processes)]
            ranks = torchrun_variables(processes) if torchrun or processes > 1 else [{}]
            job = {
                "argv": [str(EXAMPLES / example), *map(str, arguments)],
                "logs": list(map(str, logs)),
                "ranks": ranks,
            }
            self.process.stdin.write(json.dumps(job) + "\n")
            self.process.stdin.flush()
            codes = self._answer()
            texts = [log.read_text(encoding="utf-8") if log.exists() else "" for log in logs]
        assert codes == [0] * processes, f"{example} {arguments}: exit codes {codes}\n" + "\n---\n".join(texts)
        return texts[0]

    def _answer(self) -> list[int]:
        assert self.process is not None
        assert self.process.stdout is not None
        with selectors.DefaultSelector() as selector:
            selector.register(self.process.stdout, selectors.EVENT_READ)
            answered = selector.select(TIMEOUT_S)
        line = self.process.stdout.readline() if answered else ""
        if not line:
            self.close()
        return json.loads(line or "[]")

    def close(self) -> None:
        if self.process is not None:
            os.killpg(self.process.pid, 9)
            self.process.communicate()
            self.process = None


def torchrun_variables(processes: int) -> list[dict[str, str]]:
    """Return what torchrun tells each process."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    group = {"WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes), "TORCHELASTIC_RUN_ID": "examples"}
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "GLOO_SOCKET_IFNAME": "lo"}
    return [{"RANK": str(rank), "LOCAL_RANK": str(rank), **group, **place} for rank in range(processes)]


def serve() -> None:
    """Import what the examples import, then start processes until standard input ends."""
    import disttempnet.evaluation  # noqa: F401  first: it lets torchvision load beside a CPU-only torch

    import accelerate  # isort: skip  # noqa: F401
    import lightning_fabric  # isort: skip  # noqa: F401
    import transformers.trainer  # isort: skip  # noqa: F401

    for line in sys.stdin:
        job = json.loads(line)
        started = [fork(job["argv"], *one) for one in zip(job["logs"], job["ranks"], strict=True)]
        codes = [os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) for process in started]
        print(json.dumps(codes), flush=True)


def fork(argv: list[str], log: str, variables: dict[str, str]) -> int:
    """Start a process that runs a script, and return its number."""
    process = os.fork()
    if process:
        return process
    code = 1
    try:
        file = os.open(log, os.O_WRONLY | os.O_CREAT)
        for stream in (sys.stdout, sys.stderr):
            os.dup2(file, stream.fileno())
        os.environ.update(variables)
        sys.argv, sys.path[0] = argv, str(Path(argv[0]).parent)
        runpy.run_path(argv[0], run_name="__main__")
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    serve()
