"""The folder that every fuzzed command starts in: small data of every kind, two finished runs, configs."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tarfile
from io import BytesIO
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

LINKED_FROM = 1 << 18  # bytes: larger files are hard links in a case's copy; nothing writes into them in place
CONFIG = """\
name = "mine"
out = "runs"
[data]
train = "photos"
global_batch = 8
lanes = 2
workers = 0
[model]
name = "demo-vit-32"
[loss]
name = "disttempnet-v1"
rho = 1.2
gamma_min = 0.8
tau_start_epoch = 0
[optim]
lr = 1e-3
warmup_steps = 1
[train]
epochs = 1
log_every = 1
[eval]
tasks = []
"""
GRID = """\
config = "own.toml"
out = "runs/grid"
seeds = [1]
[runs.clip]
loss = { name = "clip" }
[runs.sogclr]
loss = { name = "sogclr" }
"""


def _jpeg(seed: int) -> bytes:
    buffer = BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (40, 48, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(buffer, "JPEG")
    return buffer.getvalue()


def write_material(folder: Path) -> Path:
    """Write everything but the runs."""
    for name in ("photos", "shards", "table/images", "classes/cat", "classes/dog"):
        (folder / name).mkdir(parents=True)
    rows = [{"image": f"images/{i:03d}.jpg", "caption": f"photo number {i}", "label": i % 2} for i in range(24)]
    for i, row in enumerate(rows):
        for pictures in ("photos", "table/images"):
            (folder / pictures / f"{i:03d}.jpg").write_bytes(_jpeg(i))
        (folder / "photos" / f"{i:03d}.txt").write_text(row["caption"])
        (folder / "classes" / ("cat", "dog")[i % 2] / f"{i:03d}.jpg").write_bytes(_jpeg(i))
    (folder / "table/list.json").write_text(json.dumps(rows))
    (folder / "table/list.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for suffix, separator in (("csv", ","), ("tsv", "\t")):
        lines = ["image", "caption"], *([row["image"], row["caption"]] for row in rows)
        (folder / f"table/list.{suffix}").write_text("".join(separator.join(line) + "\n" for line in lines))
    images = [{"bytes": _jpeg(i), "path": None} for i in range(24)]
    struct = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    table = pa.table({"image": pa.array(images, struct), "caption": [row["caption"] for row in rows]})
    pq.write_table(table, folder / "table/list.parquet")
    for shard in range(2):
        with tarfile.open(folder / f"shards/{shard:05d}.tar", "w") as tar:
            for i in range(shard * 12, shard * 12 + 12):
                parts = {"jpg": _jpeg(i), "txt": rows[i]["caption"].encode(), "json": json.dumps(rows[i]).encode()}
                for suffix, content in parts.items():
                    member = tarfile.TarInfo(f"{i:03d}.{suffix}")
                    member.size = len(content)
                    tar.addfile(member, BytesIO(content))
    (folder / "captions.txt").write_text("".join(f"{row['caption']}\n" for row in rows))
    (folder / "own.toml").write_text(CONFIG)
    (folder / "grid.toml").write_text(GRID)
    return folder


def write_runs(folder: Path) -> None:
    """A run that was stopped early, a finished one, and an evaluation, made by the commands themselves."""
    tasks = "eval.tasks=['folder:classes']"
    commands = [
        ["train", "own.toml", "name=ok", "train.epochs=2", tasks, "train.stop_after_steps=5"],
        ["train", "own.toml", "name=other", tasks, "loss={name='sogclr'}"],
        ["evaluate", "runs/ok", "--tasks", "folder:classes", "--out", "scores.json"],
    ]
    for command in commands:
        done = subprocess.run(
            [sys.executable, "-m", "disttempnet", *command], cwd=folder, capture_output=True, text=True
        )
        assert done.returncode == 0, f"{command}: {done.stderr}"


def copy_material(source: Path, target: Path) -> None:
    """A copy to break: small files are copied, large ones linked."""
    for path in sorted(source.rglob("*")):
        copy = target / path.relative_to(source)
        if path.is_dir():
            copy.mkdir(parents=True, exist_ok=True)
        elif path.stat().st_size < LINKED_FROM:
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, copy)
        else:
            os.link(path, copy)
