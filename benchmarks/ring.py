"""Features that the ranks hand round (`train.ring`) beside features that each gathers: time and memory of the loss.

    python benchmarks/ring.py --out benchmarks/results/ring.json

Gloo processes on this machine, one thread each, forward and backward of SogCLR on float32 features of width 512. Both
ways take turns in the same processes; `seconds` is the median of the slowest rank's wall time, and `times as long` the
median ratio of pairs. `columns` is what a rank holds of other ranks' features at most, counted. `growth` is that of the
largest resident size over what a rank held before, in processes of its own for each way. Kept similarities are switched
off, as in large batches.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import statistics
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
from loss import D, peak, unit_pairs

WAYS = ("gathered", "ring")


def work(rank: int, ranks: int, rows: int, rounds: int, ways: tuple[str, ...], store: str, answers: Any) -> None:
    """One rank: warm up, then steps of each way in turn; sends {way: [seconds]}, and the growth where it is one way."""
    import torch
    import torch.distributed as dist

    from disttempnet import Features, build_loss
    from disttempnet.losses.contrast import blocks

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=ranks)
    blocks.KEPT_BYTES = 0
    own = slice(rank * rows, (rank + 1) * rows)
    x, y, ids = (side[own].clone() for side in unit_pairs(ranks * rows))
    losses = {way: build_loss("sogclr", num_samples=ranks * rows, embed_dim=D, ring=way == "ring") for way in ways}

    def step(way: str, count: int) -> None:
        features = [side[:count].requires_grad_() for side in (x, y)]
        losses[way](Features.unit(*features), ids[:count]).total.backward()

    for way in ways:
        losses[way].set_epoch(0)
        step(way, 16)
    growth = peak(lambda: step(ways[0], rows))["growth"] if not rounds else None
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    for _ in range(rounds):
        for way in ways:
            dist.barrier()
            begin = time.perf_counter()
            step(way, rows)
            dist.barrier()
            seconds[way].append(time.perf_counter() - begin)
    answers.put((rank, seconds, growth))
    dist.barrier()
    dist.destroy_process_group()


def in_processes(ranks: int, rows: int, rounds: int, ways: tuple[str, ...]) -> list[Any]:
    """What every rank found, in rank order."""
    os.environ["OMP_NUM_THREADS"] = "1"
    context = multiprocessing.get_context("spawn")
    answers = context.Queue()
    with tempfile.TemporaryDirectory() as folder:
        arguments = ranks, rows, rounds, ways, f"{folder}/store", answers
        processes = [context.Process(target=work, args=(rank, *arguments)) for rank in range(ranks)]
        for process in processes:
            process.start()
        found = sorted(answers.get(timeout=600) for _ in processes)
        for process in processes:
            process.join()
    return found


def measure(ranks: int, rows: int, rounds: int) -> dict[str, Any]:
    """Both ways at one size."""
    found = in_processes(ranks, rows, rounds, WAYS)
    slowest = {way: [max(each) for each in zip(*(one[1][way] for one in found), strict=True)] for way in WAYS}
    ratios = [ring / gathered for ring, gathered in zip(slowest["ring"], slowest["gathered"], strict=True)]
    blocks = {"gathered": ranks, "ring": min(ranks, 3)}
    result: dict[str, Any] = {"ranks": ranks, "rows": rows, "rounds": rounds}
    for way in WAYS:
        growth = max(one[2] for one in in_processes(ranks, rows, 0, (way,)))
        columns = blocks[way] * 2 * rows * D * 4 / 2**20
        result[way] = {
            "seconds": round(statistics.median(slowest[way]), 3),
            "columns_mib": round(columns, 1),
            "growth_mib": round(growth, 1),
        }
    return {**result, "times_as_long": round(statistics.median(ratios), 3)}


def show(result: dict[str, Any]) -> None:
    """The table for docs/scale.md."""
    print("| rows a rank × ranks | | s a step | columns, MiB a rank | growth, MiB a rank | times as long |")
    print("|---|---|--:|--:|--:|--:|")
    for size in result["sizes"]:
        for way in WAYS:
            one, ratio = size[way], size["times_as_long"] if way == "ring" else 1
            where = f"| {size['rows']} × {size['ranks']} | {way}"
            print(f"{where} | {one['seconds']} | {one['columns_mib']} | {one['growth_mib']} | {ratio} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--rows", type=int, nargs="+", default=[512, 2048], help="of a rank")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--out", type=Path, help="file for the result, JSON")
    options = parser.parse_args()
    result: dict[str, Any] = {"width": D, "threads": 1, "python": platform.python_version(), "torch": version("torch")}
    result["cores"] = os.cpu_count()
    result["sizes"] = [measure(options.ranks, rows, options.rounds) for rows in options.rows]
    if options.out:
        options.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    show(result)


if __name__ == "__main__":
    main()
