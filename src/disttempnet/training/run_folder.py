"""The folder of a run: its checkpoints, which of them is opened, and who writes there."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import platform
import tempfile
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TextIO

from disttempnet import distributed
from disttempnet.errors import UserError, UserNotice, notice
from disttempnet.io.files import read_object, write_atomically
from disttempnet.training import atomic_folder

LOCK = ".lock"
LEASE = 120.0  # seconds after which file servers have taken the lock of a machine that is gone, most of them


def checkpoint_folder(run: Path) -> Path:
    return run / "checkpoints"


def list_checkpoints(run: Path) -> list[Path]:
    """Complete checkpoints of a run, oldest first."""
    return sorted(p for p in checkpoint_folder(run).glob("step-*") if p.is_dir())


def weights_folder(pretrained: str) -> str:
    """`model.pretrained`, with a run folder replaced by its best checkpoint (else its last).

    Raises:
        UserError: a run folder without a checkpoint, or a damaged one.
    """
    if not pretrained or not checkpoint_folder(Path(pretrained)).is_dir():
        return pretrained
    chosen = chosen_checkpoint(Path(pretrained))
    refuse_damaged(chosen)
    return str(chosen)


def chosen_checkpoint(run: Path) -> Path:
    """The best checkpoint of a run folder, else its last. In a process group all ranks call this.

    Raises:
        UserError: no such folder, or no checkpoint in it.
    """
    if not run.is_dir():
        raise UserError(f"{run}: no such run folder or checkpoint")
    checkpoints = list_checkpoints(run)
    if not checkpoints:
        raise UserError(f"{run}: holds no checkpoint (expected {checkpoint_folder(run)}/step-…)")
    return distributed.gather_objects(_best_of(run, checkpoints) if distributed.is_main() else None)[0]


def _best_of(run: Path, checkpoints: Sequence[Path]) -> Path:
    """The checkpoint that best.json names; the last one where it names none, said where it should."""
    path = checkpoint_folder(run) / "best.json"
    best = read_object(path)
    if "step" not in best:  # nothing was evaluated yet
        return checkpoints[-1]
    named = [one for one in checkpoints if type(best["step"]) is int and one.name == f"step-{best['step']:08d}"]
    if not named:
        notice(f"{path}: passed over: there is no checkpoint of step {best['step']!r}; {checkpoints[-1].name} is taken")
    return (named or checkpoints)[-1]


def write_best(run: Path, best: Mapping[str, float]) -> None:
    """Name the best checkpoint of a run; a start does so too, as the one before may have ended ahead of it."""
    checkpoint_folder(run).mkdir(parents=True, exist_ok=True)
    write_atomically(checkpoint_folder(run) / "best.json", json.dumps(dict(best)) + "\n")


def last_whole(run: Path) -> tuple[Path | None, list[str]]:
    """The last checkpoint whose files are as they were written, the same on every rank; None if the run has none.

    Also returns a line for each later one that was passed over.

    Raises:
        UserError: there are some, and all are damaged.
    """
    passed_over: list[str] = []
    found = distributed.gather_objects(list_checkpoints(run))[0]  # a node's view of a shared disk may be older
    for checkpoint in reversed(found):
        wrong = atomic_folder.damage(checkpoint)
        if not wrong:
            return checkpoint, passed_over
        passed_over.append(f"{checkpoint.name} is damaged and passed over: {wrong}")
    if found:
        raise UserError(f"{run}: no checkpoint of it is whole: {'; '.join(passed_over)}")
    return None, passed_over


def starting_point(run: Path, resume: str) -> tuple[Path | None, list[str]]:
    """The checkpoint that a run goes on from, if any, and a line for each damaged one that was passed over.

    Args:
        resume: `auto` takes the last one where there is one, `never` refuses a folder that holds a run, and a path is
            that checkpoint.

    Raises:
        UserError: there is a run already; no such checkpoint, or it is damaged.
    """
    if resume == "never":
        there = bool(list_checkpoints(run)) or (run / "config.toml").exists()
        if distributed.gather_objects(there)[0]:  # another rank may look when rank 0 has begun
            raise UserError(
                f"{run}: this run exists already; continue it with --resume auto, "
                "or give the new one another name (name=…)"
            )
        return None, []
    if resume == "auto":
        return last_whole(run)
    if not (Path(resume) / "trainer.pt").is_file():
        raise UserError(f"{resume}: no checkpoint (a folder with trainer.pt); --resume auto takes the last one")
    refuse_damaged(Path(resume), "; --resume auto takes the last one that is whole")
    return Path(resume), []


def contents(run: Path) -> tuple[bool, list[str]]:
    """What a start decides by: whether a run has begun, and its checkpoints."""
    return (run / "config.toml").exists(), [one.name for one in list_checkpoints(run)]


def refuse_damaged(checkpoint: Path, advice: str = "") -> None:
    """Raise UserError where a file of a checkpoint is not as it was written. In a process group all ranks call this."""
    if wrong := atomic_folder.damage(checkpoint):
        raise UserError(f"{checkpoint}: damaged: {wrong}{advice}")


def refuse_unwritable_folder(folder: Path) -> None:
    """Raise UserError where no folder of this path can be made and written: learnt before the work, not after it.

    It is tried, as permissions alone do not tell (read-only mounts, /proc, long names); nothing is left of the trial.
    """
    folder = folder.absolute()
    missing = [path for path in (folder, *folder.parents) if not os.path.lexists(path)]
    there = next(path for path in (folder, *folder.parents) if path not in missing)
    try:
        if not there.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, f"{there} is no folder")
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UserError(f"{folder}: cannot be written: {error.strerror}; give another place with out=…") from None
    finally:
        for path in missing:
            with suppress(OSError):
                path.rmdir()


@contextmanager
def claimed(run: Path) -> Iterator[None]:
    """Make the folder of a run, if it is not there, and be the only ones that write it.

    Rank 0 holds a lock of the process, not of the open file: loader workers, which outlive a killed process by a
    moment, do not hold it. Opening and closing that file in the same process gives it back. Where a file system has no
    locks there is none, with a notice.

    Raises:
        UserError: another process trains this run; only rank 0 raises.
    """
    if not distributed.is_main():
        yield
        return
    run.mkdir(parents=True, exist_ok=True)
    with (run / LOCK).open("a+", encoding="utf-8") as file:
        _lock(file, run)
        yield


def warn_without_lock(folder: Path, error: OSError) -> None:
    warnings.warn(
        f"{folder}: its file system has no locks ({error.strerror}): nothing keeps a second process out of this folder",
        UserNotice,
        stacklevel=2,
    )


def _lock(file: TextIO, run: Path) -> None:
    patience = time.monotonic() + LEASE
    while True:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except (BlockingIOError, PermissionError):
            file.seek(0)
            holder = file.read().strip() or "another process"
            if holder.endswith(f" on {platform.node()}") or time.monotonic() > patience:
                raise UserError(
                    f"{run}: {holder} is training this run: wait for its end, or stop it (if that machine is gone, "
                    f"remove {run / LOCK})"
                ) from None
            time.sleep(2)
        except OSError as error:
            warn_without_lock(run, error)
            return
    with suppress(OSError):  # a full disk: the lock is held all the same, and nothing is left to write at its end
        os.ftruncate(file.fileno(), 0)
        os.write(file.fileno(), f"process {os.getpid()} on {platform.node()}".encode())
