"""Errors of normalisers against sums written out over all pairs of a sample."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import Tensor, nn

from disttempnet import Features, build_loss
from disttempnet.losses import has_normalisers, normaliser_errors
from disttempnet.losses.contrast import blocks
from tests.losses.scenario import EVERY, B, D, GlobalBatch, N, make, pairs, reference_of, step, stream, unique_batch

close = torch.testing.assert_close
RECIPES = {
    "sogclr": EVERY["sogclr"],
    "sogclr ε drift": {**EVERY["sogclr"], "eps": 0.05, "drift": 0.3, "gamma": 0.3},
    "isogclr": EVERY["isogclr"],
    "tempnet": EVERY["tempnet"],
    "neuclip": {**EVERY["neuclip"], "eps": 1e-3},
    "tuneclip": EVERY["tuneclip"],
    "drrho": EVERY["drrho"],
    "dcl": EVERY["dcl"],
}
every_recipe = pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES.keys())


def sample(sizes: tuple[int, ...] = (6, 6, 4)) -> list[GlobalBatch]:
    """Batches of ids, with a repeated one, of which the first 16 are within reach of `stream`."""
    generator = torch.Generator().manual_seed(5)
    ids = torch.randperm(N, generator=generator)[: sum(sizes)]
    ids[-1] = ids[0]
    x, y = pairs(len(ids), seed=9)
    return [GlobalBatch(*part) for part in zip(x.split(sizes), y.split(sizes), ids.split(sizes), strict=True)]


def given(batch: GlobalBatch) -> tuple[Features, Tensor]:
    image, text = reference_of(batch.x, batch.y)
    return Features.unit(batch.x, batch.y)._replace(reference_image=image, reference_text=text), batch.ids


def trained(recipe: dict) -> nn.Module:
    loss = make(recipe)
    for batch in stream(4, seed=2):
        step(loss, batch)
    return loss.eval()


def measured(recipe: dict, batches: list[GlobalBatch]) -> dict[str, float]:
    return normaliser_errors(trained(recipe), [given(batch) for batch in batches])


def log_mean(x: Tensor, y: Tensor, ids: Tensor, tau: Tensor, recipe: dict) -> Tensor:
    """log (ε + g) of every anchor by loops [2, n]; with the hinge, or less the reference's d, as the recipe says."""
    found = torch.zeros(2, len(ids), dtype=torch.float64)
    theirs = reference_of(x, y)
    for side, (anchors, columns) in enumerate(((x, y), (y, x))):
        for i in range(len(ids)):
            terms = []
            for j in [j for j in range(len(ids)) if ids[j] != ids[i]]:
                d = float(anchors[i] @ (columns[j] - columns[i]))
                if "margin" in recipe:
                    d = max(0.0, d + recipe["margin"]) ** 2
                if recipe["name"] == "drrho":
                    d -= float(theirs[side][i] @ (theirs[1 - side][j] - theirs[1 - side][i]))
                terms.append(math.exp(d / float(tau[side, i])))
            found[side, i] = math.log(recipe.get("eps", 0.0) + sum(terms) / len(terms))
    return found


