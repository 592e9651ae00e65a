"""The losses in somebody's own loop: optimizer groups and steps, epochs, evaluation, wrong input."""

from __future__ import annotations

import copy
import math
import re
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from disttempnet import OBJECTIVES, Features, build_loss, distributed
from disttempnet.errors import UserNotice
from disttempnet.losses import objective as core
from disttempnet.losses.own_parameters import STEPS_UNTIL_FORGOTTEN
from disttempnet.losses.temperature import network
from tests.losses.scenario import EVERY, B, D, GlobalBatch, N, every_objective, kept, make, pairs, stream, unique_batch

close = torch.testing.assert_close
ROOT = Path(__file__).parents[2]
OWN_RATE = {
    "clip-network": 0.01, "tempnet": 0.01, "disttempnet": 0.01, "disttempnet-v1": 0.01,
    "clip": 0.01, "fastclip-v0": 0.01, "fastclip-v3": 0.01, "fastclip-v3-constant-gamma": 0.01,
}  # fmt: skip
WITH_TOWERS = {"siglip", "cyclip"}
NETWORK = {**EVERY["disttempnet-v1"], "dropout": 0.0, "tau_start_epoch": 1, "tau_lr_decay": 0.5}


def values(loss: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in loss.parameters()]


def backward(loss: nn.Module, batch: GlobalBatch) -> None:
    loss(Features.unit(batch.x, batch.y), batch.ids).total.backward()


# ---- groups ----


@every_objective
def test_groups_hold_every_parameter_once_without_weight_decay(recipe: dict) -> None:
    loss = make(recipe)
    groups = loss.parameter_groups()
    assert [id(p) for group in groups for p in group["params"]] == [id(p) for p in loss.parameters()]
    assert len(groups) == bool(list(loss.parameters()))
    optimizer = torch.optim.AdamW([{"params": nn.Linear(2, 2).parameters()}, *groups], lr=1e-3, weight_decay=0.1)
    for group in optimizer.param_groups[1:]:
        assert group["weight_decay"] == 0
        assert group["lr"] == OWN_RATE.get(recipe["name"], 1e-3)
    assert bool(groups) == (recipe["name"] in {*OWN_RATE, *WITH_TOWERS})


def test_published_rates() -> None:
    rates = {}
    for name in OBJECTIVES:
        for group in build_loss(name, num_samples=N, embed_dim=D).parameter_groups():
            rates[name] = group.get("lr")
    assert rates == {
        "clip": None, "clip-network": 1e-3, "tempnet": 3e-5, "disttempnet": 3e-5, "disttempnet-v1": 1e-4,
        "fastclip-v0": None, "fastclip-v3": 2e-4, "fastclip-v3-constant-gamma": 2e-4, "siglip": None, "cyclip": None,
    }  # fmt: skip


def test_what_is_not_trained_is_in_no_group() -> None:
    loss = make(EVERY["clip"]).requires_grad_(False)
    assert loss.parameter_groups() == []
    batch = unique_batch(1)
    x = batch.x.clone().requires_grad_()
    loss(Features.unit(x, batch.y), batch.ids).total.backward()
    assert x.grad is not None
    assert all(p.grad is None for p in loss.parameters())


# ---- the rate, inside the optimizer's step ----


def moves(recipe: dict, optimizer_of, epochs: tuple[int, ...]) -> tuple[list[float], torch.optim.Optimizer]:
    """Largest move of a parameter in one step at the start of each epoch."""
    loss = make(recipe)
    optimizer = optimizer_of(loss)
    found = []
    for epoch in epochs:
        loss.set_epoch(epoch)
        before = values(loss)
        optimizer.zero_grad()
        backward(loss, unique_batch(1))
        optimizer.step()
        found.append(max(float((a - b).abs().max()) for a, b in zip(before, values(loss), strict=True)))
    return found, optimizer


