"""The data set that ships with the package: packed in a zip, made into webdataset shards on first use.

tools/pack_emoji.py made the zip and describes its layout; demo/LICENSES.md credits the artists.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
import tarfile
import tempfile
import zipfile
from pathlib import Path

from disttempnet.errors import UserError, unknown_name

DEMO_FOLDER = Path(__file__).parent / "demo"


def embedded_shards(name: str) -> Path:
    """Folder with the .tar shards of an embedded split, made in the cache folder when it is not there yet.

    Several processes may call this at once: each writes a folder of its own, the first to rename it wins.

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
    folder = _cache_folder() / f"{dataset}-{digest}" / split
    if not folder.is_dir():
        try:
            _materialise(packed, split, folder)
        except OSError as error:
            raise UserError(
                f"{folder}: the embedded shards cannot be written here ({error.strerror}); "
                "set DISTTEMPNET_CACHE to a folder that can"
            ) from None
    with zipfile.ZipFile(packed) as archive:
        for stem in _shard_stems(archive, split):
            if not (folder / f"{stem}.tar").is_file():
                raise UserError(f"{folder / stem}.tar: cached shard is gone; delete {folder} to make it again")
    return folder


def _cache_folder() -> Path:
    if chosen := os.environ.get("DISTTEMPNET_CACHE"):
        return Path(chosen)
    if shared := os.environ.get("XDG_CACHE_HOME"):
        return Path(shared) / "disttempnet"
    return Path.home() / ".cache" / "disttempnet"


def _splits(packed: Path) -> list[str]:
    with zipfile.ZipFile(packed) as archive:
        return sorted({entry.split("/")[0] for entry in archive.namelist()})


def _shard_stems(archive: zipfile.ZipFile, split: str) -> list[str]:
    names = [Path(entry) for entry in archive.namelist()]
    return [path.stem for path in names if path.parent.name == split and path.suffix == ".jsonl"]


def _materialise(packed: Path, split: str, folder: Path) -> None:
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{split}-", dir=folder.parent))
    try:
        with zipfile.ZipFile(packed) as archive:
            for stem in _shard_stems(archive, split):
                images = io.BytesIO(archive.read(f"{split}/{stem}.images"))
                lines = archive.read(f"{split}/{stem}.jsonl").decode("utf-8")
                _write_shard(temporary / f"{stem}.tar", images, lines)
        temporary.chmod(0o755)
        try:
            os.rename(temporary, folder)
        except OSError:
            if not folder.is_dir():  # otherwise another process was first, with the same bytes
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _write_shard(path: Path, images: io.BytesIO, lines: str) -> None:
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as shard:
        for line in lines.split("\n")[:-1]:  # not splitlines: captions may hold U+2028
            name, content = json.loads(line)
            data = images.read(content) if isinstance(content, int) else content.encode("utf-8")
            member = tarfile.TarInfo(name)
            member.size = len(data)
            shard.addfile(member, io.BytesIO(data))
