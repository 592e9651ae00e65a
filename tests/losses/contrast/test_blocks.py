"""Blocks, both sides of one product, kept similarities: against the plain dense formulas in float64."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from disttempnet import Features, build_loss, distributed
from disttempnet.losses.contrast import blocks
from disttempnet.losses.contrast.backend import anchor_statistics, feature_gradients
from disttempnet.losses.contrast.pairs import Anchors, BatchPairs
from tests.gloo import Pools
from tests.losses.scenario import EVERY, B, assert_same_steps, joined, pairs, run, stream

close = torch.testing.assert_close
TIGHT = {"rtol": 1e-11, "atol": 1e-12}
ROWS = 23  # no multiple of any block size below
IDS = {
    "every column counts": None,
    "distinct": torch.randperm(ROWS, generator=torch.Generator().manual_seed(0)),
    "repeated": torch.randint(0, 9, (ROWS,), generator=torch.Generator().manual_seed(1)),
    "all the same": torch.zeros(ROWS, dtype=torch.int64),
}


def contrast(ids: Tensor | None, own: slice, dtype: torch.dtype = torch.float64) -> tuple[BatchPairs, Tensor]:
    """Local rows `own` of 23, and n of every row."""
    x, y = (side.to(dtype) for side in pairs(ROWS))
    whole, negatives = BatchPairs.of((x, y), (x, y), ids, kernel=False)
    return whole._replace(image=x[own], text=y[own], first_row=own.start), negatives


def anchors_of(seed: int) -> Anchors:
    generator = torch.Generator().manual_seed(seed)
    slope, offset = torch.rand(2, ROWS, dtype=torch.float64, generator=generator)
    return Anchors(20 * slope + 1, offset - 3)


@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("own", [slice(0, ROWS), slice(0, 7), slice(14, ROWS)], ids=str)
@pytest.mark.parametrize("size", [(4, 5), (1, 23), (30, 3), (512, 1024)], ids=str)
@pytest.mark.parametrize("ids", IDS.values(), ids=IDS.keys())
def test_statistics_and_gradients(
    monkeypatch: pytest.MonkeyPatch, ids: Tensor | None, size: tuple[int, int], own: slice, keep: bool
) -> None:
    monkeypatch.setitem(blocks.BLOCKS, "cpu", size)
    batch, negatives = contrast(ids, own)
    taus = torch.rand(2, ROWS, dtype=torch.float64, generator=torch.Generator().manual_seed(2)) * 0.3 + 0.01
    image, text = anchors_of(3), anchors_of(4)
    push = torch.linspace(-1, 1, ROWS, dtype=torch.float64)
    x, y = batch.all_image, batch.all_text
    sides, kept = anchor_statistics(batch, (x * y).sum(1)[own], taus[:, own], negatives[own], moments=True, keep=keep)
    pulled = feature_gradients(batch, image, text, push[own], kept)

    counts = torch.ones(ROWS, ROWS, dtype=torch.bool) if ids is None else ids[:, None] != ids
    s = x @ y.T
    close(negatives, counts.sum(1).double())
    for side, tau, similarity in zip(sides, taus, (s, s.T), strict=True):
        e = ((similarity - s.diagonal()[:, None]) / tau[:, None]).masked_fill(~counts, -math.inf)
        softmax = torch.softmax(e, 1).nan_to_num()
        close(side.log_mean, (torch.logsumexp(e, 1) - negatives.log()).nan_to_num(-math.inf, neginf=-math.inf)[own])
        close(side.mean_exponent, (softmax * e.masked_fill(~counts, 0.0)).sum(1)[own], **TIGHT)
    weight = (s * image.slope[:, None] + image.offset[:, None]).exp()
    weight = (weight + (s * text.slope + text.offset).exp()) * counts
    close(pulled[0], (weight @ y - push[:, None] * y)[own], **TIGHT)
    close(pulled[1], (weight.T @ x - push[:, None] * x)[own], **TIGHT)
    assert bool(kept) == keep


def test_similarities_are_kept_only_where_all_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    batch, negatives = contrast(None, slice(0, ROWS))
    positive, taus = torch.zeros(ROWS, dtype=torch.float64), torch.ones(2, ROWS, dtype=torch.float64)
    for size, fits in ((8 * ROWS**2, True), (8 * ROWS**2 - 1, False)):
        monkeypatch.setattr(blocks, "KEPT_BYTES", size)
        _, kept = anchor_statistics(batch, positive, taus, negatives, moments=False, keep=True)
        assert sum(block.numel() for block in kept) == (ROWS**2 if fits else 0)


@pytest.mark.parametrize("tau", [0.001, 0.005])
def test_extreme_temperatures_in_float32(monkeypatch: pytest.MonkeyPatch, tau: float) -> None:
    """The largest similarity comes late or early, blocks of excluded pairs first: nothing overflows or is NaN."""
    monkeypatch.setitem(blocks.BLOCKS, "cpu", (4, 5))
    for ids in IDS.values():
        batch, negatives = contrast(ids, slice(0, ROWS), torch.float32)
        exact, _ = contrast(ids, slice(0, ROWS))
        taus = torch.full((2, ROWS), tau)
        positive = (batch.image * batch.text).sum(1)
        low, _ = anchor_statistics(batch, positive, taus, negatives, moments=True, keep=False)
        positive = (exact.image * exact.text).sum(1)
        high, _ = anchor_statistics(exact, positive, taus.double(), negatives.double(), moments=True, keep=False)
        for a, b in zip(low, high, strict=True):
            close(a.log_mean.double(), b.log_mean, rtol=1e-4, atol=1e-3)
            close(a.mean_exponent.double(), b.mean_exponent, rtol=1e-4, atol=1e-3)


def run_in_blocks(recipe: dict, batches: list, kept_bytes: int) -> list:
    before = blocks.BLOCKS["cpu"], blocks.KEPT_BYTES
    blocks.BLOCKS["cpu"], blocks.KEPT_BYTES = (3, 2), kept_bytes
    try:
        return run(recipe, batches)
    finally:
        blocks.BLOCKS["cpu"], blocks.KEPT_BYTES = before


@pytest.mark.parametrize("kept_bytes", [0, 1 << 20])
@pytest.mark.parametrize("world_size", [1, 2, 4])
@pytest.mark.parametrize("name", ["disttempnet-v1", "sogclr", "clip", "siglip", "onlineclr"])
def test_blocks_and_kept_similarities_change_nothing(gloo, name: str, world_size: int, kept_bytes: int) -> None:
    batches = stream(3)
    if world_size == 1:
        actual = run_in_blocks(EVERY[name], batches, kept_bytes)
    else:
        actual = joined(gloo(world_size, run_in_blocks, EVERY[name], batches, kept_bytes))
    assert_same_steps(actual, run(EVERY[name], batches))
    assert len(batches[0].ids) == B


def test_a_gradient_can_be_asked_for_twice() -> None:
    """With retain_graph; without it autograd says that the saved tensors are gone."""
    x, y = (side.requires_grad_() for side in pairs(8))
    loss = build_loss("sogclr", num_samples=8, embed_dim=x.shape[1])
    total = loss(Features.unit(x, y), torch.arange(8)).total
    first = torch.autograd.grad(total, (x, y), retain_graph=True)
    second = torch.autograd.grad(total, (x, y))
    close(first, second, rtol=0, atol=0)
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(total, (x, y))


def waiting_bytes(rows: int, width: int, keep: bool) -> int:
    """Of the tensors that SogCLR keeps for the backward pass, this rank's share."""
    found: list[int] = []

    def pack(tensor: Tensor) -> Tensor:
        found.append(tensor.nbytes)
        return tensor

    loss = build_loss("sogclr", num_samples=64, embed_dim=width)
    x, y = (side.float().requires_grad_() for side in pairs(rows, width=width))
    ids = torch.arange(rows) + rows * distributed.rank()
    before = blocks.KEPT_BYTES
    blocks.KEPT_BYTES = before if keep else 0
    try:
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss(Features.unit(x, y), ids).total.backward()
    finally:
        blocks.KEPT_BYTES = before
    return sum(found)


@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("ranks", [1, 2])
def test_what_waits_for_the_backward_pass(gloo: Pools, ranks: int, keep: bool) -> None:
    """As docs/performance.md says: features, gathered columns of both sides in float32, similarities where they fit."""
    rows, width, every = 8, 16, 8 * ranks
    (found, *_) = gloo(2, waiting_bytes, rows, width, keep) if ranks > 1 else [waiting_bytes(rows, width, keep)]
    features, columns = 2 * rows * width * 4, 2 * every * width * 4 if ranks > 1 else 0
    # ids; slope and offset of both sides' anchors; the pull of the own pairs
    numbers = 8 * every + 4 * 4 * every + 4 * rows
    assert found == features + columns + numbers + keep * 4 * rows * every * ranks
