"""Fixtures that every test folder shares."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from tests.gloo import Pools

torch.set_num_threads(1)  # tests are small: one thread is faster, and sums come in one order


@pytest.fixture(scope="session")
def gloo() -> Iterator[Pools]:
    """`gloo(4, function, *args)`: results of a top-level function on 4 gloo ranks, in rank order."""
    pools = Pools()
    yield pools
    pools.close()