def test_a_network_waits_and_its_rate_decays_with_any_optimizer_and_scheduler() -> None:
    """Adam's first step is its rate: 0 until epoch 1, then tau_lr × .5 an epoch; a scheduler's factor comes on top."""
    found, optimizer = moves(NETWORK, lambda loss: torch.optim.AdamW(loss.parameter_groups(), lr=1.0), (0, 0, 1))
    assert found[:2] == [0, 0]
    assert found[2] == pytest.approx(0.01, rel=1e-4)
    assert optimizer.param_groups[0]["lr"] == 0.01, "what schedulers see and checkpoints hold stays"
    (first,) = {int(state["step"]) for state in optimizer.state.values()}
    assert first == 1, "nothing was gathered while it waited"
    found, _ = moves(NETWORK, lambda loss: torch.optim.AdamW(loss.parameter_groups(), lr=1.0), (3,))
    assert found == [pytest.approx(0.0025, rel=1e-4)]
    found, _ = moves(
        NETWORK, lambda loss: torch.optim.AdamW([g | {"lr": 0.1} for g in loss.parameter_groups()], lr=1.0), (2,)
    )
    assert found == [pytest.approx(0.05, rel=1e-4)]


def test_one_tau_has_a_third_of_its_rate_below_the_threshold() -> None:
    recipe = {**EVERY["fastclip-v3"], "temperature": 0.05, "tau_threshold": 0.06}
    found, optimizer = moves(recipe, lambda loss: torch.optim.Adam(loss.parameter_groups()), (0,))
    assert found == [pytest.approx(0.01 / 3, rel=1e-4)]
    assert optimizer.param_groups[0]["lr"] == 0.01


def test_a_network_waits_also_in_a_group_with_others_which_is_named() -> None:
    loss, tower = make(NETWORK), nn.Linear(D, D).double()
    optimizer = torch.optim.AdamW([*tower.parameters(), *loss.parameters()], lr=0.1)
    before, weight = values(loss), tower.weight.detach().clone()
    loss.set_epoch(0)
    batch = unique_batch(1)
    loss(Features.of(tower(batch.x), batch.y), batch.ids).total.backward()
    with pytest.warns(
        UserNotice, match=r"rate of its own, 0\.01 .* other parameters at 0\.1: .*\*loss\.parameter_groups\(\)"
    ):
        optimizer.step()
    close(values(loss), before, rtol=0, atol=0)
    assert not torch.equal(tower.weight, weight)


def test_a_step_that_raises_leaves_no_rate_changed() -> None:
    loss = make(NETWORK)
    optimizer = torch.optim.SGD(loss.parameter_groups(), lr=1.0)
    loss.set_epoch(2)
    for _ in range(2):
        backward(loss, unique_batch(1))
        with pytest.raises(ZeroDivisionError):
            optimizer.step(lambda: 1 / 0)
    optimizer.step()
    assert optimizer.param_groups[0]["lr"] == 0.01


def test_a_copied_loss_is_trained_at_its_own_epoch() -> None:
    """As averaged models and notebooks make them."""
    loss = make(NETWORK)
    other = copy.deepcopy(loss)
    loss.set_epoch(0)
    other.set_epoch(1)
    optimizer = torch.optim.SGD(other.parameter_groups())
    before = values(other)
    for one in (loss, other):
        backward(one, unique_batch(1))
    optimizer.step()
    assert any(not torch.equal(a, b) for a, b in zip(before, values(other), strict=True))


class SharpnessAware(torch.optim.Optimizer):
    """A step of two passes, with an optimizer inside that has the same groups."""

    def __init__(self, groups: list[dict]) -> None:
        super().__init__(groups, {"lr": 1.0})
        self.inner = torch.optim.SGD(self.param_groups)
        self.param_groups = self.inner.param_groups

    def step(self, closure) -> None:
        for _ in range(2):
            with torch.enable_grad():
                closure()
        self.inner.step()


