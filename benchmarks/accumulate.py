"""What a batch in chunks costs: peak memory and time of training steps with `train.accumulate` = 1, 2, 4, 8.

    python benchmarks/accumulate.py [--batch 512] [--accumulate 1 4] [--config demo.toml] [--rounds 3] [--out FILE]

Every measurement is a process of its own on one thread; they take turns, and the table has the smallest time and
memory of the rounds. Memory is the growth of the process's largest resident size over what it held before the first
step; time is seconds of CPU of a step without its batch, which is loaded ahead.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

STEPS = 3  # after a first one that is not timed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=512)
    parser.add_argument("--accumulate", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--config", default="demo.toml")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, help="file for the result, JSON")
    parser.add_argument("--measure", type=int, default=0, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        print(json.dumps(measure(options.config, options.batch, options.measure)))
        return
    found: dict[int, list[dict[str, float]]] = {chunks: [] for chunks in options.accumulate}
    for _, chunks in itertools.product(range(options.rounds), options.accumulate):
        command = [sys.executable, __file__, "--config", options.config, "--batch", str(options.batch)]
        answer = subprocess.run(
            [*command, "--measure", str(chunks)],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        ).stdout
        found[chunks].append(json.loads(answer))
    setting = {"config": options.config, "batch": options.batch, "rounds": options.rounds, "threads": 1}
    versions = {"python": platform.python_version(), "torch": version("torch")}
    result = {**setting, **versions, "accumulate": {str(chunks): summary(found[chunks]) for chunks in found}}
    if options.out:
        options.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    show(result)


def summary(rounds: list[dict[str, float]]) -> dict[str, float]:
    """The smallest memory and time; the loss is the same in every round."""
    memory, seconds = (min(one[key] for one in rounds) for key in ("MB", "seconds"))
    return {"MB": round(memory, 1), "seconds": round(seconds, 3), "loss": round(rounds[0]["loss"], 6)}


def show(result: dict[str, Any]) -> None:
    """The table for docs/performance.md."""
    columns = ("peak memory of a step, MB", "CPU, s a step", "loss of the last step")
    print(f"| accumulate, batch {result['batch']} | {' | '.join(columns)} |")
    print("|--:|--:|--:|--:|")
    for chunks, one in result["accumulate"].items():
        print(f"| {chunks} | {one['MB']:.0f} | {one['seconds']:.2f} | {one['loss']:.6f} |")


def measure(config_name: str, batch: int, chunks: int) -> dict[str, float]:
    """Train a few steps; peak growth in MB, seconds of CPU of a step."""
    import torch

    from disttempnet.config import CONFIG_FOLDER, load_config
    from disttempnet.training.trainer import Trainer

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        overrides = [f"out={json.dumps(folder)}", f"data.global_batch={batch}", "data.workers=0"]
        overrides += [f"train.accumulate={chunks}", "eval.tasks=[]"]
        trainer = Trainer(load_config(CONFIG_FOLDER / config_name, overrides), torch.device("cpu"))
        batches = list(itertools.islice(trainer.data.loader_from(0), STEPS + 1))
        before = resident()
        trainer.train_step(batches[0])
        clock = time.process_time()
        for one in batches[1:]:
            output = trainer.train_step(one)
        seconds = (time.process_time() - clock) / STEPS
        return {"MB": peak() - before, "seconds": seconds, "loss": float(output.metrics["loss"])}


def peak() -> float:
    """Largest resident size of this process so far, MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6


def resident() -> float:
    """Resident size of this process now, MB."""
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[1]) * resource.getpagesize() / 1e6


if __name__ == "__main__":
    main()
