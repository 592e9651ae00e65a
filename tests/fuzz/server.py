"""Runs cases from standard input in forks of a process that has everything imported: a case costs no start-up.

    python -m tests.fuzz.server MATERIAL SCRATCH < cases.json > outcomes.json      (at the root of the project)

Two at a time. A case is killed after LIMIT seconds; a folder whose case was right is removed.
"""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import sys
import time
from base64 import b64decode
from contextlib import suppress
from pathlib import Path
from typing import Any

import pyarrow.parquet  # noqa: F401
import torch

import disttempnet.compare
import disttempnet.evaluation
import disttempnet.models
import disttempnet.report
import disttempnet.training.trainer  # noqa: F401
from disttempnet.cli.main import main
from tests.fuzz.material import copy_material

LIMIT = 120.0
MEMORY = 12 << 30  # bytes of address space: a case that reads without end fails, not the machine


def _child(folder: Path, words: list[str]) -> None:
    """Never returns: the command, with its output in files beside the folder."""
    os.setsid()
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    os.chdir(folder)
    for descriptor, path in ((1, "out"), (2, "err")):
        os.dup2(os.open(folder.with_suffix(f".{path}"), os.O_CREAT | os.O_WRONLY | os.O_TRUNC), descriptor)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    code: Any = 1
    try:
        code = main(words)
    except SystemExit as leaving:
        code = leaving.code if isinstance(leaving.code, int) else 1
    except BaseException:
        import traceback

        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code or 0)


def main_loop(material: Path, scratch: Path) -> None:
    cases = json.load(sys.stdin)
    torch.set_num_threads(1)
    running: dict[int, tuple[int, float]] = {}
    outcomes: list[Any] = [None] * len(cases)
    waiting = list(range(len(cases)))[::-1]
    while waiting or running:
        while waiting and len(running) < 2:
            number = waiting.pop()
            folder = scratch / f"{number:04d}"
            copy_material(material, folder)
            for name, content in cases[number]["files"].items():
                (folder / name).unlink()  # never through a link
                if content is not None:
                    (folder / name).write_bytes(b64decode(content))
            pid = os.fork()
            if pid == 0:
                _child(folder, cases[number]["words"])
            running[pid] = number, time.monotonic()
        time.sleep(0.01)
        for pid, (number, start) in list(running.items()):
            seconds = time.monotonic() - start
            done, status = os.waitpid(pid, os.WNOHANG)
            if not done and seconds < LIMIT:
                continue
            with suppress(ProcessLookupError):
                os.killpg(pid, signal.SIGKILL)  # its workers, and itself where it hangs
            if not done:
                os.waitpid(pid, 0)
            folder = scratch / f"{number:04d}"
            texts = {path: folder.with_suffix(f".{path}").read_text(errors="replace") for path in ("out", "err")}
            code = os.waitstatus_to_exitcode(status) if done else None
            outcomes[number] = {"code": code, "seconds": round(seconds, 1), **texts}
            shutil.rmtree(folder)
            del running[pid]
            print(f"\r{len(cases) - len(waiting) - len(running)}/{len(cases)}", end="", file=sys.stderr, flush=True)
    json.dump(outcomes, sys.stdout)


if __name__ == "__main__":
    main_loop(Path(sys.argv[1]), Path(sys.argv[2]))
