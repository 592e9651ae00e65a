"""Parameters of the losses in optimizers: groups, rates inside the step, warnings."""

from __future__ import annotations

import copy
import re
import warnings

import pytest
import torch
from torch import Tensor, nn

from disttempnet import OBJECTIVES, Features, build_loss
from disttempnet.errors import UserNotice
from disttempnet.losses.own_parameters import STEPS_UNTIL_FORGOTTEN
from disttempnet.losses.temperature import network
from tests.losses.scenario import EVERY, D, GlobalBatch, N, every_objective, make, unique_batch, values

close = torch.testing.assert_close
OWN_RATE = {
    "clip-network": 0.01, "tempnet": 0.01, "disttempnet": 0.01, "disttempnet-v1": 0.01,
    "clip": 0.01, "fastclip-v0": 0.01, "fastclip-v3": 0.01, "fastclip-v3-constant-gamma": 0.01,
    "neuclip": 0.01, "scent": 0.01, "drrho-learnable": 0.01,
}  # fmt: skip
WITH_TOWERS = {"amorlip", "siglip", "cyclip"}
NETWORK = {**EVERY["disttempnet-v1"], "dropout": 0.0, "tau_start_epoch": 1, "tau_lr_decay": 0.5}


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
        "neuclip": 2e-4, "scent": 6.25e-5, "drrho-learnable": 2e-4, "amorlip": None,
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
