"""Shards to test with: written here from PIL images, or the package's own emoji in a cache of this session."""

import io
import os
import tarfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest
from PIL import Image

Samples = Mapping[str, Mapping[str, bytes]]


def png(number: int, mode: str = "RGB", size: tuple[int, int] = (9, 7)) -> bytes:
    """A small image whose colour tells which it is."""
    file = io.BytesIO()
    Image.new("RGB", size, (number % 256, number // 256, 77)).convert(mode).save(file, "PNG")
    return file.getvalue()


def sample(number: int) -> dict[str, bytes]:
    """The members of a good sample, by suffix."""
    text = f"caption {number}"
    return {"png": png(number), "txt": text.encode(), "json": f'{{"number": {number}}}'.encode()}


def write_shard(path: Path, samples: Samples, format: int = tarfile.USTAR_FORMAT) -> Path:
    with tarfile.open(path, "w", format=format) as shard:
        for key, members in samples.items():
            for suffix, data in members.items():
                info = tarfile.TarInfo(f"{key}.{suffix}")
                info.size = len(data)
                shard.addfile(info, io.BytesIO(data))
    return path


@pytest.fixture
def shards(tmp_path: Path) -> Callable[..., Path]:
    """Write a folder of shards: `shards(3, 2)` holds 00000.tar with 3 good samples and 00001.tar with 2."""

    def write(*counts: int, changes: Mapping[int, Mapping[str, bytes]] | None = None) -> Path:
        """`changes` replaces the members of samples by their number over all shards."""
        folder = tmp_path / "shards"
        folder.mkdir()
        number = 0
        for shard, count in enumerate(counts):
            numbers = range(number, number + count)
            write_shard(folder / f"{shard:05d}.tar", {f"{n:09d}": (changes or {}).get(n, sample(n)) for n in numbers})
            number += count
        return folder

    return write


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Embedded shards of this session, not of the machine."""
    folder = tmp_path_factory.mktemp("cache")
    before = os.environ.get("DISTTEMPNET_CACHE")
    os.environ["DISTTEMPNET_CACHE"] = str(folder)
    yield folder
    if before is None:
        del os.environ["DISTTEMPNET_CACHE"]
    else:
        os.environ["DISTTEMPNET_CACHE"] = before