@pytest.mark.parametrize("by_name", [False, True])
@pytest.mark.parametrize("kind", [torch.optim.Adam, torch.optim.LBFGS, SharpnessAware])
def test_a_closure_finds_the_same_rates(kind: type[torch.optim.Optimizer], by_name: bool) -> None:
    """Its first pass is the loss's first, and is inside the first step."""
    loss, batch = make(NETWORK), unique_batch(1)
    optimizer = kind(loss.parameters() if kind is torch.optim.LBFGS else loss.parameter_groups())

    def closure() -> Tensor:
        optimizer.zero_grad()
        total = loss(Features.unit(batch.x, batch.y), batch.ids).total
        total.backward()
        return total

    def move() -> float:
        before = values(loss)
        optimizer.step(closure=closure) if by_name else optimizer.step(closure)
        return max(float((a - b).abs().max().detach()) for a, b in zip(before, loss.parameters(), strict=True))

    loss.set_epoch(0)
    assert [move(), move()] == [0, 0]
    loss.set_epoch(2)
    plain = optimizer.param_groups[0]["lr"]
    moved = move()
    assert moved > 0
    assert optimizer.param_groups[0]["lr"] == plain
    if kind is torch.optim.Adam:
        assert moved == pytest.approx(0.005, rel=1e-4)
        assert {int(state["step"]) for state in optimizer.state.values()} == {1}, "nothing was gathered"
    if kind is SharpnessAware:
        steepest = max(float(p.grad.abs().max()) for p in loss.parameters())
        assert moved == pytest.approx(0.005 * steepest, rel=1e-4), "the inner optimizer scales nothing again"


class Handing(torch.optim.Optimizer):
    """Hands what its groups say to an optimizer inside with groups of its own, and back: as ZeroRedundancyOptimizer."""

    def __init__(self, groups: list[dict]) -> None:
        super().__init__(groups, {"lr": 1.0})
        self.inner = torch.optim.Adam([dict(group) for group in self.param_groups])

    def step(self) -> None:
        (own,), (inner,) = self.param_groups, self.inner.param_groups
        inner["lr"] = own["lr"]
        self.inner.step()
        own["lr"] = inner["lr"]


def test_nested_optimizers_scale_a_rate_once() -> None:
    found, optimizer = moves(NETWORK, lambda loss: Handing(loss.parameter_groups()), (0, 3))
    assert found == [0, pytest.approx(0.0025, rel=1e-4)]
    assert optimizer.param_groups[0]["lr"] == 0.01


def move_in_zero() -> list[float]:
    """Moves at epochs 0 and 3 in torch's optimizer of optimizers, and the rate that schedulers see."""
    with warnings.catch_warnings():  # its neighbours call torch.jit
        warnings.filterwarnings("ignore", category=DeprecationWarning)
        from torch.distributed.optim import ZeroRedundancyOptimizer

    def zero(loss: nn.Module) -> torch.optim.Optimizer:
        return ZeroRedundancyOptimizer(loss.parameter_groups(), torch.optim.Adam, lr=1.0)

    found, optimizer = moves(NETWORK, zero, (0, 3))
    return [*found, optimizer.param_groups[0]["lr"]]


@pytest.mark.slow
def test_torchs_own_optimizer_of_optimizers_scales_a_rate_once(gloo) -> None:
    for rank in gloo(2, move_in_zero):
        assert rank == [0, pytest.approx(0.0025, rel=1e-4), 0.01]


