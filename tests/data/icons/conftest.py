"""The small package, and the data set that is built from it."""

from __future__ import annotations

from pathlib import Path

import pytest

from disttempnet.data.icons.build import build_icons
from tests.data.icons.scenario import release, write_package


@pytest.fixture(scope="session")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_package(tmp_path_factory.mktemp("icons") / "package")


@pytest.fixture(scope="session")
def built(package: Path) -> Path:
    """OUT of a build in this process."""
    out = package.parent / "built"
    build_icons(out, package, workers=1, release=release(package), progress=False)
    return out
