"""The estimator against its slow twin: values, gradients, state; in one process, over gloo ranks, at its edges."""

from __future__ import annotations

import math
import warnings

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from disttempnet import OBJECTIVES, Features, distributed
from disttempnet.errors import UserError
from disttempnet.losses.contrast import blocks
from tests.losses.oracle import Twin, inner_rate, written_objective, written_objective_repeated
from tests.losses.scenario import (
    CONSTANT,
    EVERY,
    NETWORK,
    B,
    D,
    GlobalBatch,
    N,
    assert_same_steps,
    descend,
    joined,
    leaves,
    local_rows,
    make,
    pairs,
    run,
    step,
    stream,
    unique_batch,
)
from tests.losses.twin_network import MODES, twin_taus, weights_of

GAMMAS = (1.0, 0.8, 0.2)
COSINE = {**NETWORK, "name": "disttempnet-v1", "tau_initial": 0, "gamma_min": 0.2, "gamma_decay_epochs": 2}
del COSINE["gamma"]
close = torch.testing.assert_close
TIGHT = {"rtol": 1e-11, "atol": 1e-12}


# ---- against the twin, one process ----


@pytest.mark.parametrize("gamma", GAMMAS)
@pytest.mark.parametrize("temperature", [0.05, 0.5])
def test_constant_temperature_follows_the_twin(gamma: float, temperature: float) -> None:
    loss = make(CONSTANT, temperature=temperature, gamma=gamma)
    twin, tau = Twin(), torch.full((2, B), temperature, dtype=torch.float64)
    for batch in stream(6):
        expected, actual = twin.step(batch.x, batch.y, batch.ids, tau, gamma), step(loss, batch)
        assert actual.total.item() == pytest.approx(expected.value, rel=1e-12)
        close(actual.grad_x, expected.grad_x, **TIGHT)
        close(actual.grad_y, expected.grad_y, **TIGHT)
        close(actual.log_u, expected.log_u, **TIGHT)
    everyone = torch.arange(N)
    close(loss.state.read(everyone), twin.log_u(everyone.tolist()), **TIGHT)
    assert twin.log_u(everyone.tolist()).isinf().any(), "the stream should leave a sample unvisited"


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("gamma", GAMMAS)
def test_network_temperature_follows_the_twin(gamma: float, mode: str) -> None:
    """Also every parameter of both networks: ∂θ = Σ_i (c/B) h_i ∂τ_i/∂θ, through an own network twin."""
    loss = make(NETWORK, gamma=gamma, tau_gradient=mode)
    twin = Twin(rho=NETWORK["rho"], tau_gradient=mode)
    for batch in stream(5):
        actual = step(loss, batch)
        parameters = weights_of(loss)
        tau = twin_taus(parameters, batch.x, batch.y, NETWORK)
        expected = twin.step(batch.x, batch.y, batch.ids, tau, gamma)
        assert actual.total.item() == pytest.approx(expected.value, rel=1e-11)
        close(actual.grad_x, expected.grad_x, **TIGHT)
        close(actual.grad_y, expected.grad_y, **TIGHT)
        close(actual.log_u, expected.log_u, **TIGHT)
        (expected.grad_tau * tau).sum().backward()
        for name, parameter in parameters.named():
            close(actual.parameters[name], parameter.grad, rtol=1e-9, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}")
        assert expected.h.abs().max() > 0.1, "hardly any τ-gradient: the case says little"
        descend(loss, 0.3)


@pytest.mark.parametrize(("name", "mode"), [*(("disttempnet-v1", mode) for mode in MODES), ("clip-network", "fcco")])
def test_the_mlp_as_it_comes_follows_the_twin(name: str, mode: str) -> None:
    """Its network (features times √D) and bounds, with a ρ for eight rows and γ(epoch), or in CLIP's cross-entropy.

    The networks start with every τ alike, and no gradient in their first layer: the later steps have both.
    """
    recipe = {**OBJECTIVES[name].arguments, "name": name}
    assert (recipe["network"], recipe["feature_scale"]) == ("mlp", 0.0)
    robust = name == "disttempnet-v1"
    if robust:
        recipe.update(tau_gradient=mode, gamma_min=0.2, gamma_decay_epochs=2.0, rho=0.6)
    loss, twin = make(recipe), Twin(0.6 if robust else 0.0, mode, robust)
    for number, batch in enumerate(stream(5)):
        actual, parameters = step(loss, batch), weights_of(loss)
        tau = twin_taus(parameters, batch.x, batch.y, recipe)
        gamma = inner_rate(batch.epoch, 0.2, 2) if robust else None
        expected = twin.step(batch.x, batch.y, batch.ids, tau, gamma)
        assert actual.total.item() == pytest.approx(expected.value, rel=1e-11)
        close(actual.grad_x, expected.grad_x, **TIGHT)
        close(actual.grad_y, expected.grad_y, **TIGHT)
        if robust:
            close(actual.log_u, expected.log_u, **TIGHT)
        (expected.grad_tau * tau).sum().backward()
        named = dict(parameters.named())
        assert set(actual.parameters) == set(named), "every parameter of the loss is one of the networks'"
        for key, parameter in named.items():
            close(actual.parameters[key], parameter.grad, rtol=1e-9, atol=1e-12, msg=lambda m, n=key: f"{n}: {m}")
            assert number == 0 or parameter.grad.abs().max() > 1e-6, f"{key}: hardly any gradient"
        descend(loss, 3.0 if robust else 0.1)
    assert tau.std(1).min() > 1e-3, "the temperatures hardly differ: the case says little"


