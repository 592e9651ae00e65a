"""The measure that lets a temperature network start: its rule, its state, and a plain loop that it makes safe."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import Tensor, nn

from disttempnet import Features, build_loss
from disttempnet.losses.temperature.lead import Lead, LeadNumbers
from tests.losses.scenario import EVERY, local_rows, make, stream, unique_batch, values

close = torch.testing.assert_close
AHEAD = {**EVERY["disttempnet-v1"], "tau_start": "ahead", "tau_lr": 0.05}  # its pairs are ahead from the first step


def observed(lead: Lead, moment: float, divergence: float) -> None:
    m = torch.full((2, 3), moment, dtype=torch.float64)
    lead.observe(m - divergence, m, torch.ones(3, dtype=torch.bool), epoch=4.5)


def ahead(moment: float, divergence: float, rho: float) -> bool:
    """The mean of d/τ is m − 2 KL and its deviation √(2 KL): the pair is ahead of what lies √(2ρ) deviations up."""
    return moment - 2 * divergence + math.sqrt(2 * rho) * math.sqrt(2 * divergence) <= 0


def test_the_rule_holds_for_running_means() -> None:
    """KL rises and m falls by the step; the decision is the twin's, one step later, and stays."""
    lead, rho, m, kl, decided = Lead(2.9), 2.9, 0.0, 0.0, []
    for step in range(120):
        moment, divergence = 1.0 - 0.05 * step, 0.02 * step
        m, kl = (moment, divergence) if step == 0 else (0.95 * m + 0.05 * moment, 0.95 * kl + 0.05 * divergence)
        decided.append(ahead(m, kl, rho))
        observed(lead, moment, divergence)
        assert lead.reached == any(decided[:-1]), step
        if lead.reached:
            break
        assert lead.numbers[4:] == pytest.approx((m, kl))
    assert 40 < step < 110, "the case should cross in the middle"
    assert lead.epoch == 4


def test_the_first_twenty_steps_do_not_decide() -> None:
    lead, reached = Lead(1.0), []
    for _ in range(25):
        observed(lead, -3.0, 0.5)
        reached.append(lead.reached)
    assert reached == [False] * 20 + [True] * 5


def test_rows_without_negatives_or_not_finite_do_not_count() -> None:
    lead = Lead(1.0)
    moment = torch.tensor([[-1.0, 5.0, torch.nan], [-3.0, 5.0, torch.inf]])
    counted = torch.tensor([True, False, True])
    lead.observe(moment - 0.5, moment, counted, epoch=0)
    assert lead.numbers[4:] == pytest.approx((-2.0, 0.5))
    lead.observe(moment * torch.nan, moment, counted, epoch=0)
    assert lead.numbers[4:] == pytest.approx((-2.0, 0.5))


