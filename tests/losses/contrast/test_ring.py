"""Features that are handed round in place of being gathered: the same losses, gradients and states."""

from __future__ import annotations

import pytest
import torch

from disttempnet import OBJECTIVES, Features, build_loss, distributed
from disttempnet.losses.contrast import blocks
from tests.losses.scenario import EVERY, VARIANTS, D, N, assert_same_steps, joined, pairs, run, stream

IN_RING = (
    "clip", "clip-constant", "clip-per-sample", "clip-network", "dcl", "sogclr", "isogclr", "tempnet", "disttempnet",
    "disttempnet-v1", "fastclip-v0", "fastclip-v1", "fastclip-v2", "fastclip-v3", "fastclip-v3-constant-gamma", "scent",
    "tuneclip",
)  # fmt: skip
RECIPES = {name: EVERY[name] for name in IN_RING} | {
    name: VARIANTS[name] for name in ("isogclr ε drift", "disttempnet-v1 scent", "disttempnet-v1 ahead")
}


def run_in_small_blocks(recipe: dict, batches: list, kept_bytes: int) -> list:
    """Steps whose blocks are smaller than what a rank hands on."""
    before = blocks.BLOCKS["cpu"], blocks.KEPT_BYTES
    blocks.BLOCKS["cpu"], blocks.KEPT_BYTES = (3, 3), kept_bytes
    try:
        return run(recipe, batches)
    finally:
        blocks.BLOCKS["cpu"], blocks.KEPT_BYTES = before


@pytest.mark.parametrize("world_size", [1, 2, 4])
@pytest.mark.parametrize("name", RECIPES)
def test_the_ring_changes_nothing(gloo, name: str, world_size: int) -> None:
    """Value, gradients, states and metrics in float64 are those of one process that sees all rows."""
    batches = stream(3)
    recipe = {**RECIPES[name], "ring": True}
    actual = run(recipe, batches) if world_size == 1 else joined(gloo(world_size, run, recipe, batches))
    assert_same_steps(actual, run(RECIPES[name], batches))


@pytest.mark.parametrize("kept_bytes", [0, 1 << 20])
def test_blocks_inside_the_blocks_of_ranks(gloo, kept_bytes: int) -> None:
    batches = stream(3)
    for name in ("disttempnet-v1", "clip", "tuneclip"):
        recipe = {**EVERY[name], "ring": True}
        actual = joined(gloo(2, run_in_small_blocks, recipe, batches, kept_bytes))
        assert_same_steps(actual, run(EVERY[name], batches))


def test_who_needs_all_features_is_refused() -> None:
    sizes = {"num_samples": N, "embed_dim": D}
    for name in OBJECTIVES.keys() - set(IN_RING):
        with pytest.raises(ValueError, match=f"objective {name}: it needs the features of all ranks at once: leave r"):
            build_loss(name, **sizes, ring=True)
    with pytest.raises(ValueError, match="at once with shuffle: leave ring out"):
        build_loss("disttempnet-v1", **sizes, ring=True, shuffle=True)


def blocks_seen(rows: int) -> tuple[list[int], list[tuple[int, bool]], int]:
    """The ranks whose rows came round, whether they are theirs, and how many blocks of memory they lay in."""
    own = torch.full((rows, 2), float(distributed.rank()))
    seen, addresses = [], set()
    for rank, block in distributed.ring(own):
        seen.append((rank, bool((block == rank).all())))
        addresses.add(block.data_ptr())
    assert bool((own == distributed.rank()).all()), "a rank's own rows are not overwritten"
    return [rank for rank, _ in seen], seen, len(addresses)


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_every_block_comes_round_once(gloo, world_size: int) -> None:
    results = [blocks_seen(3)] if world_size == 1 else gloo(world_size, blocks_seen, 3)
    for rank, (order, seen, memory) in enumerate(results):
        assert order == [(rank - step) % world_size for step in range(world_size)]
        assert all(right for _, right in seen)
        assert memory <= 3


def largest_saved(ring: bool, rows: int, width: int) -> tuple[int, int]:
    """Rows of the largest tensor of features that SogCLR keeps for its backward pass, and that it gathers."""
    blocks.KEPT_BYTES = 0
    x, y = (side[:rows].float().requires_grad_() for side in pairs(rows, width=width))
    loss = build_loss("sogclr", num_samples=64, embed_dim=width, ring=ring)
    saved, gathered = [0], [0]
    whole = distributed.all_gather

    def gather(local: torch.Tensor) -> torch.Tensor:
        gathered.append(len(local) * distributed.world_size() if local.ndim == 2 and local.shape[1] == width else 0)
        return whole(local)

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        saved.append(len(tensor) if tensor.ndim == 2 and tensor.shape[1] == width else 0)
        return tensor

    distributed.all_gather = gather
    try:
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            total = loss(Features.unit(x, y), torch.arange(rows) + rows * distributed.rank()).total
        total.backward()
    finally:
        distributed.all_gather = whole
        blocks.KEPT_BYTES = 64 << 20
    return max(saved), max(gathered)


def test_no_rank_holds_the_features_of_all(gloo) -> None:
    assert gloo(4, largest_saved, False, 8, 16) == [(32, 32)] * 4
    assert gloo(4, largest_saved, True, 8, 16) == [(8, 0)] * 4
