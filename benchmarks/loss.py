"""Time and peak memory of the loss alone, forward and backward, beside its peers, in one run on CPU.

    python benchmarks/loss.py --out benchmarks/results/loss.json

Every case is a process of its own (one thread, one core) that is asked for steps in turn, so that other work on the
machine touches all alike; a ratio is the median over the rounds. CPU time stands beside wall time: on a shared machine
it is the fairer of the two. Memory is the growth of the peak resident set over that before the step, features not
counted, their gradients counted; each is measured in a fresh process that has made one step of a batch of 64 before.

Cases: `core` is SogCLR (τ given); `network` DistTempNet-v1, `network-icml24` TempNet (the published network, dropout).
`dense`, `dense-network` are the first code's way (benchmarks/dense.py), its networks with as many prototypes as ours;
`open_clip` is its ClipLoss. D = 512. Unit features, y near x, all ids different. The others are objectives by name,
asked for with --cases: `neuclip` with as many prototypes as rows, `drrho` with a reference of width 512; at epoch 6,
and from their second step on.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # this process only asks others, which need it
    from torch import Tensor

D, PROTOTYPES = 512, 256
PEERS = {  # case → the peer that its ratio is against
    "core": ("dense", "open_clip"),
    "network": ("dense-network",),
    "network-icml24": ("dense-network",),
}
BY_NAME = ("dcl", "scent", "tuneclip", "drrho", "neuclip", "nuclr", "amorlip")
PEERS |= dict.fromkeys(BY_NAME, ("core",))
CASES = (*PEERS, "dense", "dense-network", "open_clip")
OURS = {"core": "sogclr", "network": "disttempnet-v1", "network-icml24": "tempnet", "clip": "clip"}  # case → objective
OURS |= {name: name for name in BY_NAME}
WARM = 64  # rows of the step that loads the code


# --- in the measured process ----------------------------------------------------------------------------------------


def unit_pairs(batch: int) -> tuple[Tensor, Tensor, Tensor]:
    """Unit features [batch, D], y near x, and ids that all differ."""
    import torch
    import torch.nn.functional as F

    torch.manual_seed(0)
    x = F.normalize(torch.randn(batch, D), dim=1)
    y = F.normalize(torch.randn(batch, D).mul_(0.04).add_(x), dim=1)
    return x, y, torch.randperm(batch)


def make_objective(case: str, batch: int, device: str = "cpu") -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """Unit features of both sides [b, D] and their ids [b] → the value to call backward on."""
    import torch

    if case == "open_clip":
        from disttempnet.models.towers import open_clip

        clip, scale = open_clip.loss.ClipLoss(), torch.tensor(1 / 0.07, requires_grad=True, device=device)
        return lambda x, y, ids: clip(x, y, scale)
    if case.startswith("dense"):
        sys.path.insert(0, str(Path(__file__).parent))
        from dense import DenseObjective

        return DenseObjective(batch, None if case == "dense-network" else 0.05, D, PROTOTYPES).to(device)
    from disttempnet import Features, build_loss

    arguments = {"prototypes": PROTOTYPES, "rho": 2.0} if case.startswith("network") else {}
    arguments |= {"neuclip": {"prototypes": batch, "rho": 2.0}, "scent": {"rho": 2.0}}.get(case, {})
    loss = build_loss(OURS[case], num_samples=batch, embed_dim=D, **arguments).to(device)
    loss.set_epoch(6 if case in BY_NAME else 0)
    if case == "drrho":
        return lambda x, y, ids: loss(Features.of(x, y, reference=(y, x)), ids).total
    return lambda x, y, ids: loss(Features.unit(x, y), ids).total


def make_step(case: str, batch: int) -> Callable[[int], Any]:
    """A function that does forward and backward of the first n rows of a batch."""
    import torch

    torch.set_num_threads(1)
    x, y, ids = unit_pairs(batch)
    objective = make_objective(case, batch)

    def step(rows: int) -> None:
        features = [side[:rows].requires_grad_() for side in (x, y)]
        objective(*features, ids[:rows]).backward()
        assert all(math.isfinite(f.grad.sum()) for f in features)  # makes no tensor of their size

    return step


def serve(case: str, batch: int) -> None:
    """Answer `time` with the cost of a step and `memory` with its peak, in lines of JSON."""
    step = make_step(case, batch)
    step(min(WARM, batch))
    if case in BY_NAME:  # prototypes are filled, tables visited
        step(batch)
    for line in sys.stdin:
        print("\n" + json.dumps({"time": timed, "memory": peak}[line.strip()](lambda: step(batch))), flush=True)


def timed(step: Callable[[], None]) -> dict[str, float]:
    wall, cpu = time.perf_counter(), time.process_time()
    step()
    return {"wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu}


def peak(step: Callable[[], None]) -> dict[str, float]:
    """MiB: the resident set before the step, and by how much its peak is above that (Linux); and the step's cost."""
    ctypes.CDLL(None).malloc_trim(0)  # freed memory that is still there would hide what the step takes
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
    before = resident("VmRSS")
    cost = timed(step)
    return {"before": before, "growth": resident("VmHWM") - before, **cost}


def resident(field: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field + ":")) / 1024


# --- the comparison ---------------------------------------------------------------------------------------------------