@pytest.mark.parametrize("frozen", ["image.", "text.", "image.bias"])
@pytest.mark.parametrize("rows_kept", [4096, 2])
def test_a_part_of_a_network_is_trained_while_the_rest_is_kept(
    frozen: str, rows_kept: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(network, "KEPT_ROWS", rows_kept)
    whole, half = make(NETWORK), make(NETWORK)
    for name, parameter in half.temperature.named_parameters():
        parameter.requires_grad_(not name.startswith(frozen))
    for loss in (whole, half):
        backward(loss, unique_batch(1))
    for (name, expected), given in zip(whole.named_parameters(), half.parameters(), strict=True):
        if name.startswith(f"temperature.{frozen}"):
            assert given.grad is None
        else:
            close(given.grad, expected.grad, rtol=0, atol=0)
    assert any(p.grad is not None and p.grad.any() for p in half.parameters())


# ---- forgotten ----


def notices(steps: int, loss: nn.Module, *optimizers: torch.optim.Optimizer) -> list[str]:
    """Of as many steps of the loss and each optimizer."""
    batch, tower = unique_batch(1), nn.Linear(D, D).double()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(steps):
            loss(Features.of(tower(batch.x), batch.y), batch.ids).total.backward()
            for optimizer in optimizers:
                optimizer.step()
    return [str(w.message) for w in caught if issubclass(w.category, UserNotice)]


def test_a_rate_that_was_always_0_is_named_once_and_one_that_ends_at_0_is_not() -> None:
    loss, ended = make(EVERY["siglip"]), make(EVERY["siglip"])
    start = values(loss)
    optimizer = torch.optim.SGD(loss.parameter_groups(), lr=0.0)
    assert notices(STEPS_UNTIL_FORGOTTEN - 1, loss, optimizer) == []
    (notice,) = notices(2 * STEPS_UNTIL_FORGOTTEN, loss, optimizer)
    assert f"its learning rate was 0 in the last {STEPS_UNTIL_FORGOTTEN} steps" in notice
    close(values(loss), start, rtol=0, atol=0)
    optimizer = torch.optim.SGD(ended.parameter_groups(), lr=0.1)
    assert notices(1, ended, optimizer) == []
    optimizer.param_groups[0]["lr"] = 0.0
    assert notices(2 * STEPS_UNTIL_FORGOTTEN, ended, optimizer) == []


def test_a_network_that_waits_at_rate_0_is_not_forgotten() -> None:
    loss = make(NETWORK)
    loss.set_epoch(0)
    groups = [group | {"lr": 0.0} for group in loss.parameter_groups()]
    assert notices(2 * STEPS_UNTIL_FORGOTTEN, loss, torch.optim.SGD(groups)) == []


def test_an_optimizer_that_no_longer_steps_is_missed() -> None:
    loss, tower = make(EVERY["clip"]), nn.Linear(D, D)
    first, second = (torch.optim.SGD(group, lr=0.1) for group in (loss.parameter_groups(), tower.parameters()))
    assert notices(STEPS_UNTIL_FORGOTTEN, loss, second, first) == []
    (notice,) = notices(2 * STEPS_UNTIL_FORGOTTEN, loss, second)
    assert "none of the optimizers" in notice


def test_weight_decay_of_others_is_named_where_it_moves_tau() -> None:
    loss, tower = make(EVERY["siglip"]), nn.Linear(D, D)
    both = [*tower.parameters(), *loss.parameters()]
    assert notices(2, loss, torch.optim.AdamW(both, lr=0.1, weight_decay=0.0)) == []
    (notice,) = notices(2, loss, torch.optim.AdamW(both, lr=0.1, weight_decay=0.2))
    assert re.search(r"weight decay of 0\.2 moves τ as well: .*\*loss\.parameter_groups\(\)", notice)


@pytest.mark.parametrize("name", ["clip", "siglip", "cyclip", "fastclip-v3", "disttempnet-v1"])
def test_parameters_that_no_optimizer_holds_are_named_once(name: str) -> None:
    loss, tower = make(EVERY[name]), nn.Linear(D, D).double()
    loss.set_epoch(0)
    optimizer, batch = torch.optim.SGD(tower.parameters(), lr=0.1), unique_batch(1)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2 * STEPS_UNTIL_FORGOTTEN):
            loss(Features.of(tower(batch.x), batch.y), batch.ids).total.backward()
            optimizer.step()
    (notice,) = [str(w.message) for w in caught if issubclass(w.category, UserNotice)]
    assert "none of the optimizers" in notice
    assert "*loss.parameter_groups()" in notice


@pytest.mark.parametrize("accumulated", [1, STEPS_UNTIL_FORGOTTEN + 2])
def test_two_optimizers_and_many_chunks_a_step_are_no_fault(accumulated: int) -> None:
    """Also where others step meanwhile, and where a loss is looked at and not trained."""
    loss, idle, tower = make(EVERY["clip"]), make(EVERY["clip"]), nn.Linear(D, D).double()
    optimizers = [torch.optim.SGD(tower.parameters(), lr=0.1), torch.optim.SGD(loss.parameter_groups(), lr=0.1)]
    batch = unique_batch(1)
    for _ in range(STEPS_UNTIL_FORGOTTEN + 2):
        for _ in range(accumulated):
            loss(Features.of(tower(batch.x), batch.y), batch.ids).total.backward()
        idle(Features.of(tower(batch.x), batch.y), batch.ids)
        for optimizer in optimizers:
            optimizer.step()


