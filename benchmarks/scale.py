"""What a run on many GPUs would cost: state, communication, loader and start, on paper and by simulation.

    python benchmarks/scale.py [--gpus 1024] [--samples 2e9] [--out FILE]

On paper: bytes and operations of a step from the formulas of docs/performance.md, which tests compare with counted
ones; seconds from the rates that the options give, so an upper bound on speed. Bytes read are those of CC12M at 256
pixels on the short side, which img2dataset's own page of it gives as 331 GB, 5 hours at 630 samples a second: 29 kB a
sample (LAION-400M, 10 TB: 25 kB). Simulated, with as many parts as such a
run would have: the state of one rank, a change of the world size, the epoch plan, the connections of rank 0's watch.
"""

from __future__ import annotations

import argparse
import json
import math
import threading
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TypeVar
from unittest import mock

import numpy as np
import torch

from disttempnet import distributed
from disttempnet.data import EpochPlan
from disttempnet.data.shards.index import Shard
from disttempnet.data.source import Source
from disttempnet.distributed.watchdog import Watch
from disttempnet.losses.sample_state import SampleState, reshard, reshard_sources

MODELS = {  # open_clip's: FLOP of forward and backward a pair, parameters, width of the features
    "ViT-B-32": (43.39e9, 151.3e6, 512),
    "ViT-L-14": (526e9, 427.6e6, 768),
}
BACKWARD = 2 / 3  # of the towers' time; DDP exchanges gradients meanwhile
INDEX_BYTES = 33  # a sample
SHARD_SAMPLES = 10_000
Result = TypeVar("Result")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpus", type=int, default=1024)
    parser.add_argument("--samples", type=float, default=2e9)
    parser.add_argument("--tflops", type=float, default=989, help="peak of a GPU in bf16 (default: an H100's)")
    parser.add_argument("--mfu", type=float, default=0.35, help="share of it that the towers reach")
    parser.add_argument("--gbytes", type=float, default=50, help="GB/s of network a GPU (default: 400 Gbit/s)")
    parser.add_argument("--core", type=float, default=1113, help="images/s that a core loads (docs/performance.md)")
    parser.add_argument("--node", type=int, default=8, help="GPUs of a node")
    parser.add_argument("--sample-bytes", type=float, default=29e3, help="image and caption on disk (default: CC12M)")
    parser.add_argument("--out", type=Path, help="file for the result, JSON")
    options = parser.parse_args()
    cases = {f"{model}, {rows} a GPU": on_paper(model, rows, options) for model in MODELS for rows in (64, 512)}
    simulated = simulate(options.gpus, int(options.samples))
    for key in next(iter(cases.values())):
        print(f"{key:44}", *(f"{case[key]:>20,.4g}" for case in cases.values()))
    for key, value in simulated.items():
        print(f"{key:60} {value:>14,.4g}")
    if options.out:
        setting = {key: value for key, value in vars(options).items() if key != "out"}
        result = {"torch": torch.__version__, "setting": setting, "paper": cases, "simulated": simulated}
        options.out.write_text(json.dumps(result, indent=1) + "\n")


def on_paper(model: str, rows: int, options: argparse.Namespace) -> dict[str, float]:
    """A step of `rows` pairs a rank, DistTempNet-v1 in bf16: bytes in MB, times in ms, of one rank."""
    flop, parameters, width = MODELS[model]
    ranks, size = options.gpus, rows * options.gpus
    speed, link = options.mfu * options.tflops * 1e9, options.gbytes  # FLOP and MB a millisecond
    towers, contrast = rows * flop / speed, 12 * rows * size * width / speed
    gathered = (ranks - 1) * rows * (2 * width * 2 + 8 + 4 * 7) / 1e6
    ring = 2 * (ranks - 1) / ranks  # what an all-reduce moves, times its size
    state, gradients = ring * 8 * size / 1e6, ring * 4 * parameters / 1e6
    waits = max(0.0, gradients / link - BACKWARD * towers)
    step = towers + contrast + waits + (gathered + state) / link
    images = rows / step * 1e3
    read = images * options.sample_bytes / 1e9
    return {
        "global batch": size,
        "towers": towers,
        "contrast": contrast,
        "contrast, % of the towers": 100 * contrast / towers,
        "features and numbers gathered, MB": gathered,
        "their time": gathered / link,
        "state read, MB": state,
        "gradients exchanged, MB": gradients,
        "their time, beside the backward pass": gradients / link,
        "step": step,
        "of it the towers, %": 100 * towers / step,
        "columns kept in bf16, MB": 2 * 2 * size * width / 1e6,
        "images/s a GPU": images,
        "loader cores a GPU": images / options.core,
        "read from storage, GB/s a node": read * options.node,
        "read from storage, GB/s in all": read * ranks,
    }