def train(recipe: dict, steps: int, cut: int = -1) -> tuple[list[Tensor], list[float]]:
    """SGD over the networks alone, in a new loss and optimizer from step `cut` on; this rank's rows."""

    def built() -> tuple[nn.Module, torch.optim.Optimizer]:
        loss = make(recipe)
        return loss, torch.optim.SGD(loss.parameter_groups(), lr=1.0, momentum=0.9)

    (loss, optimizer), started = built(), []
    for number, batch in enumerate(stream(steps)):
        if number == cut:
            saved = copy.deepcopy((loss.state_dict(), optimizer.state_dict()))
            loss, optimizer = built()
            loss.load_state_dict(saved[0])
            optimizer.load_state_dict(saved[1])
        loss.set_epoch(number // 10)
        out = loss(Features.unit(local_rows(batch.x), local_rows(batch.y)), local_rows(batch.ids))
        optimizer.zero_grad()
        out.total.backward()
        optimizer.step()
        started.append(out.metrics["tau_started"].item())
    return values(loss), started


def test_networks_stay_until_the_pairs_are_ahead() -> None:
    loss = make(AHEAD)
    optimizer = torch.optim.AdamW(loss.parameter_groups(), lr=1.0)
    before, moved = values(loss), []
    for batch in stream(24):
        loss.set_epoch(batch.epoch)
        optimizer.zero_grad()
        loss(Features.unit(batch.x, batch.y), batch.ids).total.backward()
        optimizer.step()
        moved.append(any(not torch.equal(a, b) for a, b in zip(before, values(loss), strict=True)))
    assert moved == [False] * 20 + [True] * 4
    (steps,) = {int(state["step"]) for state in optimizer.state.values()}
    assert steps == 4, "no moments of the steps that were waited out"
    assert loss.temperature.learning_rate(10) == pytest.approx(0.05), "the rate falls from the epoch of the start on"
    assert loss.temperature.learning_rate(12) == pytest.approx(0.05 * 0.9**2)
    assert loss.temperature.learning_rate(3) == pytest.approx(0.05), "once started it stays started"


@pytest.mark.filterwarnings("ignore:rho:UserWarning")
def test_networks_whose_pairs_are_not_ahead_wait() -> None:
    parameters, started = train({**AHEAD, "rho": 9.0}, 30)
    assert started == [0.0] * 30
    close(parameters, values(make({**AHEAD, "rho": 9.0})), rtol=0, atol=0)


def test_the_epoch_counts_as_well() -> None:
    _, started = train({**AHEAD, "tau_start_epoch": 3}, 28)
    assert started[-1] == 1.0
    parameters, _ = train({**AHEAD, "tau_start_epoch": 3}, 30)
    close(parameters, values(make(AHEAD)), rtol=0, atol=0)
    parameters, _ = train({**AHEAD, "tau_start_epoch": 3}, 31)
    assert any(not torch.equal(a, b) for a, b in zip(parameters, values(make(AHEAD)), strict=True))


@pytest.mark.parametrize("cut", [7, 20, 21, 24])
def test_a_resumed_run_starts_at_the_same_step(cut: int) -> None:
    """Before the first decision, with one on its way, and after the start."""
    parameters, started = train(AHEAD, 26, cut)
    expected, told = train(AHEAD, 26)
    assert started == told
    close(parameters, expected, rtol=0, atol=0)


@pytest.mark.parametrize("world_size", [2, 4])
def test_world_size_is_invisible(gloo, world_size: int) -> None:
    expected, told = train(AHEAD, 24)
    assert told == [0.0] * 20 + [1.0] * 4
    for parameters, started in gloo(world_size, train, AHEAD, 24):
        assert started == told
        close(parameters, expected, rtol=1e-9, atol=1e-9)


def test_a_state_saved_without_it_begins_to_measure() -> None:
    old, loss = make({**AHEAD, "tau_start": "epoch"}), make(AHEAD)
    old(Features.unit(unique_batch(1).x, unique_batch(1).y), unique_batch(1).ids)
    loss.load_state_dict(old.state_dict())
    assert loss.temperature.lead.numbers == LeadNumbers()
    assert loss.temperature.started is False


def test_evaluation_measures_nothing() -> None:
    loss, batch = make(AHEAD).eval(), unique_batch(1)
    loss(Features.unit(batch.x, batch.y), batch.ids)
    assert loss.temperature.lead.numbers == LeadNumbers()


def learned(start: str) -> tuple[Tensor, bool]:
    """τ [2, 640] after ten epochs of a plain loop from scratch, at a rate of 1e-3 from step 0."""
    generator = torch.Generator().manual_seed(0)
    meaning = torch.randn(640, 24, generator=generator)
    images, texts = (
        torch.tanh(meaning @ torch.randn(24, width, generator=generator) / 24**0.5)
        + 0.5 * torch.randn(640, width, generator=generator)
        for width in (64, 48)
    )
    torch.manual_seed(0)
    image, text = nn.Linear(64, 32), nn.Linear(48, 32)
    for tower in (image, text):
        nn.init.constant_(tower.bias, 1.0)  # all features alike in the beginning, as those of deep towers are
    loss = build_loss("disttempnet-v1", num_samples=640, embed_dim=32, tau_lr=1e-3, tau_start=start)
    towers = [*image.parameters(), *text.parameters()]
    optimizer = torch.optim.AdamW([{"params": towers}, *loss.parameter_groups()], lr=1e-3)
    generator = torch.Generator().manual_seed(1)
    for epoch in range(10):
        loss.set_epoch(epoch)
        for ids in torch.randperm(640, generator=generator).split(32):
            out = loss(Features.of(image(images[ids]), text(texts[ids])), ids)
            optimizer.zero_grad()
            out.total.backward()
            optimizer.step()
    with torch.no_grad():
        features = Features.of(image(images), text(texts))
        return loss.temperatures(features.image, features.text), bool(out.metrics.get("tau_started", 1.0))


def test_a_plain_loop_ends_inside_the_bounds() -> None:
    """Without the measure τ falls while all similarities are alike, and hardly returns."""
    (gated, started), (plain, _) = learned("ahead"), learned("epoch")
    assert started
    assert gated.min() > 3 * 0.005
    assert gated.max() < 0.5 * 0.2
    assert (gated.mean(1) > 1.7 * plain.mean(1)).all()
