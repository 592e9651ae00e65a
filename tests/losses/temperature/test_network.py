"""The temperature networks: their formula, dropout masks, prototypes; and the constant."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from disttempnet import Features, build_loss
from disttempnet.losses.temperature import network as tempnet
from disttempnet.losses.temperature.scalar import AnchorBatch
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
    local_rows,
    make,
    pairs,
    run,
    step,
    stream,
    unique_batch,
)
from tests.losses.twin_network import twin_taus, weights_of

DROPOUT = {**NETWORK, "dropout": 0.5}
BOUNDS = NETWORK["tau_min"], NETWORK["tau_max"]
close = torch.testing.assert_close


def perturbed(recipe: dict, seed: int = 0, size: float = 0.5) -> nn.Module:
    """A loss whose networks are anywhere, not at their start."""
    loss, generator = make(recipe), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in loss.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
            parameter += size * noise if not name.endswith("scaler") else 4 + noise
    return loss


def networks(loss: nn.Module) -> tuple[nn.Module, nn.Module]:
    """The image and the text network."""
    (owner,) = {name.rsplit(".", 2)[0] for name, _ in loss.named_parameters()}
    return loss.get_submodule(f"{owner}.image"), loss.get_submodule(f"{owner}.text")


class Recorder:
    """What both networks were given and gave in training steps: [(features, mask, τ), …] a side."""

    def __init__(self, loss: nn.Module) -> None:
        self.calls: tuple[list, list] = ([], [])
        for network, calls in zip(networks(loss), self.calls, strict=True):
            network.register_forward_hook(lambda _, args, out, calls=calls: calls.append((*args, out)))

    def masks(self, number: int) -> tuple[Tensor, Tensor]:
        return self.calls[0][number][1], self.calls[1][number][1]


# ---- the formula ----


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("prototypes", [1, 5, 12])
def test_icml_form_follows_the_twin(seed: int, prototypes: int) -> None:
    loss = perturbed(NETWORK | {"prototypes": prototypes}, seed)
    x, y = pairs(7, seed)
    actual = loss.temperatures(x, y)
    expected = twin_taus(weights_of(loss), x, y, NETWORK).detach()
    close(actual, expected, rtol=1e-12, atol=0)
    assert actual.shape == (2, 7)
    if prototypes > 1:
        assert expected.std(1).min() > 1e-4, "τ hardly differs between samples: the case says little"


def test_published_start() -> None:
    """scaler log .01; output weights 1, bias 0, so τ starts near the middle; two networks of their own."""
    weights = weights_of(make(NETWORK))
    for side in (weights.image, weights.text):
        assert side["scaler"].item() == pytest.approx(math.log(0.01), rel=1e-6)
        close(side["v"], torch.ones_like(side["v"]))
        assert side["v0"].item() == 0
        assert side["P"].shape == (5, D)
        assert side["W"].shape == (D, D)
    assert not torch.equal(weights.image["W"], weights.text["W"])
    large = weights_of(make(NETWORK, prototypes=400, embed_dim=50)).image["P"]
    assert large.std().item() == pytest.approx(1.0, abs=0.02)
    assert large.mean().abs() < 0.03


@pytest.mark.parametrize("network", ["icml24", "dist", "mlp"])
@settings(max_examples=20, deadline=None, derandomize=True)
@given(seed=st.integers(0, 1000), size=st.floats(0.1, 30))
def test_temperatures_lie_within_the_bounds(network: str, seed: int, size: float) -> None:
    """Whatever the parameters are. (Exactly the bound only where the sigmoid rounds to 0 or 1.)"""
    loss = perturbed({**NETWORK, "network": network}, seed, size)
    tau = loss.temperatures(*pairs(5, seed))
    assert (tau >= BOUNDS[0]).all()
    assert (tau <= BOUNDS[1] * (1 + 1e-12)).all()


def test_feature_scale_multiplies_the_input() -> None:
    scaled = perturbed({**NETWORK, "feature_scale": 3.0}, 1)
    plain = perturbed(NETWORK, 1)
    x, y = pairs(5, 1)
    close(scaled.temperatures(x, y), plain.temperatures(3 * x, 3 * y), rtol=1e-12, atol=0)


def test_dist_form_follows_its_formula() -> None:
    """(Linear_1(w ⊙ σ(q)) − Linear_2(σ(q)/M)) / ρ inside, bounded by a sigmoid of slope 1 in the middle."""
    loss = perturbed({**NETWORK, "network": "dist"}, 2, size=0.2)
    x, y = pairs(6, 2)
    tau = loss.temperatures(x, y)
    middle, width = sum(BOUNDS) / 2, BOUNDS[1] - BOUNDS[0]
    for side, (network, rows) in enumerate(zip(networks(loss), (x, y), strict=True)):
        p = {name: value.detach() for name, value in network.named_parameters()}
        for row, actual in zip(rows, tau[side], strict=True):
            f = torch.sigmoid(p["weight"] @ row + p["bias"])
            q = torch.stack([f @ prototype / prototype.norm() for prototype in p["prototypes"]])
            w = (q / p["scaler"].exp()).exp()
            w = w / w.sum()
            M = len(q)
            raw = sum(
                p["out_weight_1"][m] * w[m] * q[m].sigmoid() - p["out_weight_2"][m] * q[m].sigmoid() / M
                for m in range(M)
            )
            raw = raw / NETWORK["rho"]
            expected = BOUNDS[0] + width / (1 + torch.exp(-4 * (raw - middle) / width))
            close(actual, expected, rtol=1e-12, atol=0)


def test_the_clamped_form_is_the_first_codes() -> None:
    """max(τ_min, (Linear_1(w ⊙ σ(q)) − Linear_2(σ(q)/M)) / ρ), Linear_1 with its bias; against torch's own layers."""
    loss = perturbed({**NETWORK, "network": "dist-clamped"}, 2, size=0.2)
    x, y = pairs(6, 2)
    tau = loss.temperatures(x, y)
    free = 0
    for side, (network, rows) in enumerate(zip(networks(loss), (x, y), strict=True)):
        p = {name: value.detach() for name, value in network.named_parameters()}
        f = torch.sigmoid(nn.functional.linear(rows, p["weight"], p["bias"]))
        q = f @ nn.functional.normalize(p["prototypes"], dim=1).T
        weights, sims = torch.softmax(q / p["scaler"].exp(), 1), q.sigmoid()
        first = nn.functional.linear(weights * sims, p["out_weight_1"][None], p["out_bias"][None])
        second = nn.functional.linear(sims / q.shape[1], p["out_weight_2"][None])
        expected = ((first - second)[:, 0] / NETWORK["rho"]).clamp(min=BOUNDS[0])
        close(tau[side], expected, rtol=1e-12, atol=0)
        free += int((expected > BOUNDS[0]).sum())
    assert free > 0, "all are clamped: the case says little"