@pytest.mark.parametrize("limit", [5.0, 0.0])
@pytest.mark.parametrize("gamma", [0.8, 0.2])
def test_only_what_staleness_adds_is_limited(gamma: float, limit: float) -> None:
    """A state far from the batch moves h by at most the limit from the batch's own h; without one by more than 5."""
    recipe = {**NETWORK, "tau_min": 0.005, "tau_max": 0.05, "tau_gradient_limit": limit}
    twin, loss = Twin(rho=NETWORK["rho"], limit=limit or math.inf), make(recipe, gamma=gamma)
    batches = [GlobalBatch(*pairs(B, seed), torch.arange(B), 0) for seed in (3, 4, 5)]
    for batch in batches:
        actual, parameters = step(loss, batch), weights_of(loss)
        tau = twin_taus(parameters, batch.x, batch.y, recipe)
        expected = twin.step(batch.x, batch.y, batch.ids, tau, gamma)
        (expected.grad_tau * tau).sum().backward()
        for name, parameter in parameters.named():
            close(actual.parameters[name], parameter.grad, rtol=1e-8, atol=1e-12)
    free = Twin(rho=NETWORK["rho"], tau_gradient="batch")
    batch_h = free.step(batch.x, batch.y, batch.ids, tau, gamma).h
    moved = (expected.h - batch_h).abs().max().item()
    assert moved == pytest.approx(5.0) if limit else moved > 10, "this case should reach the limit"
    assert batch_h.max() <= NETWORK["rho"]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("eps", "drift"), [(0.05, 0.0), (0.0, 0.3), (0.05, 1.0)])
@pytest.mark.parametrize("gamma", [0.8, 0.2])
def test_eps_and_drift_follow_the_twin(gamma: float, eps: float, drift: float, mode: str) -> None:
    """Value, gradients, table, and τ's gradient by one learnable τ; with a limit that is reached."""
    recipe = {"name": "fastclip-v3-constant-gamma", "temperature": 0.06, "rho": 1.2, "gamma": gamma, "eps": eps}
    loss = make({**recipe, "drift": drift, "tau_gradient": mode, "tau_gradient_limit": 0.5})
    twin, plain = Twin(1.2, mode, limit=0.5, eps=eps, drift=drift), Twin(1.2, mode, limit=0.5)
    one = math.exp(-loss.temperature.logit_scale.item())  # .06, but begun in float32
    tau = torch.full((2, B), one, dtype=torch.float64)
    for batch in stream(6):
        actual = step(loss, batch)
        expected = twin.step(batch.x, batch.y, batch.ids, tau, gamma)
        assert actual.total.item() == pytest.approx(expected.value, rel=1e-11)
        close(actual.grad_x, expected.grad_x, **TIGHT)
        close(actual.grad_y, expected.grad_y, **TIGHT)
        close(actual.log_u, expected.log_u, **TIGHT)
        (gradient,) = actual.parameters.values()
        close(gradient, -one * expected.grad_tau.sum(), rtol=1e-9, atol=1e-11)
        other = plain.step(batch.x, batch.y, batch.ids, tau, gamma)
    assert abs(other.value - expected.value) > 1e-4 * abs(expected.value), "the case says little"


@pytest.mark.parametrize(
    ("recipe", "learns"),
    [
        ({"name": "scent", "temperature": 0.06, "rho": 1.2, "eps": 1e-3, "scent_log_a": 3.0}, True),
        ({**CONSTANT, "scent": True, "scent_log_a": 2.0}, False),
        ({**CONSTANT, "scent": True, "scent_log_a": 3.0, "eps": 0.01, "drift": 0.3}, False),
    ],
    ids=["scent", "sogclr", "sogclr ε drift"],
)
def test_a_gamma_of_each_sample_follows_the_twin(recipe: dict, learns: bool) -> None:
    """γ_i = σ(log (ε + u_i) + log a), with the u before the visit: value, gradients, table."""
    loss = make(recipe)
    twin = Twin(recipe.get("rho", 0.0), eps=recipe.get("eps", 0.0), drift=recipe.get("drift", 0.0))
    one = math.exp(-loss.temperature.logit_scale.item()) if learns else recipe["temperature"]
    tau, rates, a = torch.full((2, B), one, dtype=torch.float64), [], math.exp(recipe["scent_log_a"])

    def rate(v: float) -> float:
        rates.append(a * v / (1 + a * v))
        return rates[-1]

    for batch in stream(6):
        actual, expected = step(loss, batch), twin.step(batch.x, batch.y, batch.ids, tau, rate)
        assert actual.total.item() == pytest.approx(expected.value, rel=1e-11)
        close(actual.grad_x, expected.grad_x, **TIGHT)
        close(actual.grad_y, expected.grad_y, **TIGHT)
        close(actual.log_u, expected.log_u, **TIGHT)
        for gradient in actual.parameters.values():
            close(gradient, -one * expected.grad_tau.sum(), rtol=1e-9, atol=1e-11)
    assert min(rates) < 0.3
    assert max(rates) > 0.7