# ---- epochs ----

SCHEDULED = ["disttempnet-v1", "fastclip-v1", "fastclip-v3-constant-gamma", "tempnet"]


@pytest.mark.parametrize("name", SCHEDULED)
def test_epochs_by_steps_are_epochs_that_are_told(name: str) -> None:
    """γ, the temperature's rate and what it is after six epochs of two steps; a resumed loss goes on by itself."""
    recipe = {**EVERY[name], "gamma_decay_epochs": 5.0} if "gamma_decay_epochs" in EVERY[name] else EVERY[name]
    told, counting = make(recipe), make(recipe, steps_per_epoch=2)
    for number, batch in enumerate(stream(12)):
        told.set_epoch(number // 2)
        if number == 7:
            saved = counting.state_dict()
            counting = make(recipe, steps_per_epoch=2)
            counting.load_state_dict(saved)
        outs = [one(Features.unit(batch.x, batch.y), batch.ids) for one in (told, counting)]
        close(outs[1], outs[0], rtol=0, atol=0)
        assert counting.current_rate() == told.current_rate()
    assert counting.epoch == 5


def test_telling_takes_over_from_counting() -> None:
    loss = make(EVERY["disttempnet-v1"], steps_per_epoch=1)
    loss.set_epoch(1)
    for batch in stream(3):
        loss(Features.unit(batch.x, batch.y), batch.ids)
    assert loss.epoch == 1


@pytest.mark.parametrize("name", SCHEDULED)
def test_an_epoch_that_nobody_tells_is_named_once(name: str) -> None:
    loss = make(EVERY[name])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for batch in stream(3):  # N + B rows may still be one epoch
            loss(Features.unit(batch.x, batch.y), batch.ids)
        assert not caught
        for batch in stream(6):
            loss(Features.unit(batch.x, batch.y), batch.ids)
    (notice,) = caught
    assert "set_epoch was never called" in str(notice.message)
    assert "steps_per_epoch=len(loader)" in str(notice.message)
    assert notice.filename == __file__


@pytest.mark.parametrize("name", [name for name in EVERY if name not in (*SCHEDULED, "disttempnet", "clip-network")])
def test_who_has_no_schedule_or_was_told_hears_nothing(name: str) -> None:
    loss = make(EVERY[name])
    if "gamma_min" in OBJECTIVES[name].arguments or EVERY[name].get("tau_threshold", 0):
        loss.set_epoch(0)
    if name == "fastclip-v3":
        loss.set_epoch(0)
    for batch in stream(8):
        loss(Features.unit(batch.x, batch.y), batch.ids)


@pytest.mark.parametrize("epoch", [-1, math.nan])
def test_no_epoch_is_negative(epoch: float) -> None:
    with pytest.raises(ValueError, match="epoch must not be negative"):
        make(EVERY["sogclr"]).set_epoch(epoch)


# ---- evaluation ----


@every_objective
def test_an_evaluation_borrows_nothing_from_training_samples(recipe: dict) -> None:
    """The value is that of a loss that never saw a sample, at its τ; ids may be left out, and may be any numbers."""
    loss = make(recipe)
    for batch in stream(4):
        loss.set_epoch(batch.epoch)
        loss(Features.unit(batch.x, batch.y), batch.ids)
    loss.eval()
    batch = unique_batch(7)
    features = Features.unit(batch.x, batch.y)
    without = loss(features).total
    for ids in (batch.ids, torch.arange(B) + 10**6, list(range(B))):
        assert loss(features, ids).total == without
    if recipe["name"] in ("sogclr", "fastclip-v1", "onlineclr"):  # a constant τ
        fresh = make(recipe)
        close(fresh(features, batch.ids).total, without, rtol=1e-12, atol=0)


@pytest.mark.parametrize("name", ["isogclr", "fastclip-v2", "clip-per-sample"])
def test_pairs_without_a_tau_of_their_own_have_the_mean_of_those_learned(gloo, name: str) -> None:
    recipe = EVERY[name]
    found = evaluated_tau(recipe)
    loss = make(recipe).eval()
    batch = unique_batch(7)
    assert loss(Features.unit(batch.x, batch.y)).metrics["tau/image_mean"].item() == pytest.approx(0.06)
    assert found[0] != pytest.approx(0.06, rel=1e-3)
    assert found == pytest.approx(found[2:] * 2, rel=1e-6), "of the samples that were seen, and only of those"
    for rank in gloo(2, evaluated_tau, recipe):
        assert rank == pytest.approx(found, rel=1e-6)


def evaluated_tau(recipe: dict) -> list[float]:
    """τ of both sides in an evaluation, and the means over the training samples that were seen."""
    loss, seen = make(recipe), set()
    for batch in stream(2):
        loss.set_epoch(0)
        share = B // distributed.world_size()
        rows = slice(distributed.rank() * share, (distributed.rank() + 1) * share)
        loss(Features.unit(batch.x[rows], batch.y[rows]), batch.ids[rows])
        seen |= set(batch.ids.tolist())
    assert len(seen) < N
    loss.eval()
    batch = unique_batch(7)
    metrics = loss(Features.unit(batch.x, batch.y)).metrics
    table = loss.temperature.state.read(torch.tensor(sorted(seen)))[:2]
    return [metrics["tau/image_mean"].item(), metrics["tau/text_mean"].item(), *table.mean(1).tolist()]


# ---- ids ----


@pytest.mark.parametrize(
    "kind",
    [list, tuple, np.asarray, lambda ids: np.asarray(ids, np.int32), lambda ids: torch.tensor(ids, dtype=torch.int32),
     lambda ids: [np.int64(i) for i in ids], lambda ids: torch.tensor(ids, dtype=torch.uint8),
     lambda ids: torch.tensor(ids, dtype=torch.uint16), lambda ids: torch.tensor(ids, dtype=torch.uint64)],
    ids=["list", "tuple", "numpy", "numpy int32", "int32", "numpy scalars", "uint8", "uint16", "uint64"],
)  # fmt: skip
@pytest.mark.parametrize("name", ["sogclr", "isogclr", "onlineclr", "clip"])
def test_ids_of_any_kind(name: str, kind) -> None:
    one, other = make(EVERY[name]), make(EVERY[name])
    for batch in stream(3):
        features = Features.unit(batch.x, batch.y)
        expected = one(features, batch.ids)
        close(other(features, kind(batch.ids.tolist())), expected, rtol=0, atol=0)
        close(kept(other, batch.ids), kept(one, batch.ids), rtol=0, atol=0)
    if name != "onlineclr":
        close(
            other.temperatures(batch.x, batch.y, kind(batch.ids.tolist())),
            one.temperatures(batch.x, batch.y, batch.ids),
        )


@pytest.mark.parametrize("ids", [[0.0] * B, torch.zeros(B), [True] * B, torch.zeros(B, 1).long(), [1, 2], "abc"])
def test_what_is_no_id_is_refused_in_one_line(ids: object) -> None:
    x, y = pairs(B)
    with pytest.raises(ValueError, match=rf"ids must be integers of shape \[{B}\], got ") as caught:
        make(EVERY["sogclr"])(Features.unit(x, y), ids)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["sogclr", "isogclr", "fastclip-v3"])
