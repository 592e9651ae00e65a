"""Updates of an index in this process, and what they scan."""

from collections.abc import Callable
from pathlib import Path

import pytest

from disttempnet.data.shards import build as building
from disttempnet.data.shards.scan import scan_shard

Write = Callable[..., Path]


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.suffix != ".tar")


@pytest.fixture
def scanned(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the shards that are scanned from here on, in this process."""
    names: list[str] = []

    def count(path: Path, caption_key: str = "") -> object:
        names.append(path.name)
        return scan_shard(path, caption_key)

    monkeypatch.setattr(building, "scan_shard", count)
    return names