def test_the_gamma_that_is_logged_is_the_mean_of_all_rows() -> None:
    """First visits have γ = 1, also with ε, whose logarithm is no visit."""
    for eps in (0.0, 0.1):
        loss = make({**CONSTANT, "scent": True, "scent_log_a": 2.0, "eps": eps})
        first, second = unique_batch(1), unique_batch(2)
        assert step(loss, first).metrics["gamma"] == 1
        u = loss.state.read(second.ids).exp()
        expected = torch.where(u > 0, 1 / (1 + math.exp(-2.0) / (eps + u)), 1.0).mean()
        close(step(loss, second).metrics["gamma"], expected, rtol=1e-12, atol=0)
        assert 0 < (u > 0).sum() < u.numel()


# ---- the hinge form ----

TUNECLIP = {"name": "tuneclip", "temperature": 0.05, "margin": 0.1}


@pytest.mark.parametrize(("margin", "temperature"), [(0.1, 0.05), (0.6, 0.3), (2.0, 0.5), (0.0, 0.1)])
@pytest.mark.parametrize("gamma", [1.0, 0.2])
def test_the_hinge_form_follows_the_twin(
    gamma: float, margin: float, temperature: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In blocks of 5 × 3; margins from that of no negative within reach to that of all."""
    monkeypatch.setitem(blocks.BLOCKS, "cpu", (5, 3))
    recipe = {**TUNECLIP, "margin": margin, "temperature": temperature, "gamma": gamma, "eps": 0.01, "scent": False}
    loss, twin = make(recipe), Twin(eps=0.01, margin=margin)
    tau, gradients = torch.full((2, B), temperature, dtype=torch.float64), []
    for batch in stream(6):
        expected, actual = twin.step(batch.x, batch.y, batch.ids, tau, gamma), step(loss, batch)
        assert actual.total.item() == pytest.approx(expected.value, rel=1e-11)
        close(actual.grad_x, expected.grad_x, **TIGHT)
        close(actual.grad_y, expected.grad_y, **TIGHT)
        close(actual.log_u, expected.log_u, **TIGHT)
        gradients.append(expected.grad_x.abs().max().item())
    assert max(gradients) > 1e-3


def test_the_hinge_form_is_autograd_of_the_objective() -> None:
    """τ mean log (ε + mean_j exp([d_ij + m]₊²/τ)), at γ = 1; a pair that leads all negatives by m has no gradient."""
    m, tau, eps = 0.3, 0.1, 0.02
    x, y = leaves(unique_batch(7))
    total = x.new_zeros(())
    for s in (x @ y.T, y @ x.T):
        gaps = (s - s.diagonal()[:, None] + m)[~torch.eye(B, dtype=torch.bool)].view(B, B - 1).clamp(min=0)
        total = total + 0.5 * tau * (eps + (gaps**2 / tau).exp().mean(1)).log().mean()
    total.backward()
    loss = make({**TUNECLIP, "margin": m, "temperature": tau, "eps": eps, "gamma": 1.0})
    step(loss, unique_batch(6))
    actual = step(loss, unique_batch(7))
    close(actual.total, total.detach(), **TIGHT)
    close(actual.grad_x, x.grad, **TIGHT)
    close(actual.grad_y, y.grad, **TIGHT)
    axes = GlobalBatch(torch.eye(D, dtype=torch.float64), torch.eye(D, dtype=torch.float64), torch.arange(D))
    far = step(make({**TUNECLIP, "margin": 0.9}), axes)
    assert far.total == 0
    assert not far.grad_x.any()
    close(far.log_u, torch.zeros(2, D, dtype=torch.float64), rtol=0, atol=0)


def test_the_kernels_have_no_hinge_form(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DISTTEMPNET_KERNEL", "triton")
    with pytest.raises(UserError, match="triton: the kernels have no hinge form"):
        step(make(TUNECLIP), unique_batch(1))
    monkeypatch.setenv("DISTTEMPNET_KERNEL", "auto")
    step(make(TUNECLIP), unique_batch(1))


def test_a_common_move_of_all_normalisers_is_undone_at_drift_one() -> None:
    """A waits while all log g of the others fall by 3: its u is read as if it had fallen with them."""
    loss = make({**CONSTANT, "gamma": 0.5, "drift": 1.0})
    first, second = torch.tensor([[-1.0, -2.0], [-1.0, -1.0]]), torch.tensor([[-4.0, -5.0], [0.5, 0.5]])
    a, b = torch.tensor([0, 1]), torch.tensor([2, 3])
    loss._track(a, first.double(), distinct=True)
    loss._track(b, second.double(), distinct=True)
    g = torch.tensor([[-4.0, -5.0], [1.5, 1.5]]).double()
    log_u, _ = loss._track(a, g, distinct=True)
    # image side: M from −1.5 to −4.5, u from −1 to −4 = g; text side: M from −1 to 1.5, u from −1 to 1.5 = g
    close(log_u, g, rtol=0, atol=1e-12)


def test_a_state_saved_without_drift_goes_on_with_it() -> None:
    """Nothing has moved before the first step with it: that step is the one without."""
    old, plain, moving = make(CONSTANT), make(CONSTANT), make({**CONSTANT, "drift": 0.5})
    batches = [unique_batch(seed) for seed in (1, 2, 3)]
    step(old, batches[0])
    for loss in (plain, moving):
        loss.load_state_dict(old.state_dict())
    assert_same_steps([step(moving, batches[1])], [step(plain, batches[1])], tolerance=0)
    assert step(moving, batches[2]).total != step(plain, batches[2]).total


def test_rows_that_are_not_finite_do_not_move_the_mean() -> None:
    loss, batch = make({**CONSTANT, "drift": 0.5}), unique_batch(1)
    step(loss, batch)
    before = loss.drift.numbers
    bad = batch.x.clone()
    bad[3] = torch.inf
    step(loss, GlobalBatch(bad, batch.y, batch.ids))
    after = loss.drift.numbers
    assert all(math.isfinite(number) for number in after)
    assert after.text == before.text, "every text is contrasted with the bad image"
    assert after.image_first == before.image_first
    assert after.image != before.image


# ---- against autograd of the written objective ----


def test_gamma_one_is_autograd_of_the_objective_constant() -> None:
    batch, tau = unique_batch(7), 0.07
    loss = make(CONSTANT, temperature=tau, gamma=1.0)
    step(loss, unique_batch(6))  # at γ = 1 the past does not count
    actual = step(loss, batch)
    x, y = batch.x.clone().requires_grad_(), batch.y.clone().requires_grad_()
    value = written_objective(x, y, torch.full((2, B), tau, dtype=torch.float64), rho=0.0)
    value.backward()
    close(actual.total, value.detach(), **TIGHT)
    close(actual.grad_x, x.grad, **TIGHT)
    close(actual.grad_y, y.grad, **TIGHT)


def test_gamma_one_is_autograd_of_the_objective_with_repeated_ids() -> None:
    x, y = (rows.requires_grad_() for rows in pairs(B, 8))
    ids, tau = torch.tensor([3, 5, 3, 1, 0, 5, 3, 9]), 0.07
    value = written_objective_repeated(x, y, ids, tau)
    value.backward()
    actual = step(make(CONSTANT, temperature=tau, gamma=1.0), GlobalBatch(x.detach(), y.detach(), ids))
    close(actual.total, value.detach(), **TIGHT)
    close(actual.grad_x, x.grad, **TIGHT)
    close(actual.grad_y, y.grad, **TIGHT)


@pytest.mark.parametrize("name", ["fastclip-v3", "fastclip-v0", "sogclr"])
def test_gamma_one_is_autograd_of_the_objective_with_eps(name: str) -> None:
    """ε from far below g to far above it; value, features, and the one learned τ."""
    robust, learns = name != "fastclip-v0", name != "sogclr"
    recipe = {**EVERY[name], "temperature": 0.1} | ({"gamma_min": 1.0} if learns else {"gamma": 1.0})
    for eps in (1e-6, 1e-2, 1.0):
        loss, batch = make({**recipe, "eps": eps}), unique_batch(9)
        step(loss, unique_batch(10))
        actual = step(loss, batch)
        x, y = leaves(batch)
        # a learnable τ starts in float32
        start = torch.tensor(-math.log(0.1), dtype=torch.float32 if learns else torch.float64)
        scale = start.double().requires_grad_()
        rho = 1.2 if robust and learns else 0.0
        value = written_objective(x, y, (-scale).exp().expand(2, B), rho, robust, eps)
        value.backward()
        close(actual.total, value.detach(), **TIGHT)
        close(actual.grad_x, x.grad, **TIGHT)
        close(actual.grad_y, y.grad, **TIGHT)
        for gradient in actual.parameters.values():
            close(gradient, scale.grad, rtol=1e-9, atol=1e-11)


def test_dcl_is_cross_entropy_without_the_pair() -> None:
    """½ mean_i Σ_sides [log Σ_{j≠i} exp(s_ij/τ) − s_ii/τ], which remembers nothing; equal ids are no negatives."""
    loss = make({"name": "dcl", "temperature": 0.07})
    step(loss, unique_batch(10))
    for ids in (torch.arange(B), torch.tensor([3, 5, 3, 1, 0, 5, 3, 9])):
        x, y = leaves(unique_batch(7))
        logits = x @ y.T / 0.07
        others = torch.where(ids[:, None] == ids[None, :], -torch.inf, logits)
        value = 0.5 * (others.logsumexp(1) + others.logsumexp(0) - 2 * logits.diagonal()).mean()
        value.backward()
        actual = step(loss, GlobalBatch(x.detach(), y.detach(), ids))
        close(actual.total, value.detach(), **TIGHT)
        close(actual.grad_x, x.grad, **TIGHT)
        close(actual.grad_y, y.grad, **TIGHT)
    assert OBJECTIVES["dcl"].bytes_a_sample() == 0
    assert not [key for key in loss.state_dict() if "log_u" in key]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", ["tempnet", "disttempnet", "disttempnet-v1"])
def test_gamma_one_is_autograd_of_the_objective_network(name: str, mode: str) -> None:
    """Features (through d only: the networks read detached features) and all parameters of both networks."""
    recipe = {**NETWORK, "name": name, "gamma": 1.0, "tau_gradient": mode, "rho": 1.4}
    if name == "disttempnet-v1":
        del recipe["gamma"]
        recipe.update(gamma_min=0.2, gamma_decay_epochs=3, tau_initial=0)  # γ(0) = 1
    loss, batch = make(recipe), unique_batch(9)
    step(loss, unique_batch(10))
    actual, parameters = step(loss, batch), weights_of(loss)
    x, y = batch.x.clone().requires_grad_(), batch.y.clone().requires_grad_()
    value = written_objective(x, y, twin_taus(parameters, x, y, recipe), recipe["rho"])
    value.backward()
    close(actual.total, value.detach(), rtol=1e-11, atol=1e-12)
    close(actual.grad_x, x.grad, **TIGHT)
    close(actual.grad_y, y.grad, **TIGHT)
    named = dict(parameters.named())
    assert set(actual.parameters) == set(named), "every parameter of the loss is one of the networks'"
    for key, parameter in named.items():
        close(actual.parameters[key], parameter.grad, rtol=1e-9, atol=1e-13, msg=lambda m, n=key: f"{n}: {m}")


# ---- world size is invisible ----

RECIPES = {
    "constant γ.2": {**CONSTANT, "gamma": 0.2},
    "constant γ1": {**CONSTANT, "gamma": 1.0},
    "network batch γ.8": {**NETWORK, "dropout": 0.5, "tau_gradient": "batch"},
    "network fcco γ.2": {**NETWORK, "dropout": 0.5, "gamma": 0.2, "tau_gradient": "fcco"},
    "network fcco γ1": {**NETWORK, "dropout": 0.5, "gamma": 1.0, "tau_gradient": "fcco"},
    "network more prototypes than rows": {**NETWORK, "dropout": 0.5, "prototypes": 13},
    "network dist": {**NETWORK, "dropout": 0.5, "network": "dist"},
    "constant ε, drift": {**CONSTANT, "gamma": 0.2, "eps": 1e-3, "drift": 0.3},
    "network ε, drift": {**NETWORK, "gamma": 0.2, "eps": 1e-2, "drift": 0.3, "tau_gradient_limit": 1.0},
    "dcl": {"name": "dcl"},
    "network mlp": {**NETWORK, "dropout": 0.5, "network": "mlp", "tau_gradient": "batch"},
}


@pytest.mark.parametrize("world_size", [2, 4])
@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES.keys())
def test_world_size_is_invisible(gloo, recipe: dict, world_size: int) -> None:
    """Features, networks (mean over ranks), state, value and metrics, with parameters that move between steps."""
    batches = stream(5, seed=3)
    assert_same_steps(joined(gloo(world_size, run, recipe, batches)), run(recipe, batches))


class Model(nn.Module):
    """Linear towers and the objective, as one module: the way it is trained."""

    def __init__(self, recipe: dict) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.image, self.text = nn.Linear(9, D).double(), nn.Linear(7, D, bias=False).double()
        self.loss = make(recipe)

    def forward(self, pixels: Tensor, tokens: Tensor, ids: Tensor) -> Tensor:
        return self.loss(Features.of(self.image(pixels), self.text(tokens)), ids).total


def train_towers(recipe: dict, steps: int = 4) -> tuple[dict[str, Tensor], Tensor, list[float]]:
    """Weights after some SGD steps, state of all samples, totals. Under torch.distributed through DDP."""
    model = Model(recipe)
    wrapped = distributed.data_parallel(model, torch.device("cpu"))
    towers = [*model.image.parameters(), *model.text.parameters()]
    groups = [group | {"lr": 0.5} for group in model.loss.parameter_groups()]
    optimizer = torch.optim.SGD([{"params": towers}, *groups], lr=0.5)
    totals = []
    for number, batch in enumerate(stream(steps, seed=5)):
        generator = torch.Generator().manual_seed(number)
        pixels = torch.randn(B, 9, dtype=torch.float64, generator=generator)
        tokens = torch.randn(B, 7, dtype=torch.float64, generator=generator)
        model.loss.set_epoch(batch.epoch)
        total = wrapped(local_rows(pixels), local_rows(tokens), local_rows(batch.ids))
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
        totals.append(total.item())
    weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    return weights, model.loss.state.read(torch.arange(N)), totals


LEARNING = {**COSINE, "dropout": 0.5, "tau_start_epoch": 0}


@pytest.mark.parametrize("world_size", [2, 4])
@pytest.mark.parametrize("recipe", [CONSTANT, LEARNING], ids=["sogclr", "disttempnet-v1"])
def test_data_parallel_training_is_one_process_training(gloo, recipe: dict, world_size: int) -> None:
    weights, state, totals = train_towers(recipe)
    start = Model(recipe).state_dict()
    assert not torch.equal(weights["image.weight"], start["image.weight"])
    for other_weights, other_state, other_totals in gloo(world_size, train_towers, recipe):
        close(other_weights, weights, rtol=1e-10, atol=1e-10)
        close(other_state, state, rtol=1e-10, atol=1e-10)
        assert other_totals == pytest.approx(totals, rel=1e-10)


# ---- edges ----


@pytest.mark.filterwarnings("ignore:rho:UserWarning")  # no ρ is below log(B − 1) = 0
@pytest.mark.parametrize("recipe", [CONSTANT, {**NETWORK, "rho": 0.5}], ids=["constant", "network"])
def test_two_rows(recipe: dict) -> None:
    """B = 2: one negative, so the softmax is a point, KL = 0 and ℓ = d/τ."""
    batch = GlobalBatch(*pairs(2, 1), torch.tensor([4, 11]))
    actual, loss = step(loss := make(recipe), batch), loss
    tau = loss.temperatures(batch.x, batch.y).double()
    twin = Twin(rho=recipe.get("rho", 0.0))
    expected = twin.step(batch.x, batch.y, batch.ids, tau, 0.8)
    assert actual.total.item() == pytest.approx(expected.value, rel=1e-12)
    close(actual.grad_x, expected.grad_x, **TIGHT)
    close(actual.grad_y, expected.grad_y, **TIGHT)
    close(actual.log_u, expected.log_u, **TIGHT)
    s = batch.x @ batch.y.T
    close(actual.log_u[0], torch.stack([s[0, 1] - s[0, 0], s[1, 0] - s[1, 1]]) / tau[0], **TIGHT)
    close(expected.h, torch.full((2, 2), twin.rho, dtype=torch.float64), rtol=0, atol=1e-12)


@pytest.mark.parametrize("visited", [False, True])
@pytest.mark.parametrize("recipe", [CONSTANT, NETWORK], ids=["constant", "network"])
def test_without_negatives_nothing_happens(recipe: dict, visited: bool) -> None:
    """All ids equal: no contrast, so a finite value, zero gradients and an untouched state."""
    loss = make(recipe)
    if visited:
        step(loss, GlobalBatch(*pairs(B, 2), torch.arange(B)))
    before = loss.state.read(torch.arange(N)).clone()
    actual = step(loss, GlobalBatch(*pairs(B, 1), torch.full((B,), 3)))
    assert actual.total.isfinite()
    assert all(value.isfinite() for value in actual.metrics.values())
    close(actual.grad_x, torch.zeros_like(actual.grad_x), rtol=0, atol=0)
    close(actual.grad_y, torch.zeros_like(actual.grad_y), rtol=0, atol=0)
    for gradient in actual.parameters.values():
        close(gradient, torch.zeros_like(gradient), rtol=0, atol=0)
    close(loss.state.read(torch.arange(N)), before, rtol=0, atol=0)


@pytest.mark.parametrize("gamma", [1.0, 0.2])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_smallest_temperature_and_extreme_similarities(gamma: float, dtype: torch.dtype) -> None:
    """|d|/τ = 400: e^400 is far outside float32. First the worst possible pairs, then the best, then the worst.

    So u is stale by hundreds of nats in both directions; all must stay finite, and right.
    """
    axis = F.one_hot(torch.arange(B) % 2, D).double() - F.one_hot((torch.arange(B) + 1) % 2, D).double()
    axis = F.normalize(axis, dim=1)  # two opposite directions: similarities are +1 or −1
    ids = torch.arange(B)
    loss, twin = make(CONSTANT, temperature=0.005, gamma=gamma), Twin()
    loss.to(dtype)
    tau = torch.full((2, B), 0.005, dtype=torch.float64)
    tolerance = {"rtol": 1e-9, "atol": 1e-9} if dtype == torch.float64 else {"rtol": 1e-4, "atol": 1e-5}
    for sign in (-1, 1, -1):
        actual = step(loss, GlobalBatch(axis.to(dtype), sign * axis.to(dtype), ids))
        expected = twin.step(axis, sign * axis, ids, tau, gamma)
        assert actual.total.dtype == actual.grad_x.dtype == dtype
        assert actual.total.item() == pytest.approx(expected.value, rel=1e-5)
        close(actual.log_u.double(), expected.log_u, **tolerance)
        close(actual.grad_x.double(), expected.grad_x, **tolerance)
        close(actual.grad_y.double(), expected.grad_y, **tolerance)
    assert expected.log_u.max() > 300


def test_smallest_temperature_keeps_the_networks_gradient_finite() -> None:
    recipe = {**NETWORK, "tau_min": 0.005, "tau_max": 0.006, "gamma": 0.2}
    loss = make(recipe).float()
    for seed, sign in enumerate((1, -1, 1)):
        x, _ = pairs(B, seed)
        actual = step(loss, GlobalBatch(x.float(), sign * x.float(), torch.arange(B)))
        for value in (actual.total, actual.grad_x, actual.grad_y, *actual.parameters.values()):
            assert value.isfinite().all()


# ---- number formats ----


@pytest.mark.parametrize("wanted", ["medium", "highest"])
def test_products_are_exact_inside_and_the_users_choice_stands_outside(wanted: str) -> None:
    """TF32 (float32 matmul precision below "highest") is off in the loss, whatever the user chose for the towers."""
    seen, chosen = set(), torch.get_float32_matmul_precision()

    class Precision(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if "mm" in function.__name__:
                seen.add(torch.get_float32_matmul_precision())
            return function(*args, **(kwargs or {}))

    loss, batch = make(NETWORK).float(), unique_batch(1)
    torch.set_float32_matmul_precision(wanted)
    try:
        with Precision():
            loss(Features.unit(batch.x.float(), batch.y.float()), batch.ids)
        assert torch.get_float32_matmul_precision() == wanted
    finally:
        torch.set_float32_matmul_precision(chosen)
    assert seen == {"highest"}


def test_float64_features_stay_float64_in_a_loss_that_was_not_converted() -> None:
    from disttempnet import build_loss

    loss = build_loss("sogclr", num_samples=N, embed_dim=D, temperature=0.05, gamma=0.8)
    twin, tau = Twin(), torch.full((2, B), 0.05, dtype=torch.float64)
    for batch in stream(3):
        actual, expected = step(loss, batch), twin.step(batch.x, batch.y, batch.ids, tau, 0.8)
        assert actual.total.dtype == torch.float64
        close(actual.grad_x, expected.grad_x, **TIGHT)


# ---- ρ out of reach ----

FRESH = {**NETWORK, "gamma": 1.0}
COSINE_OF_ONE = {**COSINE, "gamma_min": 1.0}


@pytest.mark.parametrize(
    ("recipe", "numbers"),
    [
        (FRESH, r"2\.95.*log\(B − 1\) = 1\.95 of a global batch of 8"),  # log(8 − 1) = 1.946
        (COSINE_OF_ONE, r"log\(B − 1\) = 1\.95"),
        ({**NETWORK, "tau_gradient": "batch"}, r"log\(B − 1\) = 1\.95"),
        (NETWORK, r"2\.95.*log\(N − 1\) = 2\.89 of 19 samples"),  # log(19 − 1) = 2.890
        (COSINE, r"log\(N − 1\) = 2\.89"),
    ],
    ids=["γ = 1", "cosine of 1", "batch", "memory", "cosine"],
)
def test_rho_out_of_reach_warns_once_with_both_numbers(recipe: dict, numbers: str) -> None:
    """KL(weights ‖ uniform) ≤ log(B − 1) where only the batch counts, log(N − 1) where u stands for the data set."""
    loss = make(recipe, rho=2.95)
    with pytest.warns(UserWarning, match=numbers) as caught:
        step(loss, unique_batch(1))
    assert len(caught) == 1
    assert caught[0].filename == step.__code__.co_filename, "it points at who called the objective"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        step(loss, unique_batch(2))


@pytest.mark.parametrize(
    ("recipe", "rho"),
    [(FRESH, math.log(B - 1) - 0.01), (NETWORK, math.log(B - 1) + 0.01), (NETWORK, math.log(N - 1) - 0.01)],
    ids=["γ = 1", "above the batch's", "memory"],
)
def test_rho_within_reach_is_silent(recipe: dict, rho: float) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        step(make(recipe, rho=rho), unique_batch(1))


@pytest.mark.filterwarnings("ignore:rho:UserWarning")
@pytest.mark.parametrize("gamma", [1.0, 0.1])
def test_a_tracked_u_follows_the_kl_over_the_data_set(gamma: float) -> None:
    """ρ above log(B − 1): h is positive without memory; with memory, and fixed features, it is ρ − KL of all N."""
    rho, tau = math.log(B - 1) + 0.1, 0.02
    x, y = pairs(N, 1, noise=1.0)
    d = (x @ y.T - (x * y).sum(1)[:, None])[~torch.eye(N, dtype=torch.bool)].view(N, -1)
    softmax = (d / tau).softmax(1)
    kl = (torch.special.xlogy(softmax, softmax).sum(1) + math.log(N - 1)).mean().item()
    loss = make({"name": "fastclip-v3-constant-gamma", "temperature": tau, "rho": rho, "gamma": gamma})
    loss.set_epoch(0)
    generator, h = torch.Generator().manual_seed(0), []
    for _ in range(400):
        ids = torch.randperm(N, generator=generator)[:B]
        with torch.no_grad():
            h.append(loss(Features.unit(x[ids], y[ids]), ids).metrics["tau_gradient/image_mean"].item())
    assert rho < kl
    mean = sum(h[100:]) / 300
    assert mean > 0.1 if gamma == 1 else mean == pytest.approx(rho - kl, abs=0.15)


# ---- properties ----

rows_and_seed = {"rows": st.integers(2, 9), "seed": st.integers(0, 10_000)}
quick = settings(max_examples=15, deadline=None, derandomize=True)


def visited(rows: int, seed: int, gamma: float = 0.6) -> tuple[nn.Module, Tensor]:
    """A loss that has seen some of its samples, and ids with a repetition now and then."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, N, (rows,), generator=generator)
    loss = make(CONSTANT, gamma=gamma)
    step(loss, GlobalBatch(*pairs(rows, seed + 1), torch.randint(0, N, (rows,), generator=generator)))
    return loss, ids


@quick
@given(**rows_and_seed)
def test_order_of_the_batch_does_not_matter(rows: int, seed: int) -> None:
    order = torch.randperm(rows, generator=torch.Generator().manual_seed(seed))
    (loss, ids), (again, _) = visited(rows, seed), visited(rows, seed)
    x, y = pairs(rows, seed)
    plain = step(loss, GlobalBatch(x, y, ids))
    mixed = step(again, GlobalBatch(x[order], y[order], ids[order]))
    close(mixed.total, plain.total, **TIGHT)
    close(mixed.grad_x, plain.grad_x[order], **TIGHT)
    close(mixed.grad_y, plain.grad_y[order], **TIGHT)
    close(mixed.log_u, plain.log_u[:, order], **TIGHT)


@quick
@given(**rows_and_seed)
def test_the_two_sides_are_mirror_images(rows: int, seed: int) -> None:
    x, y = pairs(rows, seed)
    ids = torch.arange(rows)
    plain = step(make(CONSTANT), GlobalBatch(x, y, ids))
    mirrored = step(make(CONSTANT), GlobalBatch(y, x, ids))
    close(mirrored.total, plain.total, **TIGHT)
    close(mirrored.grad_x, plain.grad_y, **TIGHT)
    close(mirrored.log_u, plain.log_u.flip(0), **TIGHT)


@quick
@given(**rows_and_seed)
def test_a_common_rotation_changes_nothing(rows: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    rotation = torch.linalg.qr(torch.randn(D, D, dtype=torch.float64, generator=generator))[0]
    x, y = pairs(rows, seed)
    ids = torch.arange(rows)
    plain = step(make(CONSTANT), GlobalBatch(x, y, ids))
    turned = step(make(CONSTANT), GlobalBatch(x @ rotation, y @ rotation, ids))
    close(turned.total, plain.total, rtol=1e-9, atol=1e-10)
    close(turned.grad_x, plain.grad_x @ rotation, rtol=1e-9, atol=1e-10)


@quick
@given(**rows_and_seed, gamma=st.floats(0.01, 1.0))
def test_state_moves_from_the_old_value_towards_the_batch(rows: int, seed: int, gamma: float) -> None:
    """u is a mean of old and new: log u lies between them, and |log u| ≤ 2/τ always."""
    ids = torch.arange(rows)
    first, second = pairs(rows, seed), pairs(rows, seed + 1)
    loss = make(CONSTANT, gamma=gamma)
    old = step(loss, GlobalBatch(*first, ids)).log_u
    new = step(loss, GlobalBatch(*second, ids)).log_u
    batch = step(make(CONSTANT), GlobalBatch(*second, ids)).log_u
    assert (new >= torch.minimum(old, batch) - 1e-9).all()
    assert (new <= torch.maximum(old, batch) + 1e-9).all()
    assert new.abs().max() <= 2 / CONSTANT["temperature"] + 1e-9


@quick
@given(**rows_and_seed)
def test_value_grows_with_every_negative_similarity_and_falls_along_the_gradient(rows: int, seed: int) -> None:
    """At γ = 1 total is the objective: smaller when pairs agree better, and when one follows −∂."""
    x, y = pairs(rows, seed)
    ids = torch.arange(rows)

    def total(x: Tensor, y: Tensor) -> float:
        return step(make(CONSTANT, gamma=1.0, temperature=0.2), GlobalBatch(x, y, ids)).total.item()

    here = step(make(CONSTANT, gamma=1.0, temperature=0.2), GlobalBatch(x, y, ids))
    assert total(x - 1e-4 * here.grad_x, y - 1e-4 * here.grad_y) < here.total.item()
    anchor, column = 0, rows - 1
    # adding e ⟂ to all x but x_anchor raises s only for (anchor, column): column's own positive must not move
    others = torch.cat([x[1:], torch.zeros(1, D, dtype=x.dtype)])
    direction = x[anchor] - others.T @ torch.linalg.pinv(others.T) @ x[anchor]
    if rows <= D and direction.norm() > 1e-3:
        raised = y.clone()
        raised[column] += 0.1 * direction
        assert total(x, raised) > here.total.item()


@quick
@given(**rows_and_seed, gamma=st.floats(0.05, 1.0), tau=st.floats(0.02, 1.0))
def test_any_batch_follows_the_twin(rows: int, seed: int, gamma: float, tau: float) -> None:
    loss, twin = make(CONSTANT, gamma=gamma, temperature=tau), Twin()
    for number in range(2):
        ids = torch.randint(0, 5, (rows,), generator=torch.Generator().manual_seed(seed + number))
        x, y = pairs(rows, seed + number)
        actual = step(loss, GlobalBatch(x, y, ids))
        expected = twin.step(x, y, ids, torch.full((2, rows), tau, dtype=torch.float64), gamma)
        if len(set(ids.tolist())) > 1:
            assert actual.total.item() == pytest.approx(expected.value, rel=1e-10, abs=1e-12)
        close(actual.grad_x, expected.grad_x, rtol=1e-9, atol=1e-11)
        close(actual.grad_y, expected.grad_y, rtol=1e-9, atol=1e-11)
        close(actual.log_u, expected.log_u, rtol=1e-9, atol=1e-11)


def test_inner_rate_of_v1_reaches_the_state() -> None:
    """log u after two visits tells which γ was used: log((1−γ)u + γg)."""
    recipe = {**COSINE, "gamma_min": 0.3, "gamma_decay_epochs": 4}
    first, second = unique_batch(1), unique_batch(2)
    ids = torch.arange(B)
    for epoch in range(6):
        loss = make(recipe)
        u = step(loss, GlobalBatch(first.x, first.y, ids, 0)).log_u.exp()
        alone = step(make(recipe), GlobalBatch(second.x, second.y, ids, 0))
        after = step(loss, GlobalBatch(second.x, second.y, ids, epoch)).log_u.exp()
        # the prototypes of the fresh loss start from another batch: compare with its own τ instead of its g
        tau = loss.temperatures(second.x, second.y).double()
        g = Twin(rho=recipe["rho"]).step(second.x, second.y, ids, tau, 1.0).log_u.exp()
        gamma = inner_rate(epoch, 0.3, 4)
        close(after, (1 - gamma) * u + gamma * g, rtol=1e-10, atol=0)
        assert alone.log_u.isfinite().all()
