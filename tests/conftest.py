"""Fixtures that every test folder shares."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.gloo import Pools

# Files of minutes. They start first, so that no worker ends with one of them while the other has nothing to do.
LONG = (
    "compare/test_pool.py",
    "training/test_trainer.py",
    "test_tutorials.py",
    "test_demo.py",
    "training/test_listings.py",
    "compare/test_trials.py",
    "data/tools/test_write.py",
    "distributed/test_launcher.py",
    "distributed/test_fsdp.py",
    "training/test_checkpoint.py",
    "test_site.py",
)

torch.set_num_threads(1)  # tests are small: one thread is faster, and sums come in one order


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the tests of long files first."""
    folder = Path(__file__).parent
    place = {folder / name: number for number, name in enumerate(LONG)}
    items.sort(key=lambda item: place.get(item.path, len(LONG)))


@pytest.fixture(scope="session")
def gloo() -> Iterator[Pools]:
    """`gloo(4, function, *args)`: results of a top-level function on 4 gloo ranks, in rank order."""
    pools = Pools()
    yield pools
    pools.close()
