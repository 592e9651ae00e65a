"""Embedded emoji data set: packed in a zip, unpacked to webdataset shards on first use.

tools/pack_emoji.py made the zip and describes its layout; demo/LICENSES.md credits the artists.
"""

from __future__ import annotations

import hashlib
import io
import json
import zipfile
from collections.abc import Iterator
from pathlib import Path

from disttempnet.data.builtin.cache import cached_shards, write_shard
from disttempnet.errors import UserError, unknown_name

DEMO_FOLDER = Path(__file__).with_name("packed")


def embedded_shards(name: str) -> Path:
    """Return the folder with the .tar shards of an embedded split; on first use, make it in the cache folder.

    Args:
        name: DATASET/SPLIT, for example `emoji/train`.

    Raises:
        UserError: unknown name, a cache folder that cannot be written, or a cached shard that is gone.
    """
    dataset, _, split = name.partition("/")
    packed = DEMO_FOLDER / f"{dataset}.zip"
    if not packed.is_file() or split not in _splits(packed):
        known = [f"{path.stem}/{split}" for path in DEMO_FOLDER.glob("*.zip") for split in _splits(path)]
        raise UserError(unknown_name("embedded data set", name, known))
    digest = hashlib.sha256(packed.read_bytes()).hexdigest()[:16]
    with zipfile.ZipFile(packed) as archive:
        stems = _shard_stems(archive, split)

        def unpack(folder: Path) -> None:
            for stem in stems:
                images = io.BytesIO(archive.read(f"{split}/{stem}.images"))
                lines = archive.read(f"{split}/{stem}.jsonl").decode("utf-8")
                write_shard(folder / f"{stem}.tar", _members(images, lines))

        return cached_shards(f"{dataset}-{digest}", split, [f"{stem}.tar" for stem in stems], unpack)


def _splits(packed: Path) -> list[str]:
    with zipfile.ZipFile(packed) as archive:
        return sorted({entry.split("/")[0] for entry in archive.namelist()})


def _shard_stems(archive: zipfile.ZipFile, split: str) -> list[str]:
    names = [Path(entry) for entry in archive.namelist()]
    return [path.stem for path in names if path.parent.name == split and path.suffix == ".jsonl"]


def _members(images: io.BytesIO, lines: str) -> Iterator[tuple[str, bytes]]:
    for line in lines.split("\n")[:-1]:  # not splitlines: captions may hold U+2028
        name, content = json.loads(line)
        yield name, images.read(content) if isinstance(content, int) else content.encode("utf-8")