def test_training_needs_ids_where_something_is_kept_a_sample(name: str) -> None:
    x, y = pairs(B)
    with pytest.raises(ValueError, match="ids are needed in training"):
        make(EVERY[name])(Features.unit(x, y))


@pytest.mark.parametrize("name", ["clip", "siglip", "cyclip", "vicreg", "clip-network"])
def test_who_keeps_nothing_a_sample_needs_no_ids(name: str) -> None:
    x, y = pairs(B)
    one, other = make(EVERY[name]), make(EVERY[name])
    close(one(Features.unit(x, y)).total, other(Features.unit(x, y), torch.arange(B)).total, rtol=0, atol=0)


def test_a_loss_on_another_device_than_the_features_says_so() -> None:
    x = torch.empty(B, D, device="meta")
    for name in ("sogclr", "clip", "onlineclr", "isogclr"):
        with pytest.raises(ValueError, match=r"the loss is on cpu, the features are on meta: .*loss\.to\(\)"):
            make(EVERY[name])(Features.unit(x, x), torch.arange(B))


@every_objective
def test_exact_arithmetic_follows_the_features_and_ids_follow_them(
    recipe: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    """ids on the CPU, features elsewhere."""
    devices = []
    monkeypatch.setattr(core, "exact_arithmetic", lambda device: devices.append(device))
    monkeypatch.setattr(torch, "autocast", lambda device, **_: devices.append(device) or warnings.catch_warnings())
    loss = make({k: v for k, v in recipe.items() if k != "dropout"}).float().eval().to("meta")
    x, y = (torch.empty(B, D, device="meta") for _ in range(2))
    assert loss(Features.of(x, y), torch.arange(B)).total.device.type == "meta"
    assert set(devices) == {"meta"}


# ---- rows, and gradients of gradients ----


@every_objective
def test_no_rows_are_refused(recipe: dict) -> None:
    empty = torch.empty(0, D)
    with pytest.raises(ValueError, match="a batch of 0 rows has no loss"):
        make(recipe)(Features.of(empty, empty), torch.empty(0).long())


@every_objective
def test_a_gradient_is_not_differentiated_again(recipe: dict) -> None:
    """It would be 0 or wrong. A second backward pass of a kept graph is the same again."""
    loss, batch = make(recipe), unique_batch(1)
    x = batch.x.clone().requires_grad_()
    total = loss(Features.unit(x, batch.y), batch.ids).total
    (first,) = torch.autograd.grad(total, x, retain_graph=True)
    close(torch.autograd.grad(total, x, retain_graph=True), (first,), rtol=0, atol=0)
    with pytest.raises(RuntimeError, match="cannot be differentiated again"):
        torch.autograd.grad(total, x, create_graph=True)


def test_features_of_another_width_are_refused() -> None:
    x, y = pairs(B, width=D + 1)
    with pytest.raises(ValueError, match=f"features are {D + 1} wide, the loss was built with embed_dim = {D}"):
        make(EVERY["disttempnet-v1"])(Features.unit(x, y), torch.arange(B))


ROWS = "every rank needs the same number of rows, got 4, 3 of ranks 0 to 1"


def refusal(recipe: dict, what: str) -> tuple[str, float]:
    """What this rank is told, and the value of a right step afterwards."""
    first = distributed.rank() == 0
    loss = make(recipe, seed=distributed.rank() if what == "seed" else 0)
    loss.set_epoch(0)
    if what == "state" and first:
        with torch.no_grad():
            next(loss.parameters()).add_(1)
    rows = {"uneven": 4 if first else 3, "none": 4 if first else 0}.get(what, 4)
    x, y = pairs(rows, seed=distributed.rank())
    ids = torch.arange(rows) + 4 * distributed.rank() + (N if what == "ids" and not first else 0)
    try:
        loss(Features.unit(x, y), ids)
    except (ValueError, IndexError) as error:
        message = str(error)
    x, y = pairs(4, seed=distributed.rank())
    loss = make(recipe)
    return message, loss(Features.unit(x, y), torch.arange(4) + 4 * distributed.rank()).total.item()


@pytest.mark.parametrize("name", ["sogclr", "siglip", "vicreg", "cyclip"])
def test_uneven_rows_are_refused_on_every_rank_which_goes_on(gloo, name: str) -> None:
    answers = gloo(2, refusal, EVERY[name], "uneven")
    assert [message.partition(":")[0] for message, _ in answers] == [ROWS, ROWS]
    assert answers[0][1] == answers[1][1]


@pytest.mark.parametrize(
    ("what", "name", "of_rank_1"),
    [("none", "clip", "a batch of 0 rows has no loss"), ("ids", "sogclr", "sample ids must lie in")],
)
def test_what_one_rank_refuses_ends_no_other_in_a_collective(gloo, what: str, name: str, of_rank_1: str) -> None:
    (first, value), (second, other) = gloo(2, refusal, EVERY[name], what)
    assert first == "rank 1 has refused its batch: its own message says why"
    assert second.startswith(of_rank_1)
    assert value == other


@pytest.mark.parametrize(
    ("what", "name", "named"),
    [
        ("seed", "sogclr", "arguments"),
        ("seed", "disttempnet-v1", "arguments"),
        ("seed", "cyclip", "arguments"),
        ("state", "clip", "parameters"),
    ],
)
def test_losses_that_differ_between_ranks_are_refused_at_the_first_step(gloo, what: str, name: str, named: str) -> None:
    for message, _ in gloo(2, refusal, EVERY[name], what):
        assert f"the loss of rank 1 has other {named} than that of rank 0" in message


# ---- as it is written ----


@pytest.mark.parametrize("page", ["README.md", "docs/objectives.md"])
def test_the_loop_of_the_pages_runs_as_it_stands(page: str, tmp_path: Path) -> None:
    """Verbatim; the network waits for its epoch, then moves, and what was saved goes on where it was."""
    (block,) = re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(encoding="utf-8"), re.S)
    torch.manual_seed(0)
    towers = nn.ModuleList([nn.Linear(5, D), nn.Linear(4, D)])
    towers.forward = lambda images, texts: (towers[0](images), towers[1](texts))
    loader = [(torch.randn(B, 5), torch.randn(B, 4), ids) for ids in torch.arange(2 * B).split(B)]
    given = {"N": 2 * B, "D": D, "device": "cpu", "model": towers, "loader": loader, "path": tmp_path / "saved.pt"}
    start = values(build_loss("disttempnet-v1", num_samples=2 * B, embed_dim=D))
    for epochs, moved in ((2, False), (3, True)):
        exec(block, given | {"epochs": epochs})
        saved = torch.load(tmp_path / "saved.pt", weights_only=True)
        loss = build_loss("disttempnet-v1", num_samples=2 * B, embed_dim=D)
        loss.load_state_dict(saved["loss"])
        assert any(not torch.equal(a, b) for a, b in zip(values(loss), start, strict=True)) == moved
        assert loss.epoch == epochs - 1
        assert loss.step == 2 * epochs


