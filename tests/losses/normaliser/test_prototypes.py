"""NeuCLIP against its twin, and its prototypes. What all objectives share: tests/losses/test_every_objective.py."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from disttempnet import Features, build_loss
from disttempnet.losses.normaliser import prototypes
from disttempnet.losses.normaliser.prototypes import PrototypeNormaliser
from disttempnet.losses.objective import ObjectiveContext
from tests.losses.oracle_neuclip import NeuClip
from tests.losses.scenario import (
    B,
    D,
    GlobalBatch,
    assert_same_steps,
    descend,
    joined,
    make,
    pairs,
    run,
    step,
    stream,
    unique_batch,
)

close = torch.testing.assert_close
NEUCLIP = {
    "name": "neuclip",
    "temperature": 0.1,
    "rho": 1.2,
    "prototypes": 13,
    "normaliser_steps": 4,
    "normaliser_lr": 0.05,
    "normaliser_restart": 3,
}


def twin_of(loss: nn.Module, recipe: dict) -> NeuClip:
    start = loss.predicted.prototypes
    steps, rate, restart = (recipe[f"normaliser_{key}"] for key in ("steps", "lr", "restart"))
    return NeuClip((start[0], start[1]), steps, rate, restart, recipe.get("eps", 0.0), recipe["rho"])


@pytest.mark.parametrize(("m", "steps", "eps"), [(13, 4, 0.0), (5, 4, 0.0), (8, 1, 0.05), (13, 0, 1e-3)])
def test_neuclip_follows_the_twin(m: int, steps: int, eps: float) -> None:
    """Value, gradients of features and τ, prototypes and AdaGrad's sums, over two restarts and with repeated ids.

    13 prototypes take two batches of 8 to fill, 5 take some of the rows.
    """
    recipe = {**NEUCLIP, "prototypes": m, "normaliser_steps": steps, "eps": eps}
    loss = make(recipe)
    twin = twin_of(loss, recipe)
    for batch in stream(7):
        one = math.exp(-loss.temperature.logit_scale.item())
        tau = torch.full((2, B), one, dtype=torch.float64)
        expected, actual = twin.step(batch.x, batch.y, batch.ids, tau), step(loss, batch)
        assert actual.total.item() == pytest.approx(expected.value, rel=1e-10)
        close(actual.grad_x, expected.grad_x, rtol=1e-9, atol=1e-11)
        close(actual.grad_y, expected.grad_y, rtol=1e-9, atol=1e-11)
        close(actual.parameters["temperature.logit_scale"], -one * expected.grad_tau.sum(), rtol=1e-9, atol=1e-11)
        close(loss.predicted.prototypes, torch.stack(twin.prototypes), rtol=1e-9, atol=1e-11)
        close(loss.predicted.squares, torch.stack(twin.squares), rtol=1e-9, atol=1e-13)
        for side, key in enumerate(("image", "text")):
            close(actual.metrics[f"normaliser_excess/{key}_mean"], expected.excess[side], rtol=1e-9, atol=1e-11)
            close(actual.metrics[f"log_u/{key}_mean"], expected.alpha[side].mean(), rtol=1e-9, atol=1e-11)
        descend(loss, 0.01)
    assert expected.excess.abs().max() > 1e-3, "α is the batch's own: the case says little"
    assert loss.temperature.logit_scale.item() != pytest.approx(-math.log(0.1), abs=1e-3)


def test_the_gradient_of_a_batch_is_taken_at_its_own_normaliser() -> None:
    """tau_gradient = "batch": h = ρ − KL, whatever α is."""
    losses = [make({**NEUCLIP, "tau_gradient": "batch", "normaliser_lr": rate}) for rate in (1e-6, 0.05)]
    for number in range(3):
        results = [step(loss, unique_batch(number)) for loss in losses]
    close(results[0].parameters, results[1].parameters, rtol=1e-12, atol=0)
    assert results[0].total != results[1].total


def test_alpha_descends_to_the_logarithm_of_the_normaliser() -> None:
    """Of one batch again and again: the minimum over α is log (ε + g), where the excess of every row is 0."""
    recipe = {**NEUCLIP, "normaliser_restart": 1000, "normaliser_steps": 40, "normaliser_lr": 0.2, "prototypes": 64}
    loss, batch, key = make(recipe), unique_batch(1), "image_mean"
    for number in range(8):  # as many as fill the prototypes
        step(loss, unique_batch(2 + number))
    found = [step(loss, batch).metrics for _ in range(8)]
    assert abs(found[0][f"normaliser_excess/{key}"]) > 0.1
    assert abs(found[-1][f"normaliser_excess/{key}"]) < 1e-3
    own = step(make(recipe), batch).metrics
    close(found[-1][f"log_u/{key}"], own[f"log_u/{key}"], rtol=1e-4, atol=0)


# ---- no ids, no state a sample ----


def test_it_trains_from_a_stream() -> None:
    """Without ids, and without a number of samples that means anything: nothing is kept a sample."""
    loss = build_loss("neuclip", num_samples=10**12, embed_dim=D, prototypes=32, temperature=0.1, tau_lr=1e-3)
    tower = nn.Linear(D, D)
    optimizer = torch.optim.Adam([{"params": tower.parameters(), "lr": 0.01}, *loss.parameter_groups()])
    totals = []
    for number in range(60):
        x, y = (side.float() for side in pairs(16, seed=number, noise=0.2))
        out = loss(Features.of(tower(x), y))
        optimizer.zero_grad()
        out.total.backward()
        optimizer.step()
        totals.append(out.total.item())
    assert sum(totals[-10:]) / 10 < sum(totals[1:11]) / 10 - 0.02
    assert sum(value.numel() for value in loss.state_dict().values()) == 2 * 2 * 32 * D + 1 + 1 + 2 + 3


def test_ids_only_tell_which_columns_are_no_negatives() -> None:
    """Ids of any size; all different, they are as none. Repeated data is repeated data."""
    plain, named = make(NEUCLIP), make(NEUCLIP)
    for loss in (plain, named):
        loss.set_epoch(0)
    for number in (1, 2, 1, 1):
        batch = unique_batch(number)
        expected = plain(Features.unit(batch.x, batch.y)).total
        assert named(Features.unit(batch.x, batch.y), 10**15 + 7 * batch.ids).total == expected
    repeated = torch.arange(B) // 2
    assert named(Features.unit(batch.x, batch.y), repeated).total != plain(Features.unit(batch.x, batch.y)).total


# ---- prototypes ----


def normaliser(**arguments: object) -> PrototypeNormaliser:
    return PrototypeNormaliser(ObjectiveContext(1, D), **arguments)


def inputs(rows: int, seed: int = 0) -> tuple[Tensor, ...]:
    x, y = pairs(rows, seed)
    log_g = torch.randn(2, rows, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    counted = torch.ones(rows, dtype=torch.bool)
    return torch.stack([x, y]), (x * y).sum(1), torch.full_like(log_g, 0.2), log_g, counted


def test_prototypes_are_features_of_the_other_side_and_begin_again() -> None:
    """Ten of four rows a step: three steps to fill. They move in between, and at the restart the sums are 0 again."""
    part = normaliser(prototypes=10, normaliser_restart=5).double()
    seen = []
    for number in range(5):
        batch = inputs(4, seed=number)
        seen.append(batch[0])
        part(*batch)
        if number == 2:
            assert part.filled == part.next == 10
            other = seen[2].flip(0)
            close(part.prototypes[:, 8:], other[:, [0, 2]], rtol=0, atol=0)
    moved = part.prototypes[:, 4:].clone()
    close(part.prototypes[:, :4], seen[4].flip(0), rtol=0, atol=0)
    assert not part.squares[:, :4].any()
    assert part.squares[:, 4:].any()
    assert (moved - torch.cat([seen[1], seen[2][:, [0, 2]]], dim=1).flip(0)).abs().max() > 0.01


def test_rows_without_negatives_and_rows_that_are_not_finite_move_nothing() -> None:
    """Their prediction is what they came with; those of others and the prototypes are as if their weight were 0."""
    plain, part = (normaliser(prototypes=6).double() for _ in range(2))
    for one in (plain, part):
        one(*inputs(6, seed=1))
    x, positive, tau, log_g, counted = inputs(6, seed=2)
    expected = plain(x, positive, tau, log_g, counted & (torch.arange(6) < 4))
    broken = x.clone()
    broken[0, 5] = torch.inf
    given = log_g.clone()
    given[1, 4:] = -torch.inf  # no negatives
    given[0, 4] = torch.nan
    alpha = part(broken, positive, tau, given, counted)
    close(alpha[:, :4], expected[:, :4], rtol=1e-12, atol=1e-12)
    close(alpha[:, 4:], given[:, 4:], rtol=0, atol=0, equal_nan=True)
    close(part.prototypes, plain.prototypes, rtol=1e-12, atol=1e-12)
    later = normaliser(prototypes=6).double()
    start = later.prototypes.clone()
    later(broken, positive, tau, given, counted)
    close(later.prototypes[1, 5], start[1, 5], rtol=0, atol=0)
    assert later.prototypes.isfinite().all()


def test_a_normaliser_far_above_the_prediction_moves_finite_prototypes() -> None:
    """(ε + g)/e^α = e^400 is no float32, nor is the square of the gradient there."""
    part = normaliser(prototypes=6)
    for number, height in enumerate((0.0, 400.0, 0.0)):
        x, positive, tau, log_g, counted = inputs(6, seed=number)
        before = part.prototypes.clone()
        alpha = part(*(v.float() for v in (x, positive, tau, log_g + height)), counted)
        assert alpha.isfinite().all()
        assert part.prototypes.isfinite().all()
        assert number != 1 or not torch.equal(part.prototypes, before)


class Largest(TorchDispatchMode):
    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for item in result if isinstance(result, tuple | list) else (result,):
            if isinstance(item, Tensor):
                self.elements = max(self.elements, item.numel())
        return result


def test_blocks_change_nothing_and_bound_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """3 rows at a time, of 40, with 50 prototypes; no tensor is larger than a block, the features or the prototypes."""
    whole, parts = (normaliser(prototypes=50).double() for _ in range(2))
    for number in range(3):
        batch = inputs(40, seed=number)
        expected = whole(*batch)
        monkeypatch.setattr(prototypes, "BLOCK_BYTES", dict.fromkeys(("cpu", "cuda"), 3 * 2 * 50 * 8))
        with Largest() as largest:
            close(parts(*batch), expected, rtol=1e-11, atol=1e-11)
        monkeypatch.undo()
        assert largest.elements <= 2 * 50 * D
    close(parts.prototypes, whole.prototypes, rtol=1e-10, atol=1e-10)
    rows = 8 << 20  # a block of a CPU: 4096 anchors × 4096 prototypes would be 128 MiB
    assert prototypes.BLOCK_BYTES["cpu"] == rows
    assert prototypes.BLOCK_BYTES["cuda"] <= 64 << 20


@pytest.mark.parametrize(("m", "ranks"), [(1, 2), (3, 4), (13, 4)])
def test_ranks_take_their_part_of_the_prototypes(gloo, m: int, ranks: int) -> None:
    """Also where there are fewer of them than ranks, and where they do not divide."""
    recipe, batches = {**NEUCLIP, "prototypes": m, "normaliser_restart": 2, "eps": 1e-3}, stream(5, seed=2)
    assert_same_steps(joined(gloo(ranks, run, recipe, batches)), run(recipe, batches))


def test_float32_prototypes_are_near_those_of_float64() -> None:
    low, high = normaliser(prototypes=40), normaliser(prototypes=40).double()
    for number in range(6):
        batch = inputs(32, seed=number)
        close(low(*(v.float() for v in batch[:4]), batch[4]).double(), high(*batch), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("argument", "value"),
    [("prototypes", 0), ("normaliser_steps", -1), ("normaliser_restart", 0), ("normaliser_lr", 0.0)],
)
def test_values_out_of_range_are_refused(argument: str, value: float) -> None:
    with pytest.raises(ValueError, match=argument):
        normaliser(**{argument: value})
    with pytest.raises(ValueError, match=f"neuclip: {argument}"):
        build_loss("neuclip", num_samples=9, embed_dim=D, **{argument: value})


def test_a_batch_of_one_id_has_no_normaliser() -> None:
    loss = make(NEUCLIP)
    step(loss, unique_batch(1))
    before = loss.predicted.prototypes[:, B:].clone(), loss.predicted.prototypes[:, :B].clone()
    result = step(loss, GlobalBatch(*pairs(B, 3), torch.zeros(B, dtype=torch.int64)))
    assert result.total == 0
    assert not result.grad_x.any()
    close(loss.predicted.prototypes[:, :B], before[1], rtol=0, atol=0)
    assert not torch.equal(loss.predicted.prototypes[:, B:], before[0]), "they are filled all the same"


def test_unit_prototypes_predict_the_batch_that_they_are() -> None:
    """Without steps, α of an anchor is the mean over the prototypes' exponents, by hand."""
    part = normaliser(prototypes=4, normaliser_steps=0, eps=0.5).double()
    x, positive, tau, log_g, counted = inputs(4, seed=1)
    part(x, positive, tau, log_g, counted)
    z, positive, tau, log_g, counted = inputs(4, seed=2)
    alpha = part(z, positive, tau, log_g, counted)
    other = x.flip(0)
    exponents = (F.normalize(z, dim=2) @ other.transpose(1, 2) - positive[:, None]) / 0.2
    close(alpha, (0.5 + exponents.exp().mean(2)).log(), rtol=1e-12, atol=1e-12)