@every_recipe
def test_errors_are_those_of_the_sums_written_out(recipe: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(blocks.BLOCKS, "cpu", (5, 3))
    batches, loss, eps = sample(), trained(recipe), recipe.get("eps", 0.0)
    x, y, ids = (torch.cat([getattr(batch, key) for batch in batches]) for key in ("x", "y", "ids"))
    tau = loss.temperatures(x, y, ids).double()
    exact = log_mean(x, y, ids, tau, recipe)
    sizes = [len(batch.ids) for batch in batches]
    alone = torch.cat(
        [log_mean(b.x, b.y, b.ids, part, recipe) for b, part in zip(batches, tau.split(sizes, 1), strict=True)], 1
    )
    found = measured(recipe, batches)
    assert found.pop("normaliser_error/batch_log_rms") == pytest.approx((alone - exact).square().mean().sqrt().item())
    if recipe["name"] == "dcl":
        assert not found
        return

    # what is kept: of a table by id, of prototypes the mean of their exponents
    if recipe["name"] == "neuclip":
        w = loss.predicted.prototypes
        cosines = torch.cosine_similarity(torch.stack([x, y])[:, :, None], w[:, None], dim=3)
        kept = (eps + ((cosines - (x * y).sum(1)[None, :, None]) / tau[..., None]).exp().mean(2)).log()
    else:
        u = loss.state.read(ids)
        if loss.drift is not None:
            first = torch.tensor(loss.drift.numbers, dtype=torch.float64).reshape(2, 2)
            u = u + (first[1] - first[0])[:, None]
        kept = torch.where(u.isfinite(), (eps + u.exp()).log(), u)
    seen = kept.isfinite()
    assert found.pop("normaliser_error/visited") == pytest.approx(seen.double().mean().item())
    assert recipe["name"] == "neuclip" or 0 < seen.sum() < seen.numel()
    for side, name in enumerate(("image", "text")):
        ratio = (exact - kept)[side, seen[side]].exp()
        assert found.pop(f"normaliser_error/{name}_mean") == pytest.approx((ratio - 1).mean().item(), rel=1e-9)
        rms = ratio.log().square().mean().sqrt().item()
        assert found.pop(f"normaliser_error/{name}_log_rms") == pytest.approx(rms, rel=1e-9)
    assert not found


@pytest.mark.parametrize("ranks", [2, 4])
@every_recipe
def test_world_size_is_invisible(gloo, recipe: dict, ranks: int) -> None:
    """Each rank measures its part of the anchors; tables may be sharded."""
    batches = sample((8, 8))
    expected = measured(recipe, batches)
    for found in gloo(ranks, measured, {**recipe, "shard_state": True}, batches):
        assert found == pytest.approx(expected, rel=1e-9)


@every_recipe
def test_measuring_changes_nothing(recipe: dict) -> None:
    loss = trained(recipe)
    before = copy.deepcopy(loss.state_dict())
    batches = [given(batch) for batch in sample()]
    assert normaliser_errors(loss, batches) == normaliser_errors(loss, batches)
    close(loss.state_dict(), before, rtol=0, atol=0)


def test_a_fresh_normaliser_over_the_same_batch_has_no_error() -> None:
    """γ = 1 and the batch that was just seen; before any visit there is only the batch's own, which is exact there."""
    loss, batch = make({"name": "sogclr", "gamma": 1.0}), unique_batch(1)
    measure = [given(batch)]
    assert normaliser_errors(loss, measure) == pytest.approx(
        {"normaliser_error/visited": 0.0, "normaliser_error/batch_log_rms": 0.0}, abs=1e-12
    )
    step(loss, batch)
    found = normaliser_errors(loss, measure)
    assert found.pop("normaliser_error/visited") == 1
    assert found == pytest.approx(dict.fromkeys(found, 0.0), abs=1e-12)
    assert len(found) == 5


def test_a_batch_of_one_id_measures_nothing() -> None:
    loss = trained(EVERY["sogclr"])
    ids = torch.full((B,), 3)
    assert normaliser_errors(loss, [(Features.unit(*pairs(B, 1)), ids)]).keys() <= {"normaliser_error/visited"}


def test_objectives_whose_normaliser_holds_the_pair_have_none() -> None:
    for name, recipe in EVERY.items():
        without = name.startswith("clip") or name in ("siglip", "cyclip", "vicreg", "onlineclr", "nuclr", "amorlip")
        assert has_normalisers(make(recipe)) != without, name


def test_float32_losses_measure_too() -> None:
    loss = build_loss("fastclip-v3", num_samples=N, embed_dim=D, rho=1.0)
    loss.set_epoch(0)
    batch = unique_batch(1)
    loss(Features.unit(batch.x.float(), batch.y.float()), batch.ids)
    found = normaliser_errors(loss, [given(batch.to(torch.float32))])
    assert abs(found["normaliser_error/image_mean"]) < 1e-5