def test_mlp_form_follows_its_formula() -> None:
    """o = v · gelu(W x + a) + c, dropout on x, τ = (τ_max − τ_min) σ(o) + τ_min; it starts in the middle."""
    recipe = {**DROPOUT, "network": "mlp"}
    x, y = pairs(B, 2)
    close(make(recipe).temperatures(x, y), torch.full((2, B), sum(BOUNDS) / 2, dtype=torch.float64))
    loss = perturbed(recipe, 2)
    recorder = Recorder(loss)
    step(loss, GlobalBatch(x, y, torch.arange(B)))
    masks = recorder.masks(0)
    evaluated = loss.temperatures(x, y)
    for side, (network, rows) in enumerate(zip(networks(loss), (x, y), strict=True)):
        p = {name: value.detach() for name, value in network.named_parameters()}
        for i, row in enumerate(rows):
            for kept, actual in ((masks[side][i], recorder.calls[side][0][2][i]), (1, evaluated[side, i])):
                z = p["weight"] @ (row * kept) + p["bias"]
                hidden = z * 0.5 * (1 + torch.erf(z / math.sqrt(2)))
                o = p["out_weight"] @ hidden + p["out_bias"]
                expected = (BOUNDS[1] - BOUNDS[0]) / (1 + torch.exp(-o)) + BOUNDS[0]
                close(actual.detach(), expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("network", ["icml24", "dist", "mlp"])
def test_gradient_reaches_every_parameter_and_no_feature(network: str) -> None:
    """No hard clamp on the way. The networks read detached features: ρ, which only τ meets, moves no feature."""
    batch = unique_batch(1)
    low, high = (perturbed({**NETWORK, "network": network}, 3, size=0.1) for _ in range(2))
    high.rho = 1.9
    quiet, loud = step(low, batch), step(high, batch)
    assert set(quiet.parameters) == {name for name, _ in low.named_parameters()}
    for name, gradient in quiet.parameters.items():
        assert (gradient != 0).any(), name
        assert not torch.equal(gradient, loud.parameters[name]), name
    close(loud.grad_x, quiet.grad_x, rtol=0, atol=0)
    close(loud.grad_y, quiet.grad_y, rtol=0, atol=0)


@pytest.mark.parametrize("mode", ["fcco", "batch"])
def test_following_the_gradient_leads_to_the_root(mode: str) -> None:
    """γ = 1, one batch again and again: at the optimum the mean of h = ρ − KL vanishes, with τ inside its bounds."""
    loss = make({**NETWORK, "rho": 0.6, "gamma": 1.0, "tau_gradient": mode, "tau_min": 0.01, "tau_max": 2.0})
    loss.set_epoch(0)
    optimizer = torch.optim.Adam(loss.parameters(), lr=0.03)
    batch = unique_batch(2)
    for _ in range(400):
        optimizer.zero_grad()
        out = loss(Features.unit(batch.x, batch.y), batch.ids)
        out.total.backward()
        optimizer.step()
    tau = loss.temperatures(batch.x, batch.y)
    assert 0.02 < tau.min() <= tau.max() < 1.9
    s = batch.x @ batch.y.T
    kl = []
    for side, similarity in enumerate((s, s.T)):
        e = ((similarity - s.diagonal()[:, None]) / tau[side, :, None]).fill_diagonal_(-math.inf)
        q = e.softmax(1)
        kl.append((torch.special.xlogy(q, q).sum(1) + math.log(B - 1)).mean().item())
    assert kl == pytest.approx([0.6, 0.6], abs=0.1)


def test_constant_temperature() -> None:
    loss = make(CONSTANT, temperature=0.03)
    assert not list(loss.parameters())
    close(loss.temperatures(*pairs(4)), torch.full((2, 4), 0.03, dtype=torch.float64))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_temperatures_need_no_double(dtype: torch.dtype) -> None:
    loss = make(DROPOUT).float()
    x, y = (rows.to(dtype).requires_grad_() for rows in pairs(3))
    tau = loss.temperatures(x, y)
    assert tau.dtype == torch.float32
    assert not tau.requires_grad
    close(tau, make(DROPOUT).temperatures(x.double(), y.double()).float(), rtol=1e-5, atol=0)


# ---- dropout ----


def test_dropout_follows_the_twin_with_the_same_masks() -> None:
    loss, batch = make(DROPOUT), unique_batch(1)
    recorder = Recorder(loss)
    actual = step(loss, batch)
    masks = recorder.masks(0)
    tau = twin_taus(weights_of(loss), batch.x, batch.y, DROPOUT, masks)
    close(torch.stack([calls[0][2] for calls in recorder.calls]), tau, rtol=1e-12, atol=0)
    close(actual.metrics["tau/image_mean"], tau[0].mean().detach(), rtol=1e-10, atol=0)
    for side, rows in enumerate((batch.x, batch.y)):
        features, mask, _ = recorder.calls[side][0]
        close(features, rows)
        assert not features.requires_grad
        assert mask.shape == (B, D), "one mask a sample"
        assert set(mask.unique().tolist()) == {0.0, 2.0}


def test_masks_are_fair_and_independent() -> None:
    """A rate p: kept with 1 − p and scaled by 1/(1 − p); rows, sides, steps and seeds have masks of their own."""
    rows, width, seen = 200, 32, []
    for seed in (0, 1):
        loss = make(NETWORK, num_samples=rows, embed_dim=width, dropout=0.25, seed=seed)
        recorder = Recorder(loss)
        for number in range(2):
            step(loss, GlobalBatch(*pairs(rows, number, width), torch.arange(rows)))
            seen += recorder.masks(number)
    for number, mask in enumerate(seen):
        assert mask.unique().tolist() == pytest.approx([0.0, 4 / 3])
        assert mask.mean().item() == pytest.approx(1.0, abs=0.03)
        correlations = torch.corrcoef((mask > 0).double())
        assert correlations.fill_diagonal_(0).abs().max() < 0.9, "two rows share a mask"
        for other in seen[:number]:
            assert ((mask > 0) == (other > 0)).double().mean().item() == pytest.approx(0.625, abs=0.03)


def test_masks_depend_on_seed_step_and_place_only() -> None:
    """Not on the features, the parameters, the ids, or torch's own generator."""
    one, other = make(DROPOUT), perturbed(DROPOUT)
    recorders = Recorder(one), Recorder(other)
    for batch, another in zip(stream(3, seed=1), stream(3, seed=2), strict=True):
        torch.manual_seed(0)
        step(one, batch)
        before = torch.get_rng_state()
        step(other, another)
        assert torch.equal(before, torch.get_rng_state()), "a loss must not move the global generator"
    for number in range(3):
        for a, b in zip(recorders[0].masks(number), recorders[1].masks(number), strict=True):
            close(a, b, rtol=0, atol=0)


def masks_of(recipe: dict, batches: list[GlobalBatch]) -> list[tuple[Tensor, Tensor]]:
    loss = make(recipe)
    recorder = Recorder(loss)
    for batch in batches:
        loss(Features.unit(local_rows(batch.x), local_rows(batch.y)), local_rows(batch.ids))
    return [recorder.masks(number) for number in range(len(batches))]


@pytest.mark.parametrize("world_size", [2, 4])
def test_masks_belong_to_a_place_in_the_global_batch(gloo, world_size: int) -> None:
    batches = stream(2)
    expected, ranks = masks_of(DROPOUT, batches), gloo(world_size, masks_of, DROPOUT, batches)
    for number in range(2):
        for side in (0, 1):
            close(torch.cat([masks[number][side] for masks in ranks]), expected[number][side], rtol=0, atol=0)


@pytest.mark.parametrize("recipe", [DROPOUT, {**DROPOUT, "network": "mlp"}, NETWORK], ids=["icml24", "mlp", "plain"])
def test_chunks_whose_activations_are_computed_again_change_nothing(
    recipe: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = run(recipe, stream(3))
    monkeypatch.setattr(tempnet, "KEPT_ROWS", 5)
    monkeypatch.setattr(tempnet, "CHUNK_ROWS", 3)  # of eight rows: 3, 3, 2
    assert_same_steps(run(recipe, stream(3)), expected)


def test_evaluation_has_no_dropout() -> None:
    loss, batch = make(DROPOUT), unique_batch(1)
    trained = step(loss, batch).metrics["tau/image_mean"]
    loss.eval()
    outs = [loss(Features.unit(batch.x, batch.y), batch.ids) for _ in range(2)]
    assert outs[0].total == outs[1].total
    tau = twin_taus(weights_of(loss), batch.x, batch.y, DROPOUT)
    close(outs[0].metrics["tau/image_mean"], tau[0].mean().detach(), rtol=1e-10, atol=0)
    assert trained != outs[0].metrics["tau/image_mean"]
    loss.train()
    close(loss.temperatures(batch.x, batch.y), tau.detach(), rtol=1e-12, atol=0)
    assert loss.training, "temperatures() must not change the mode"


# ---- prototypes ----


def prototypes(loss: nn.Module) -> tuple[Tensor, Tensor]:
    weights = weights_of(loss)
    return weights.image["P"].detach(), weights.text["P"].detach()


def test_prototypes_start_from_the_other_modality() -> None:
    """They stand for an anchor's negatives: an image's are texts. The first batch starts them, no later one."""
    loss, batches = make(NETWORK), stream(3)
    step(loss, batches[0])
    image, text = prototypes(loss)
    close(image, batches[0].y[:5])
    close(text, batches[0].x[:5])
    step(loss, batches[1])
    close(prototypes(loss)[0], image, rtol=0, atol=0)
    descend(loss, 10.0)
    moved = prototypes(loss)[0]
    assert not torch.equal(moved, image)
    step(loss, batches[2])
    close(prototypes(loss)[0], moved, rtol=0, atol=0)


def test_more_prototypes_than_rows() -> None:
    """M = 13, B = 8: eight from the first batch, five from the second."""
    loss, batches = make(NETWORK, prototypes=13), stream(3)
    for batch in batches:
        step(loss, batch)
    image, text = prototypes(loss)
    close(image, torch.cat([batches[0].y, batches[1].y[:5]]))
    close(text, torch.cat([batches[0].x, batches[1].x[:5]]))


def prototypes_after_training(batches: list[GlobalBatch]) -> tuple[Tensor, Tensor]:
    loss = make(NETWORK, prototypes=13)
    for batch in batches:
        loss(Features.unit(local_rows(batch.x), local_rows(batch.y)), local_rows(batch.ids))
    return prototypes(loss)


@pytest.mark.parametrize("world_size", [2, 4])
def test_prototypes_are_the_same_at_every_world_size(gloo, world_size: int) -> None:
    expected = prototypes_after_training(stream(2))
    for actual in gloo(world_size, prototypes_after_training, stream(2)):
        close(actual, expected, rtol=0, atol=0)


def test_evaluation_does_not_start_prototypes() -> None:
    loss, batch = make(NETWORK).eval(), unique_batch(1)
    before = prototypes(loss)
    loss(Features.unit(batch.x, batch.y), batch.ids)
    loss.temperatures(batch.x, batch.y)
    close(prototypes(loss), before, rtol=0, atol=0)


@pytest.mark.parametrize("network", ["dist", "mlp"])
def test_other_forms_keep_their_random_start(network: str) -> None:
    loss, batch = make({**NETWORK, "network": network}), unique_batch(1)
    before = [parameter.detach().clone() for parameter in loss.parameters()]
    step(loss, batch)
    close([parameter.detach() for parameter in loss.parameters()], before, rtol=0, atol=0)


# ---- the network's own choices ----


def test_networks_wait_at_rate_zero_and_decay_from_their_start() -> None:
    network = build_loss("disttempnet-v1", num_samples=N, embed_dim=D, tau_lr=1e-3, tau_start_epoch=2).temperature
    assert [network.learning_rate(epoch) for epoch in range(5)] == pytest.approx([0, 0, 1e-3, 9e-4, 8.1e-4])


@pytest.mark.parametrize("tau", [0.06, 0.19])
def test_an_mlp_starts_at_the_initial_temperature(tau: float) -> None:
    x, y = pairs(4)
    made = {"num_samples": N, "embed_dim": D, "tau_max": 0.2}
    x, y = x.float(), y.float()
    close(build_loss("disttempnet-v1", **made, tau_initial=tau).temperatures(x, y), torch.full((2, len(x)), tau))
    close(build_loss("disttempnet-v1", **made, tau_initial=0).temperatures(x, y), torch.full((2, len(x)), 0.1025))


def test_an_initial_temperature_is_of_an_mlp_and_inside_its_bounds() -> None:
    made = {"num_samples": N, "embed_dim": D}
    with pytest.raises(ValueError, match=r"tau_initial is for network = 'mlp'"):
        build_loss("tempnet", **made, tau_initial=0.03)
    with pytest.raises(ValueError, match=r"tau_initial = 0.2 must lie between tau_min = 0.005 and tau_max = 0.2; 0 = "):
        build_loss("disttempnet-v1", **made, tau_initial=0.2)


def test_feature_scale_zero_is_root_width() -> None:
    x, y = pairs(4)
    automatic, told = (make(NETWORK, feature_scale=scale) for scale in (0.0, D**0.5))
    assert torch.equal(automatic.temperatures(x, y), told.temperatures(x, y))
    assert not torch.equal(automatic.temperatures(x, y), make(NETWORK).temperatures(x, y))


def test_shuffle_gives_every_pair_the_temperature_of_another_in_training_only() -> None:
    batch = unique_batch(5)
    plain, shuffled = make(NETWORK, prototypes=3), make(NETWORK, prototypes=3, shuffle=True)
    asked = AnchorBatch(batch.x, batch.y, batch.x, batch.y, batch.ids, 0)
    own, others = plain.temperature(asked), shuffled.temperature(asked)
    for mine, other in zip(own, others, strict=True):
        assert not torch.allclose(mine, other)
        close(mine.sort().values, other.sort().values)
    assert not torch.allclose(shuffled.temperature(asked._replace(step=1))[0], others[0]), "dealt anew every step"
    shuffled.eval()
    close(shuffled.temperature(asked)[0], plain.temperature(asked)[0])


@pytest.mark.parametrize("recipe", [NETWORK, EVERY["clip-network"]], ids=["tempnet", "clip-network"])
@pytest.mark.parametrize("world_size", [2, 4])
def test_shuffle_crosses_ranks(gloo, world_size: int, recipe: dict) -> None:
    recipe, batches = {**recipe, "shuffle": True}, stream(3, seed=3)
    assert_same_steps(joined(gloo(world_size, run, recipe, batches)), run(recipe, batches))


@pytest.mark.parametrize("network", ["icml24", "dist"])
def test_the_published_networks_train_in_cross_entropy_too(network: str) -> None:
    """Every one of their parameters has a gradient; `dist` has no ρ to divide by and takes its default."""
    loss = make({**EVERY["clip-network"], "network": network, "dropout": 0.0})
    gradients = step(loss, unique_batch(1)).parameters
    assert {name for name, gradient in gradients.items() if gradient.abs().max() > 0} == set(
        dict(loss.named_parameters())
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tau_min": 0.3, "tau_max": 0.3}, "need 0 < tau_min < tau_max, got tau_min 0.3 and tau_max 0.3"),
        ({"temperature": 0.5}, r"temperature 0.5 must lie in \[tau_min, tau_max\] = \[0.02, 0.3\]"),
    ],
)
@pytest.mark.parametrize("name", ["clip-per-sample", "isogclr"])
def test_values_out_of_range_are_named(name: str, changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make({**EVERY[name], **changes})