# ---- arguments ----


def test_scalars_of_numpy_are_numbers() -> None:
    plain = build_loss("disttempnet-v1", num_samples=N, embed_dim=D, seed=3, tau_max=0.25, prototypes=7, shuffle=True)
    numpy = build_loss(
        "disttempnet-v1", num_samples=np.int64(N), embed_dim=np.int32(D), seed=np.uint8(3), tau_max=np.float32(0.25),
        prototypes=np.int16(7), shuffle=np.True_, steps_per_epoch=np.int64(0),
    )  # fmt: skip
    assert plain.arguments == numpy.arguments
    close(values(numpy), values(plain), rtol=0, atol=0)


def test_scalars_of_torch_are_numbers() -> None:
    plain = build_loss("sogclr", num_samples=N, embed_dim=D, gamma=0.5)
    torchs = build_loss("sogclr", num_samples=torch.tensor(N), embed_dim=torch.tensor(D), gamma=torch.tensor(0.5))
    assert plain.arguments == torchs.arguments


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("num_samples", torch.tensor([9])),
        ("num_samples", torch.tensor(9.5)),
        ("num_samples", torch.tensor(True)),
        ("steps_per_epoch", -1),
        ("steps_per_epoch", 2.5),
        ("num_samples", "9"),
    ],
)
def test_sizes_are_whole_numbers(argument: str, value: object) -> None:
    with pytest.raises(ValueError, match=f"objective clip: {argument}"):
        build_loss("clip", **{"num_samples": N, "embed_dim": D, argument: value})
