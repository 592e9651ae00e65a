"""What an index of 12 million samples costs: size, start-up of training, first batch, memory of loader workers.

    python benchmarks/index.py [--samples 1200000 12000000] [--folder FOLDER]

The index is made of invented columns by the package's own journal and writer, 10,000 samples a shard; the shards are
sparse files of the right size with other first bytes each, so that every check at start reads what it reads of real
ones. No image is decoded: workers are given a data set that reads the index as training does, without the pictures.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from torch.utils.data import DataLoader, Dataset

from disttempnet.data import EpochPlan, PlanSampler, open_index
from disttempnet.data.shards.index import INDEX_COLUMNS, Shard, ShardIndex, write_index
from disttempnet.data.shards.store import file_fingerprint
from disttempnet.io.columns import temporary_index

PER_SHARD = 10_000
SAMPLE = 40 * 512  # bytes a sample takes in the tar: image, caption and JSON with their headers


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, nargs="+", default=[1_200_000, 12_000_000])
    parser.add_argument("--folder", default="", help="where the files go (default: a temporary folder)")
    parser.add_argument("--measure", default="", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        print(json.dumps(measure(Path(options.measure))))
        return
    rows = []
    for samples in options.samples:
        with tempfile.TemporaryDirectory(dir=options.folder or None) as folder:
            index = make(Path(folder), samples)
            # a process of its own: what making the index took is not in its memory
            command = [sys.executable, __file__, "--measure", folder]
            answer = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
            rows.append({"samples": samples, "index MB": round(index.stat().st_size / 1e6, 1), **json.loads(answer)})
    for key in rows[0]:
        print(f"{key:44}", *(f"{row[key]:>14,}" for row in rows))


def make(folder: Path, samples: int) -> Path:
    """Sparse shards and their index."""
    rng = np.random.default_rng(0)
    count = samples // PER_SHARD
    shards = []
    tally = {"jpg": [PER_SHARD, PER_SHARD, 1, 1]} | {
        name: [PER_SHARD, 123_456_789, 1234, 123_456]
        for name in ("image bytes", "image width", "image height", "captions a sample", "caption characters")
    }
    for number in range(count):
        path = folder / f"{number:05d}.tar"
        path.write_bytes(number.to_bytes(8, "little") + rng.bytes(65_536))
        os.truncate(path, PER_SHARD * SAMPLE)
        shards.append(Shard(path.name, path.stat().st_size, PER_SHARD, file_fingerprint(path), "", "0" * 64, tally))
    start = (np.arange(PER_SHARD, dtype=INDEX_COLUMNS["start"].dtype) * SAMPLE).tobytes()
    spans = rng.integers(1, SAMPLE // 2, (PER_SHARD, 3, 2), dtype=INDEX_COLUMNS["spans"].dtype).tobytes()
    status = (rng.random(PER_SHARD) < 0.01).astype(INDEX_COLUMNS["status"].dtype).tobytes()
    pieces = {"start": start, "spans": spans, "status": status}
    path = folder / "all.index"
    with temporary_index(path) as temporary:
        write_index(temporary, shards, "", {name: [piece] * count for name, piece in pieces.items()})
        os.replace(temporary, path)
    return path


class Places(Dataset):
    """What reading a sample asks of the index."""

    def __init__(self, index: ShardIndex) -> None:
        self.index = index

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, key: tuple[int, int]) -> int:
        sample = key[1]
        self.index.image_bytes(sample)
        assert self.index.status[sample] == 0
        return sample


def measure(folder: Path) -> dict[str, float]:
    facts: dict[str, float] = {}
    before = memory()
    clock = time.perf_counter()
    index = open_index(str(folder), progress=False)
    facts["open and check, s"] = round(time.perf_counter() - clock, 2)
    clock = time.perf_counter()
    plan = EpochPlan(index, 4096, 8, 2024)
    facts["plan, s"] = round(time.perf_counter() - clock, 2)
    clock = time.perf_counter()
    plan.batch(3, plan.steps // 2)
    facts["ids of a batch of 4096 in mid-epoch, s"] = round(time.perf_counter() - clock, 2)
    now = memory()
    facts["trainer: own memory more, MB"] = round(now[0] - before[0], 1)
    facts["trainer: of the mapped index, MB"] = round(now[1] - before[1], 1)
    for method in ("fork", "spawn"):
        context = multiprocessing.get_context(method)
        sampler = PlanSampler(plan)
        loader = DataLoader(Places(index), batch_sampler=sampler, num_workers=2, multiprocessing_context=context)
        clock = time.perf_counter()
        batches = iter(loader)
        next(batches)
        facts[f"{method}: first batch of 2 workers, s"] = round(time.perf_counter() - clock, 2)
        for _ in range(20):
            next(batches)
        workers = [memory(worker.pid) for worker in batches._workers]  # type: ignore[attr-defined]
        facts[f"{method}: a worker's own memory, MB"] = round(max(own for own, _ in workers), 1)
        facts[f"{method}: a worker's mapped files, MB"] = round(max(mapped for _, mapped in workers), 1)
        del batches
    return facts


def memory(process: int | str = "self") -> tuple[float, float]:
    """(anonymous, file-backed) resident MB; the second is shared with the page cache and can be dropped."""
    lines = dict(
        line.split(":") for line in Path(f"/proc/{process}/status").read_text().splitlines() if ":" in line[:9]
    )
    return tuple(int(lines[key].split()[0]) / 1e3 for key in ("RssAnon", "RssFile"))  # type: ignore[return-value]


if __name__ == "__main__":
    main()