def simulate(gpus: int, samples: int) -> dict[str, float]:
    """Parts of such a run, each as large as there, on this machine."""
    index = {"index, GB": samples * INDEX_BYTES / 1e9} | shard_list(samples)
    return state(gpus, samples) | index | plan(gpus, samples) | watch(gpus)


def shard_list(samples: int) -> dict[str, float]:
    """What every process keeps of the shards, beside the mapped columns."""
    kinds = ("image bytes", "image width", "image height", "captions a sample", "caption characters", "jpg")
    tally = {name: [SHARD_SAMPLES, 123_456_789, 1234, 123_456] for name in kinds}
    shards = math.ceil(samples / SHARD_SAMPLES)
    one = json.dumps(asdict(Shard("00000.tar", 10**9, SHARD_SAMPLES, "0" * 64, "", "0" * 64, tally)))
    text = f"[{','.join([one] * shards)}]"
    before = memory()
    seconds, kept = timed(lambda: tuple(Shard(**shard) for shard in json.loads(text)))
    used = memory() - before
    del kept
    return {"its list of shards, GB a process": used / 1e9, "to read that list, s": seconds}


def memory() -> int:
    """Resident bytes of this process that are no file's."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon"))
    return int(line.split()[1]) * 1024


def state(gpus: int, samples: int) -> dict[str, float]:
    """One rank's table, a step's write, and taking it over from another world size."""
    with mock.patch.multiple(distributed, world_size=lambda: gpus, rank=lambda: 1):
        table = SampleState(samples, {"log_u": 0.0}, sharded=True)
    ids = torch.randint(0, samples, (64 * gpus,))
    values = torch.zeros(2, len(ids))
    writing, _ = timed(lambda: table.write(ids, values))
    found = {
        "state, MB a rank": table.bytes_a_sample * samples / gpus / 1e6,
        "a batch written to it, ms": writing * 1e3,
    }
    shard = table.local("log_u")
    for new in (gpus // 2, gpus // 8 * 7):
        sources = reshard_sources(gpus, 1, new)
        read = dict.fromkeys(sources, shard)
        seconds, _ = timed(lambda read=read, new=new: reshard(read, gpus, samples, 1, new))
        found[f"{gpus} → {new} ranks: files that a rank reads"] = len(sources)
        found[f"{gpus} → {new} ranks: GB that a rank reads"] = len(sources) * shard.nbytes / 1e9
        found[f"{gpus} → {new} ranks: seconds to deal them out"] = seconds
    return found


class Numbered(Source):
    """Usable samples without content, SHARD_SAMPLES a group."""

    where = "simulation"
    digest = ""

    def __init__(self, samples: int) -> None:
        self.status = np.broadcast_to(np.uint8(0), samples)
        self.first = np.append(np.arange(0, samples, SHARD_SAMPLES), samples)
        self.usable_counts = np.diff(self.first)

    def hashes(self) -> np.ndarray:
        raise NotImplementedError

    def image_bytes(self, sample: int) -> bytes:
        raise NotImplementedError

    def captions(self, sample: int) -> tuple[str, ...]:
        raise NotImplementedError

    def name(self, sample: int) -> str:
        raise NotImplementedError

    def problems(self, names: int = 3) -> str:
        raise NotImplementedError

    def reason(self, sample: int) -> str:
        raise NotImplementedError


def plan(gpus: int, samples: int) -> dict[str, float]:
    """One rank's part of the epoch plan: a lane a rank."""
    seconds, made = timed(lambda: EpochPlan(Numbered(samples), 64 * gpus, gpus, 0))
    first, _ = timed(lambda: made.local_batch(0, 0, 1, gpus))
    later, _ = timed(lambda: [made.local_batch(0, step, 1, gpus) for step in range(1, 513)])
    shards = math.ceil(samples / SHARD_SAMPLES)
    return {
        f"epoch plan over {shards:,} shards, s": seconds,
        "first batch of an epoch, s": first,
        "a later one, ms": later / 512 * 1e3,
    }


def watch(gpus: int) -> dict[str, float]:
    """All ranks' connections to rank 0, and how long the others take to hear that one has died."""
    main = Watch(0, gpus)
    joining, others = timed(lambda: [Watch(rank, gpus, "127.0.0.1", main.port, main.token) for rank in range(1, gpus)])
    heard = threading.Barrier(gpus - 1)
    threads = [threading.Thread(target=lambda one=one: (one.news(60), heard.wait(60))) for one in others[1:]]
    for thread in threads:
        thread.start()
    begin = time.perf_counter()
    others[0].leave("it had to")
    heard.wait(60)
    seconds = time.perf_counter() - begin
    for one in (main, *others[1:]):
        one.leave()
    return {f"{gpus - 1} ranks join the watch, s": joining, "all hear that one failed, s": seconds}


def timed(action: Callable[[], Result]) -> tuple[float, Result]:
    begin = time.perf_counter()
    result = action()
    return time.perf_counter() - begin, result


if __name__ == "__main__":
    main()