class Served:
    """A measured case in a process of its own, on one core."""

    def __init__(self, case: str, batch: int, core: int) -> None:
        pinned = lambda: os.sched_setaffinity(0, {core})  # noqa: E731
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        command = [sys.executable, __file__, "--serve", case, str(batch)]
        self.process = subprocess.Popen(command, stdin=-1, stdout=-1, text=True, preexec_fn=pinned, env=environment)

    def ask(self, what: str) -> dict[str, float]:
        assert self.process.stdin
        assert self.process.stdout
        self.process.stdin.write(what + "\n")
        self.process.stdin.flush()
        for line in self.process.stdout:
            if line.startswith("{"):
                return json.loads(line)
        raise SystemExit(f"{self.process.args}: ended with exit code {self.process.wait()}")

    def close(self) -> None:
        assert self.process.stdin
        self.process.stdin.close()
        self.process.wait()


def available_gib() -> float:
    lines = Path("/proc/meminfo").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable")) / 2**20


def fits(case: str, batch: int) -> bool:
    """Whether a case's about 15 B × B tensors fit into what memory is free; ours always do."""
    tensors = {"dense": 15, "dense-network": 16, "open_clip": 6}.get(case, 0)
    return tensors * 4 * batch**2 / 2**30 < available_gib() - 1


def compare(batch: int, rounds: int, cases: list[str], core: int) -> dict[str, Any]:
    memory, costs = {}, {}
    for case in cases:
        if not fits(case, batch):
            continue
        served = Served(case, batch, core)
        memory[case] = served.ask("memory")
        served.close()
    if not rounds:
        return {case: summary(case, memory, {key: [cost] for key, cost in memory.items()}) for case in memory}
    # one process at a time holds a batch's temporaries, but all stay alive: their steps alternate
    served_cases = {case: Served(case, batch, core) for case in memory}
    costs = {case: [] for case in memory}
    for number in range(rounds + 1):
        for case, served in served_cases.items():
            cost = served.ask("time")
            if number:  # the first warms up
                costs[case].append(cost)
        print(".", end="", file=sys.stderr, flush=True)
    for served in served_cases.values():
        served.close()
    return {case: summary(case, memory, costs) for case in memory}


def summary(case: str, memory: dict[str, Any], costs: dict[str, Any]) -> dict[str, Any]:
    result: dict[str, Any] = {
        f"{k}_ms": round(1e3 * statistics.median(c[k] for c in costs[case])) for k in ("cpu", "wall")
    }
    result["peak_mib"] = round(memory[case]["growth"], 1)
    result["process_peak_mib"] = round(memory[case]["before"] + memory[case]["growth"], 1)
    for peer in PEERS.get(case, ()):
        if peer in memory:
            for kind in ("cpu", "wall"):
                ratios = [theirs[kind] / ours[kind] for ours, theirs in zip(costs[case], costs[peer], strict=True)]
                result[f"times_as_fast_as_{peer}_{kind}"] = round(statistics.median(ratios), 2)
            result[f"memory_of_{peer}_over_ours"] = round(memory[peer]["growth"] / memory[case]["growth"], 1)
    return result


def show(results: dict[str, Any]) -> None:
    """Tables for docs/performance.md."""
    sizes = results["batches"]
    for title, key in (
        ("CPU time, ms", "cpu_ms"),
        ("peak growth, MiB", "peak_mib"),
        ("peak of the process, MiB", "process_peak_mib"),
    ):
        shown = [b for b in sizes if any(key in sizes[b].get(case, {}) for case in CASES)]
        print(f"\n| {title} | " + " | ".join(shown) + " |")
        print("|---|" + "---|" * len(shown))
        for case in CASES:
            cells = [sizes[b].get(case, {}).get(key) for b in shown]
            if any(cell is not None for cell in cells):
                print(f"| {case} | " + " | ".join("–" if cell is None else f"{cell:,.0f}" for cell in cells) + " |")
    print("\n| times | " + " | ".join(sizes) + " |")
    print("|---|" + "---|" * len(sizes))
    for case, peers in PEERS.items():
        for peer in peers:
            for what, key in (
                ("faster, CPU", f"times_as_fast_as_{peer}_cpu"),
                ("faster, wall", f"times_as_fast_as_{peer}_wall"),
                ("less memory", f"memory_of_{peer}_over_ours"),
            ):
                cells = [sizes[b].get(case, {}).get(key) for b in sizes]
                if any(cell is not None for cell in cells):
                    row = " | ".join("–" if cell is None else f"{cell:.4g}" for cell in cells)
                    print(f"| {case} than {peer}, {what} | {row} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", type=int, nargs="+", default=[1024, 4096, 8192, 16384])
    usual = [case for case in CASES if case not in BY_NAME]
    parser.add_argument("--cases", nargs="+", default=usual, choices=CASES)
    parser.add_argument(
        "--rounds", type=int, default=5, help="steps that count of each case; 0 = the one of the memory"
    )
    parser.add_argument("--core", type=int, default=max(os.sched_getaffinity(0)), help="core that all is pinned to")
    parser.add_argument("--out", type=Path, help="file for the result, JSON; batches already in it are kept")
    options = parser.parse_args()
    results: dict[str, Any] = {"width": D, "prototypes": PROTOTYPES, "threads": 1, "python": platform.python_version()}
    results |= {package: version(package) for package in ("torch", "open_clip_torch")}
    before = json.loads(options.out.read_text()) if options.out and options.out.exists() else {"batches": {}}
    known = before.pop("batches")
    if known and before != results:
        raise SystemExit(f"{options.out} was measured with {before}, this is {results}: take another file")
    results["batches"] = known
    for batch in options.batches:
        known[str(batch)] = {"rounds": options.rounds, **compare(batch, options.rounds, options.cases, options.core)}
        results["batches"] = {key: known[key] for key in sorted(known, key=int)}
        if options.out:
            options.out.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    show(results)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--serve"]:
        serve(sys.argv[2], int(sys.argv[3]))
    else:
        main()
