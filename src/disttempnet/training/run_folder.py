"""Run folders: their checkpoints, the choice of one, and the lock of the process that writes."""

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

RUN_LOCK = ".lock"
LEASE = 120.0  # seconds after which most file servers have released the lock of a lost machine


def checkpoint_folder(run: Path) -> Path:
    return run / "checkpoints"


def list_checkpoints(run: Path) -> list[Path]:
    """Return the complete checkpoints of a run, oldest first."""
    return sorted(p for p in checkpoint_folder(run).glob("step-*") if p.is_dir())


def weights_folder(pretrained: str) -> str:
    """Return `model.pretrained`, with a run folder replaced by its best checkpoint (else its last).

    Raises:
        UserError: a run folder without a checkpoint, or a damaged one.
    """
    if not pretrained or not checkpoint_folder(Path(pretrained)).is_dir():
        return pretrained
    chosen = chosen_checkpoint(Path(pretrained))
    refuse_damaged(chosen)
    return str(chosen)


def chosen_checkpoint(run: Path) -> Path:
    """Return the best checkpoint of a run folder, else its last. In a process group all ranks call this.

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
    """Return the checkpoint that best.json names, else the last one; a name without checkpoint gives a notice."""
    path = checkpoint_folder(run) / "best.json"
    best = read_object(path)
    if "step" not in best:  # nothing was evaluated yet
        return checkpoints[-1]
    named = [one for one in checkpoints if type(best["step"]) is int and one.name == f"step-{best['step']:08d}"]
    if not named:
        notice(f"{path}: skipped: there is no checkpoint of step {best['step']!r}; {checkpoints[-1].name} is used")
    return (named or checkpoints)[-1]


def write_best(run: Path, best: Mapping[str, float]) -> None:
    """Write the step of the best checkpoint. A resumed run repeats it, in case it was killed just before."""
    checkpoint_folder(run).mkdir(parents=True, exist_ok=True)
    write_atomically(checkpoint_folder(run) / "best.json", json.dumps(dict(best)) + "\n")


def last_intact(run: Path) -> tuple[Path | None, list[str]]:
    """Return the last undamaged checkpoint, the same on every rank, and a line for each later one that was skipped.

    The checkpoint is None if the run has none.

    Raises:
        UserError: all are damaged.
    """
    skipped: list[str] = []
    found = distributed.gather_objects(list_checkpoints(run))[0]  # other nodes may see an older state of a shared disk
    for checkpoint in reversed(found):
        wrong = atomic_folder.damage(checkpoint)
        if not wrong:
            return checkpoint, skipped
        skipped.append(f"{checkpoint.name} is damaged and skipped: {wrong}")
    if found:
        raise UserError(f"{run}: all its checkpoints are damaged: {'; '.join(skipped)}")
    return None, skipped


def starting_point(run: Path, resume: str) -> tuple[Path | None, list[str]]:
    """Return the checkpoint that a run continues from, if any, and a line for each damaged one that was skipped.

    Args:
        run: the run folder.
        resume: `auto` takes the last checkpoint if there is one, `never` refuses a folder that holds a run, and a path
            is that checkpoint.

    Raises:
        UserError: there is a run already; no such checkpoint, or it is damaged.
    """
    if resume == "never":
        there = bool(list_checkpoints(run)) or (run / "config.toml").exists()
        if distributed.gather_objects(there)[0]:  # another rank may look after rank 0 has begun to write
            raise UserError(
                f"{run}: this run exists already; continue it with --resume auto, "
                "or give the new one another name (name=…)"
            )
        return None, []
    if resume == "auto":
        return last_intact(run)
    if not (Path(resume) / "trainer.pt").is_file():
        raise UserError(f"{resume}: no checkpoint (a folder with trainer.pt); --resume auto takes the last one")
    refuse_damaged(Path(resume), "; --resume auto takes the last undamaged one")
    return Path(resume), []


def contents(run: Path) -> tuple[bool, list[str]]:
    """Return whether a run has begun, and the names of its checkpoints: a start decides by them."""
    return (run / "config.toml").exists(), [one.name for one in list_checkpoints(run)]


def refuse_damaged(checkpoint: Path, advice: str = "") -> None:
    """Raise UserError if a file of a checkpoint is damaged. In a process group all ranks call this."""
    if wrong := atomic_folder.damage(checkpoint):
        raise UserError(f"{checkpoint}: damaged: {wrong}{advice}")


def refuse_unwritable_folder(folder: Path) -> None:
    """Raise UserError before the work begins if no folder of this path can be made and written.

    A file is written to find out, and removed: permissions do not tell (read-only mounts, /proc, long names).
    """
    folder = folder.absolute()
    missing = [path for path in (folder, *folder.parents) if not os.path.lexists(path)]
    nearest = next(path for path in (folder, *folder.parents) if path not in missing)
    try:
        if not nearest.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, f"{nearest} is not a folder")
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UserError(f"{folder}: cannot be written: {error.strerror}; choose another folder with out=…") from None
    finally:
        for path in missing:
            with suppress(OSError):
                path.rmdir()


@contextmanager
def claimed(run: Path) -> Iterator[None]:
    """Create the run folder if necessary, and hold its lock, inside a `with`.

    Rank 0 holds a lock of the process (lockf), not of the open file (io.files.locked): loader workers, which outlive a
    killed process by a moment, do not inherit it. Opening and closing that file in the same process releases it. If the
    file system has no locks, there is none, with a notice.

    Raises:
        UserError: another process trains this run; only rank 0 raises.
    """
    if not distributed.is_main():
        yield
        return
    run.mkdir(parents=True, exist_ok=True)
    with (run / RUN_LOCK).open("a+", encoding="utf-8") as file:
        _lock(file, run)
        yield


def warn_without_lock(folder: Path, error: OSError) -> None:
    """Give a notice that a folder is not protected from a second process."""
    warnings.warn(
        f"{folder}: its file system has no locks ({error.strerror}): nothing keeps a second process out of this folder",
        UserNotice,
        stacklevel=2,
    )


def _lock(file: TextIO, run: Path) -> None:
    """Lock the file and write who holds it. The lock of another machine, which may be lost, is waited for."""
    deadline = time.monotonic() + LEASE
    while True:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except (BlockingIOError, PermissionError):
            file.seek(0)
            holder = file.read().strip() or "another process"
            if holder.endswith(f" on {platform.node()}") or time.monotonic() > deadline:
                raise UserError(
                    f"{run}: {holder} is training this run: wait for its end, or stop it (if that machine is lost, "
                    f"remove {run / RUN_LOCK})"
                ) from None
            time.sleep(2)
        except OSError as error:
            warn_without_lock(run, error)
            return
    with suppress(OSError):  # a full disk: the lock is held anyway
        os.ftruncate(file.fileno(), 0)
        os.write(file.fileno(), f"process {os.getpid()} on {platform.node()}".encode())
