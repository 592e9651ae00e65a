"""Small runs that are killed, stopped, broken and starved at random moments, restarted, and compared bit for bit.

    python benchmarks/faults.py --count 60 --out benchmarks/results/faults.json
    python benchmarks/faults.py --count 20 --shard                                 # sharded towers: train.shard

A trial is a run of 30 steps with a checkpoint every three and a loader worker a process: alone, as two gloo processes
that know each other by SLURM's variables, or as two under torchrun. Its seed draws the kind of fault, how often (once
or twice), the rank and the moment. After every end the checkpoints that are there are compared with those of an
undisturbed run, then it is started again with `--resume auto` until it is through.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import random
import re
import resource
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from contextlib import contextmanager, suppress
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from faulty_run import EVERY, LONGEST_S, STEPS, Run, children, digest, prepare

from disttempnet.training.run_info import process_provenance

KINDS = {
    "kill": "SIGKILL to a rank",
    "terminate": "SIGTERM to a rank",
    "preempt": "SIGUSR1 to a rank",
    "raise": "an exception in a rank",
    "stop": "SIGSTOP to a rank",
    "worker": "SIGKILL to a loader worker",
    "write": "killed in the middle of writing a file",
    "commit": "killed between two file operations",
    "full": "the disk is full",
    "damage": "SIGKILL to all, then a file of the last checkpoint cut off, changed or gone",
}
INSIDE = ("raise", "commit", "write")  # what faulty_rank.py does
SIGNALS = {"kill": signal.SIGKILL, "terminate": signal.SIGTERM, "preempt": signal.SIGUSR1, "stop": signal.SIGSTOP}
LAUNCHERS = {"alone": 3, "srun": 5, "torchrun": 1}  # of nine trials; torchrun imports everything at each start
GRACEFUL = ("terminate", "preempt")  # nothing is repeated
MOST_STARTS = 8


class Trial:
    """A trial: the faults that one seed draws, and their outcome."""

    def __init__(self, seed: int, only: Sequence[str], launchers: Mapping[str, int]) -> None:
        self.draw = random.Random(seed)
        kinds = list(KINDS)
        self.seed, self.kind = seed, only[seed % len(only)] if only else kinds[seed % len(kinds)]
        can = [one for one in launchers if one != "alone" or self.kind != "stop"]  # alone, nobody would notice
        (self.launcher,) = self.draw.choices(can, [launchers[one] for one in can])
        self.planned = self.draw.choice([1, 1, 2])
        self.faults: list[dict[str, Any]] = []
        self.wrong: list[str] = []  # what should not be

    def next_fault(self, ranks: int, begun: int) -> dict[str, Any]:
        """Another moment, from step `begun` on; at step 0 the delay counts from the start: mostly ahead of step 1."""
        earliest = begun + (2 * EVERY if self.kind == "damage" else 0)  # two checkpoints: one to lose
        step = self.draw.randrange(min(earliest, STEPS - 2), STEPS - 1)
        return {
            "kind": self.kind,
            "rank": self.draw.randrange(ranks),
            "step": step,
            "delay": self.draw.uniform(0, 0.1 if step else 4.0),
            "number": self.draw.randint(1, 20),
            "share": self.draw.random(),
        }


def strike(run: Run, fault: dict[str, Any], sizes: list[list[int]]) -> bool:
    """Do it; False where there is nothing to do it to yet."""
    kind, pid = fault["kind"], run.pid(fault["rank"])
    if pid is None:
        return False
    if kind in SIGNALS:
        os.kill(pid, SIGNALS[kind])
    elif kind == "worker":
        workers = children(pid)
        if not workers:
            return False
        os.kill(workers[-1], signal.SIGKILL)
    elif kind == "write" or (kind == "full" and not os.path.ismount(run.out)):
        of_rank = sizes[fault["rank"]]
        limit = 1 + int(fault["share"] * of_rank[fault["number"] % len(of_rank)])
        resource.prlimit(pid, resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    elif kind == "full":
        free = os.statvfs(run.out)
        room = free.f_bavail * free.f_frsize - int(fault["share"] * sum(map(sum, sizes)))
        with (run.out / "ballast").open("wb") as ballast, suppress(OSError):  # less is free by now
            os.posix_fallocate(ballast.fileno(), 0, max(1, room))
            return True
        return False
    elif kind == "damage":
        run.kill()
    else:
        os.kill(pid, signal.SIGUSR2)
    return True


def damage(run: Run, fault: dict[str, Any]) -> str:
    """What a disk does that lost its power: one file of the last checkpoint is cut off, changed or gone."""
    found = list(run.checkpoints().values())
    if len(found) < 2:
        return ""
    every = (path for path in found[-1].rglob("*") if path.is_file())
    files = sorted(path for path in every if path.name != "files.json" or fault["number"] % 2)
    path = files[fault["number"] % len(files)]
    content = bytearray(path.read_bytes())
    place = int(fault["share"] * len(content))
    how = ("cut off", "changed", "gone")[fault["number"] % 3]
    if how == "gone":
        path.unlink()
        return f"{path.name} {how}"
    if how == "cut off":
        del content[place:]
    else:
        content[place] ^= 1
    path.write_bytes(content)
    return f"{path.name} {how} at {place}"


def one_start(run: Run, fault: dict[str, Any] | None, sizes: list[list[int]]) -> float | None:
    """Start the run, let the fault strike at its moment, wait for the end of all.

    Returns:
        Seconds from the fault (of those inside: from the first rank's end) to the end of all; None: it did not strike.
    """
    run.start(fault if fault and fault["kind"] in INSIDE else None)
    struck = reached = first_end = None
    while None in (codes := run.codes()):
        now = time.monotonic()
        if now - run.started > LONGEST_S:
            raise RuntimeError(f"a start did not end: {run.printed()}")
        if first_end is None and any(code is not None for code in codes):
            first_end = now
        if fault and struck is None:
            if reached is None and (not fault["step"] or (run.logged() or [(0, 0)])[-1][0] >= fault["step"]):
                reached = run.started if not fault["step"] else now
            if reached is not None and now >= reached + fault["delay"] and strike(run, fault, sizes):
                struck = now
        if struck and fault and fault["kind"] == "stop":
            stopped = run.pid(fault["rank"])
            if stopped and sum(code is None for code in codes) == 1 and run.launcher == "srun":
                os.kill(stopped, signal.SIGKILL)  # as srun --wait does; torchrun does so by itself
                struck_seconds = now - struck
                while None in run.codes():
                    time.sleep(0.01)
                return struck_seconds
        time.sleep(0.005)
    if struck is None or not any(run.codes()):
        return None
    begun = first_end or time.monotonic() if fault and fault["kind"] in ("write", "commit", "full") else struck
    return time.monotonic() - begun


def told_in_a_line(run: Run, fault: dict[str, Any]) -> str:
    """What is amiss with the reasons that were printed; empty if nothing.

    A rank that was hit itself tells none; at most its orphaned loader worker says that a connection broke.
    """
    texts = run.printed()
    reasons = [[line for line in text.splitlines() if line.startswith("disttempnet: ")] for text in texts]
    kind = fault["kind"]
    if kind in GRACEFUL:
        return "" if "continue with --resume auto" in texts[0] or not run.logged() else "not stopped in good order"
    dead = {fault["rank"]} if kind in ("kill", "stop", "write", "commit", "raise") else set()
    if kind == "damage" or run.launcher == "torchrun":
        dead = set(range(run.ranks))
        if kind != "damage" and not reasons[0]:
            return "no reason told"
    for rank, lines in enumerate(reasons):
        if rank not in dead and (len(lines) != 1 or "Traceback" in texts[rank]):
            return f"rank {rank} told {len(lines)} reasons: {texts[rank][-1500:]}"
    return ""


def saved_checkpoints(run: Run, undisturbed: dict[int, str]) -> tuple[list[int], list[int]]:
    """Steps of the checkpoints there are: (equal to the undisturbed run's, all others)."""
    whole = {step: digest(folder) for step, folder in run.checkpoints().items()}
    return [s for s in whole if whole[s] == undisturbed[s]], [s for s in whole if whole[s] != undisturbed[s]]


def play(trial: Trial, home: Path, undisturbed: dict[str, Any], overrides: Sequence[str]) -> None:
    """Faults and restarts until the run is through; what is wrong is noted in the trial."""
    with Run(home, f"trial-{trial.seed}", trial.launcher, *overrides) as run, small_disk(run, trial, undisturbed):
        reference = undisturbed[str(run.ranks)]
        fault: dict[str, Any] | None = trial.next_fault(run.ranks, 0)
        expected = 0
        while run.starts < MOST_STARTS:
            seconds = one_start(run, fault, reference["sizes"])
            resumed, logged = run.resumed_at(), [step for step, _ in run.logged()]
            if resumed is not None and resumed != expected:
                trial.wrong.append(f"went on from step {resumed}, not from {expected}")
            if fault is None or seconds is None:
                if not any(run.codes()):
                    break
                trial.wrong.append(f"ended without a fault: {run.codes()} {run.printed()[-1][-600:]}")
                return
            good, bad = saved_checkpoints(run, reference["digests"])
            amiss = told_in_a_line(run, fault)
            trial.wrong += [f"checkpoints {bad} are not whole"] * bool(bad) + [f"{fault}: {amiss}"] * bool(amiss)
            done = fault | {"seconds": round(seconds, 2), "codes": run.codes(), "corrupt": len(bad)}
            if fault["kind"] == "damage":
                done["damaged"] = damage(run, fault)
                good, _ = saved_checkpoints(run, reference["digests"])
            (run.out / "ballast").unlink(missing_ok=True)
            expected = max(good, default=0)
            last = max(logged, default=0)
            trial.faults.append(done | {"repeated": last - expected})
            more = len(trial.faults) < trial.planned and last < STEPS - 3
            fault = trial.next_fault(run.ranks, last + 1) if more else None
        else:
            trial.wrong.append(f"not through after {run.starts} starts")
        finish(trial, run, reference)


def finish(trial: Trial, run: Run, reference: dict[str, Any]) -> None:
    """The end against that of the undisturbed run: weights, optimizers, state, generators; and every step's loss."""
    allowed = 0 if trial.kind in GRACEFUL else EVERY * (2 if trial.kind == "damage" else 1)
    trial.wrong += [f"{f['repeated']} steps repeated" for f in trial.faults if f["repeated"] > allowed]
    last = max(run.checkpoints(), default=0)
    if last != STEPS or digest(run.checkpoints()[last]) != reference["digests"][STEPS]:
        trial.wrong.append("not bit-equal at the end")
    if run.logged() != reference["logged"]:
        trial.wrong.append("metrics.jsonl differs")
    if "finished" not in json.loads((run.folder / "run.json").read_text(encoding="utf-8")):
        trial.wrong.append("not marked as finished")
    kept = {".lock", ".metadata"}  # who writes the run; the contents of moments/
    left = [path.name for path in run.folder.rglob(".*") if path.name not in kept]
    trial.wrong += [f"left behind: {left}"] * bool(left)


@contextmanager
def small_disk(run: Run, trial: Trial, undisturbed: dict[str, Any]) -> Iterator[None]:
    """For a trial with a full disk: a file system of its own, where that is permitted."""
    size = 8 * sum(map(sum, undisturbed[str(run.ranks)]["sizes"]))
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "none", str(run.out)]
    mounted = trial.kind == "full" and subprocess.run(mount, capture_output=True).returncode == 0
    try:
        yield
    finally:
        run.kill()
        if mounted:
            subprocess.run(["umount", "-l", str(run.out)], check=True)


def undisturbed_runs(home: Path, overrides: Sequence[str]) -> dict[str, Any]:
    """For one process and for two: the digest of every step's checkpoint, the losses, the files each rank writes."""
    found: dict[str, Any] = {}
    for launcher in ("alone", "srun"):
        with Run(home, launcher, launcher, "train.checkpoint_every=1", f"train.keep={STEPS}", *overrides) as run:
            one_start(run, None, [])
            if any(run.codes()):
                raise RuntimeError(f"the undisturbed run failed: {run.printed()}")
            if run.processes() != run.ranks:
                raise RuntimeError(f"{run.ranks} processes did not find each other: {run.printed()}")
            digests = {step: digest(folder) for step, folder in run.checkpoints().items()}
            if list(digests) != list(range(1, STEPS + 1)) or len({*digests.values()} - {""}) != STEPS:
                raise RuntimeError("the undisturbed run has not a checkpoint of its own at every step")
            sizes: list[list[int]] = [[] for _ in range(run.ranks)]
            for path in run.checkpoints()[STEPS].rglob("*"):
                named = re.match(r"(?:shard-|__)(\d+)", path.name)
                if path.is_file() and path.suffix != ".json":
                    sizes[int(named[1]) if named else 0].append(path.stat().st_size)
            found[str(run.ranks)] = {"digests": digests, "logged": run.logged(), "sizes": sizes}
    return found


def summary(trials: list[dict[str, Any]]) -> list[str]:
    """A row a kind, as docs/reliability.md shows them."""
    rows = [
        "| fault | trials | faults | all ended within (s) | steps repeated at most | corrupt checkpoints | bit-equal |",
        "|---|--:|--:|--:|--:|--:|--:|",
    ]
    for kind, words in KINDS.items():
        own = [trial for trial in trials if trial["kind"] == kind]
        faults = [fault for trial in own for fault in trial["faults"]]
        if faults:
            seconds, repeated = (max(fault[key] for fault in faults) for key in ("seconds", "repeated"))
            corrupt, equal = sum(f["corrupt"] for f in faults), sum(not trial["wrong"] for trial in own)
            numbers = (len(own), len(faults), f"{seconds:.1f}", repeated, corrupt, f"{equal} of {len(own)}")
            rows.append(" | ".join([f"| {words}", *map(str, numbers)]) + " |")
    return rows


def run_trials(
    home: Path,
    seed: int,
    count: int,
    only: Sequence[str] = (),
    jobs: int = 1,
    launchers: Mapping[str, int] = MappingProxyType(LAUNCHERS),
    overrides: Sequence[str] = (),
) -> Iterator[dict[str, Any]]:
    """Trials until `count` had their fault, `jobs` at a time; one that ended before its moment does not count."""
    prepare(home)
    undisturbed = undisturbed_runs(home, overrides)

    def one(number: int) -> dict[str, Any]:
        trial = Trial(number, only, launchers)
        play(trial, home, undisturbed, overrides)
        return {name: getattr(trial, name) for name in ("seed", "kind", "launcher", "faults", "wrong")}

    counted, following = 0, itertools.count(seed)
    with ThreadPoolExecutor(jobs) as pool:
        begun = {pool.submit(one, next(following)) for _ in range(min(jobs, count))}
        while begun:
            done, begun = wait(begun, return_when=FIRST_COMPLETED)
            for trial in (future.result() for future in done):
                if trial["faults"] or trial["wrong"]:
                    counted += 1
                    yield trial
            begun |= {pool.submit(one, next(following)) for _ in range(min(jobs, count - counted) - len(begun))}


def machine() -> dict[str, Any]:
    """What the trials ran on and of: versions, the checkout's git revision (+ where it was changed), cores."""
    known = process_provenance()
    versions = {package: known["versions"][package] for package in ("python", "disttempnet", "numpy")}
    return {**versions, "torch": torch.__version__, "git": known["git"], "cores": os.cpu_count()}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=60, help="trials whose fault struck (default: 60)")
    parser.add_argument("--seed", type=int, default=0, help="of the first trial; the next has the next (default: 0)")
    parser.add_argument("--only", nargs="+", choices=KINDS, default=[], metavar="KIND", help=", ".join(KINDS))
    parser.add_argument("--jobs", type=int, default=1, help="trials at a time (default: 1)")
    parser.add_argument("--shard", action="store_true", help="two processes with train.shard, in every trial")
    parser.add_argument("--folder", help="where the runs lie (default: the folder for temporary files)")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the results as JSON")
    options = parser.parse_args()
    shared: dict[str, Any] = {"launchers": {"srun": 1}, "overrides": ["train.shard=true"]} if options.shard else {}
    about = machine()  # as it was when the trials began
    began, trials = time.monotonic(), []
    with tempfile.TemporaryDirectory(dir=options.folder, prefix="faults-") as home:
        for trial in run_trials(Path(home), options.seed, options.count, options.only, options.jobs, **shared):
            trials.append(trial)
            minutes, wrong = (time.monotonic() - began) / 60, sum(bool(one["wrong"]) for one in trials)
            line = f"{len(trials)} of {options.count} trials, {wrong} wrong, {minutes:.1f} minutes: {trial['kind']}"
            print(f"\r{line:<70}", end="", file=sys.stderr, flush=True)
            for what in trial["wrong"]:
                print(f"\nseed {trial['seed']} ({trial['launcher']}): {what}", file=sys.stderr, flush=True)
            if options.out:
                facts = {**about, "minutes": round(minutes, 1)}
                options.out.write_text(json.dumps({**facts, "trials": trials}, indent=1) + "\n", encoding="utf-8")
    print("", file=sys.stderr)
    print("\n".join(summary(trials)))
    return int(any(trial["wrong"] for trial in trials))


if __name__ == "__main__":
    sys.exit(main())
