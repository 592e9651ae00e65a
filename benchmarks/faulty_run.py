"""Starting a small run that something happens to, and looking at what it leaves behind.

A run is `python -m disttempnet train` with checkpoints every few steps: one process, two that know each other by
SLURM's variables, or two under torchrun. Its digest of a checkpoint covers every bit of towers, objective, optimizers,
per-sample state and generators, so that two checkpoints of a step can be compared by a string.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import multiprocessing
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import faulty_rank
import torch
from torch.distributed.checkpoint import FileSystemReader

from disttempnet.config import CONFIG_FOLDER
from disttempnet.distributed import fsdp

STEPS, EVERY, SAMPLES, BATCH = 30, 3, 320, 32
LONGEST_S = 300.0  # a start of a run, on a busy machine
TOWERS = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "patch_size": 16, "width": 16, "layers": 1, "head_width": 8},
    "text_cfg": {"context_length": 20, "vocab_size": 49408, "width": 8, "heads": 1, "layers": 1},
}


class Run:
    """A run folder under `home`, started as often as it takes; a context, at whose end no process is left.

    Args:
        home: holds `towers/`, the architecture (`prepare`), and the run's own folder.
        name: of the run.
        launcher: `alone`, `srun` (two processes) or `torchrun` (two).
        overrides: more of the config.
    """

    def __init__(self, home: Path, name: str, launcher: str, *overrides: str) -> None:
        self.out, self.launcher, self.ranks = home / name, launcher, 1 if launcher == "alone" else 2
        self.out.mkdir()
        self.folder, self.logs = self.out / "run", home / f"{name}-logs"
        self.logs.mkdir()
        self.starts = 0
        given = {
            "name": "run",
            "out": str(self.out),
            "model.name": str(home / "towers" / "open_clip_config.json"),
            "eval.tasks": "[]",
            "data.workers": 1,
            "data.limit": SAMPLES,
            "data.global_batch": BATCH,
            "train.epochs": STEPS * BATCH // SAMPLES,
            "train.checkpoint_every": EVERY,
            "train.timeout_minutes": 1,
        } | dict(override.split("=", 1) for override in overrides)
        self.arguments = [
            "train",
            str(CONFIG_FOLDER / "debug.toml"),
            *(f"{k}={v}" for k, v in given.items()),
            "--resume",
            "auto",
        ]
        self._tasks: list[Any] = []
        self._agent: subprocess.Popen | None = None

    def __enter__(self) -> Run:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()

    def start(self, fault: dict[str, Any] | None = None) -> None:
        """Begin, or go on from the last checkpoint; `fault` is what a rank has inside."""
        self.starts += 1
        self.started = time.monotonic()
        common = {"FAULT": json.dumps(fault or {}), "OMP_NUM_THREADS": "1", "COLUMNS": "200"}
        if self.launcher == "torchrun":
            words = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", faulty_rank.__file__]
            with self.log(0).open("w") as log:
                self._agent = subprocess.Popen(
                    [sys.executable, *words, *self.arguments],
                    env={**os.environ, **common},
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
            return
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["disttempnet.training.trainer", "disttempnet.cli.main"])
        job = random.SystemRandom().randrange(1, 10**6)  # the port follows from it
        slurm = {"SLURM_JOB_ID": str(job), "SLURM_STEP_ID": "0", "SLURM_JOB_NODELIST": "localhost"}
        slurm["SLURM_NTASKS"] = str(self.ranks)
        self._tasks = []
        for rank in range(self.ranks):
            own = common | slurm | {"SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank)}
            task = context.Process(target=faulty_rank.forked, args=(own, str(self.log(rank)), self.arguments))
            task.start()
            self._tasks.append(task)

    def log(self, rank: int) -> Path:
        return self.logs / f"start-{self.starts}-rank-{0 if self.launcher == 'torchrun' else rank}.log"

    def printed(self) -> list[str]:
        """What each log of this start holds; under torchrun there is one."""
        logs = {self.log(rank) for rank in range(self.ranks)}
        return [log.read_text(encoding="utf-8", errors="replace") if log.exists() else "" for log in sorted(logs)]

    def pid(self, rank: int) -> int | None:
        """The process of a rank, while it lives."""
        if self._agent is None:
            task = self._tasks[rank]
            return task.pid if task.exitcode is None else None
        for child in children(self._agent.pid):
            with contextlib.suppress(OSError):
                if f"\0RANK={rank}\0".encode() in b"\0" + Path(f"/proc/{child}/environ").read_bytes():
                    return child
        return None

    def codes(self) -> list[int | None]:
        """Exit codes, negative for a signal; None while it runs. Of torchrun there is only its own."""
        return [self._agent.poll()] if self._agent else [task.exitcode for task in self._tasks]

    def kill(self) -> None:
        if self._agent and self._agent.poll() is None:
            # looked up ahead: each has a session of its own, and is nobody's child once the agent is gone
            ranks = [self.pid(rank) for rank in range(self.ranks)]
            os.killpg(self._agent.pid, signal.SIGKILL)
            for pid in filter(None, ranks):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            self._agent.wait()
        for task in self._tasks:
            if task.exitcode is None:
                os.kill(task.pid, signal.SIGKILL)
            task.join()

    # ---- what it leaves behind ----

    def logged(self) -> list[tuple[int, float]]:
        """(step, loss) of every whole line of metrics.jsonl."""
        try:
            lines = (self.folder / "metrics.jsonl").read_bytes().split(b"\n")[:-1]
        except OSError:
            return []
        records = [json.loads(line) for line in lines]
        return [(record["step"], record["loss"]) for record in records]

    def processes(self) -> int:
        """How many this start has met, as it says itself; 0 where it did not come so far."""
        found = re.search(r"^(\d+) processes on|^one process,", self.printed()[0], re.MULTILINE)
        return int(found[1] or 1) if found else 0

    def resumed_at(self) -> int | None:
        """The step that this start went on from, as it says itself; None where it did not come so far."""
        found = re.search(r"epochs of \d+ steps, global batch [^\n]*?(?:, from step (\d+))?\n", self.printed()[0])
        return int(found[1] or 0) if found else None

    def checkpoints(self) -> dict[int, Path]:
        """Step → folder, oldest first, of what has a checkpoint's name."""
        folders = sorted((self.folder / "checkpoints").glob("step-*"))
        return {int(folder.name.removeprefix("step-")): folder for folder in folders}


