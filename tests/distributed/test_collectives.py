"""Collectives on real gloo processes, and in one process, where they are the identity."""

from __future__ import annotations

from pathlib import Path
from unittest import mock

import pytest
import torch

from disttempnet import distributed
from disttempnet.distributed import collectives
from disttempnet.errors import UserError
from tests.gloo import Pools

CPU = torch.device("cpu")


def sums_and_means() -> tuple[list, float, list, int, list]:
    rank = distributed.rank()
    rows = torch.full((2, 1), float(rank), requires_grad=True)
    gathered = distributed.all_gather(rows)
    assert not gathered.requires_grad
    total = distributed.all_sum(torch.tensor(rank + 1.0))
    means = distributed.all_mean([torch.tensor([2.0 * rank]), torch.full((2, 2), 4 * rank, dtype=torch.float64)])
    assert [mean.dtype for mean in means] == [torch.float32, torch.float64]
    largest = distributed.largest(10 - rank, CPU)
    return (
        gathered.flatten().tolist(),
        float(total),
        [mean.tolist() for mean in means],
        largest,
        rows.detach().flatten().tolist(),
    )


def test_every_rank_gets_the_same(gloo: Pools) -> None:
    for rank, (gathered, total, means, largest, rows) in enumerate(gloo(2, sums_and_means)):
        assert gathered == [0, 0, 1, 1], "in rank order"
        assert (total, means, largest) == (3, [[1], [[2, 2], [2, 2]]], 10)
        assert rows == [rank, rank], "the input is not changed"
    assert sums_and_means() == ([0, 0], 1, [[0], [[0, 0], [0, 0]]], 10, [0, 0])


def one_fails(failing: int) -> str:
    def action() -> int:
        if distributed.rank() == failing:
            raise ValueError("no luck")
        return 7

    try:
        return str(distributed.together(action))
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def test_an_error_of_one_rank_is_raised_on_all(gloo: Pools) -> None:
    assert gloo(2, one_fails, 1) == ["OtherRankFailed: rank 1: ValueError: no luck", "ValueError: no luck"]
    assert gloo(2, one_fails, 9) == ["7", "7"]
    assert one_fails(0) == "ValueError: no luck"


def content_of_main(path: str, piece: int) -> tuple[list[bytes], str]:
    own = Path(path) if distributed.is_main() else Path(path) / "not on this node"
    with mock.patch.object(collectives, "BROADCAST_BYTES", piece):
        try:
            return list(distributed.file_of_main(own)), ""
        except UserError as error:
            return [], str(error)


def test_the_file_of_rank_0_reaches_all_in_pieces(gloo: Pools, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_bytes(b"abcdefg")
    assert gloo(2, content_of_main, str(tmp_path / "file"), 3) == [([b"abc", b"def", b"g"], "")] * 2
    why = f"{tmp_path / 'gone'}: cannot be read: No such file or directory"
    assert gloo(2, content_of_main, str(tmp_path / "gone"), 3) == [([], why)] * 2
    monkeypatch.setattr(collectives, "BROADCAST_BYTES", 4)
    assert list(distributed.file_of_main(tmp_path / "file")) == [b"abcd", b"efg"]