def prepare(home: Path) -> None:
    """The towers' architecture, for all runs of a home."""
    (home / "towers").mkdir(parents=True)
    config = {"model_cfg": TOWERS, "preprocess_cfg": {"mean": [0.5] * 3, "std": [0.5] * 3}}
    (home / "towers" / "open_clip_config.json").write_text(json.dumps(config), encoding="utf-8")


def children(pid: int) -> list[int]:
    try:
        return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []


def digest(checkpoint: Path) -> str:
    """Of all bits that a run goes on from; empty where a file is missing or cannot be read."""
    from safetensors.torch import load_file

    found = hashlib.blake2b(digest_size=12)
    try:
        trainer = torch.load(checkpoint / "trainer.pt", weights_only=True)
        trainer.pop("config")  # names of folders
        _feed(found, trainer)
        _feed(found, load_file(checkpoint / "open_clip_model.safetensors"))
        _feed(found, json.loads((checkpoint / "open_clip_config.json").read_text(encoding="utf-8")))
        if (checkpoint / "moments").is_dir():
            _feed(found, _moments(checkpoint / "moments"))
        for rank in range(trainer["world_size"]):
            shard = checkpoint / f"shard-{rank:05d}-of-{trainer['world_size']:05d}.pt"
            _feed(found, torch.load(shard, weights_only=True))
    except Exception:  # whatever a broken file makes torch raise
        return ""
    return found.hexdigest()


def _moments(folder: Path) -> dict[str, torch.Tensor]:
    """Return the digest of a run with sharded towers."""
    contents = FileSystemReader(folder).read_metadata().state_dict_metadata
    tensors = {name: torch.zeros(one.size) for name, one in contents.items()}  # type: ignore[union-attr]
    fsdp.load_parts(tensors, folder)
    return tensors


def _feed(into: Any, value: Any) -> None:
    if isinstance(value, dict):
        for key in sorted(value, key=str):
            into.update(f"{key}:".encode())
            _feed(into, value[key])
    elif isinstance(value, (list, tuple)):
        for one in value:
            _feed(into, one)
    elif isinstance(value, torch.Tensor):
        into.update(f"{value.dtype}{tuple(value.shape)}".encode() + value.contiguous().numpy().tobytes())
    else:
        into.update(repr(value).encode())
