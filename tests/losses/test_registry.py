"""build_loss: names, arguments, and what it says when they are wrong."""

from __future__ import annotations

import math
import tomllib

import numpy as np
import pytest
import torch

import disttempnet
import disttempnet.losses
from disttempnet import OBJECTIVES, Features, build_loss
from disttempnet.config import CONFIG_FOLDER
from disttempnet.losses import with_later_arguments
from tests.losses.scenario import NETWORK, B, D, N, make, pairs, reference_of, unique_batch, values

NAMES = (
    "amorlip",
    "clip",
    "clip-constant",
    "clip-network",
    "clip-per-sample",
    "cyclip",
    "dcl",
    "disttempnet",
    "disttempnet-v1",
    "drrho",
    "drrho-learnable",
    "fastclip-v0",
    "fastclip-v1",
    "fastclip-v2",
    "fastclip-v3",
    "fastclip-v3-constant-gamma",
    "isogclr",
    "neuclip",
    "nuclr",
    "onlineclr",
    "scent",
    "siglip",
    "sogclr",
    "tempnet",
    "tuneclip",
    "vicreg",
)
WITHOUT_STATE = {"amorlip"} | {
    "clip", "clip-constant", "clip-network", "clip-per-sample", "cyclip", "dcl", "neuclip", "siglip", "vicreg",
}  # fmt: skip
WITH_NETWORKS = ("clip-network", "disttempnet", "disttempnet-v1", "tempnet")


def refused(match: str):
    return pytest.raises(ValueError, match=match)


def test_both_homes_are_one() -> None:
    assert disttempnet.build_loss is disttempnet.losses.build_loss
    assert set(NAMES) == set(OBJECTIVES)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.filterwarnings("ignore:rho:UserWarning")  # published defaults are for batches of thousands
def test_defaults_train(name: str) -> None:
    """With no argument of its own, in float32 as built: value, gradients, metrics, temperatures, state."""
    loss = build_loss(name, num_samples=N, embed_dim=D)
    loss.set_epoch(2)
    batch = unique_batch(1)
    # pairs that do not lead: the default margin leaves nothing of those that do
    x, y = (rows.float().requires_grad_() for rows in (batch.x, batch.y.roll(1, 0)))
    out = loss(Features.of(x, y, reference=reference_of(x, y)), batch.ids)
    out.total.backward()
    assert out.total.dtype == torch.float32
    assert x.grad.isfinite().all()
    assert x.grad.abs().max() > 0
    assert all(parameter.grad is not None for parameter in loss.parameters())
    tau = loss.temperatures(x, y, batch.ids)
    assert tau is None if name == "vicreg" else tau.shape == (2, B)
    assert any(key.endswith("log_u") for key in loss.state_dict()) == (name not in WITHOUT_STATE)


CONSTANT, ONE, PER_SAMPLE, NETWORK_KIND = "constant", "one, learnable", "per sample", "network"
COSINE = {"gamma_min": 0.2, "gamma_decay_epochs": 18}
BOUNDED = {"tau_min": 0.005, "tau_max": 0.05}
PUBLISHED = {  # temperature, γ, values
    "clip": (ONE, "–", {"temperature": 0.07, "tau_min": 0.01, "tau_max": 1, "tau_lr": 0}),
    "clip-constant": (CONSTANT, "–", {"temperature": 0.07}),
    "clip-per-sample": (PER_SAMPLE, "–", {}),
    "clip-network": (NETWORK_KIND, "–", {"network": "mlp", "tau_min": 0.005, "tau_max": 0.2, "tau_lr": 1e-3}),
    "dcl": (CONSTANT, "1", {"temperature": 0.1}),
    "sogclr": (CONSTANT, "constant", {"gamma": 0.8, "temperature": 0.05}),
    "isogclr": (
        PER_SAMPLE,
        "constant",
        {
            "temperature": 0.01,
            **BOUNDED,
            "rho": 8,
            "tau_lr": 0.03,
            "tau_beta": 0.5,
            "tau_optimizer": "momentum",
            "tau_gradient_limit": 5,
        },
    ),
    "tempnet": (NETWORK_KIND, "constant", {"gamma": 0.8, "rho": 7, **BOUNDED, "dropout": 0.5}),
    "disttempnet": (NETWORK_KIND, "constant", {"gamma": 0.8, **BOUNDED}),
    "disttempnet-v1": (
        NETWORK_KIND,
        "cosine",
        {"gamma_min": 0.8, "gamma_decay_epochs": 20, "tau_lr_decay": 0.9, "network": "mlp", "rho": 2.9},
    ),
    "fastclip-v0": (ONE, "cosine", {"temperature": 0.07, **COSINE, "tau_lr": 0}),
    "fastclip-v1": (CONSTANT, "cosine", COSINE),
    "fastclip-v2": (
        PER_SAMPLE,
        "cosine",
        {
            **COSINE,
            "temperature": 0.03,
            "tau_min": 0.01,
            "tau_max": 1,
            "rho": 7,
            "tau_lr": 0.0133,
            "tau_optimizer": "adam",
            "tau_gradient_limit": 5,
        },
    ),
    "fastclip-v3": (ONE, "cosine", {**COSINE, "rho": 6.5, "tau_lr": 2e-4, "tau_threshold": 0.03, "temperature": 0.07}),
    "fastclip-v3-constant-gamma": (ONE, "constant", {"gamma": 0.2, "rho": 6.5, "tau_lr": 2e-4, "tau_threshold": 0.03}),
    "neuclip": (
        ONE,
        "predicted",
        {
            "prototypes": 4096,
            "normaliser_steps": 10,
            "normaliser_restart": 500,
            "rho": 6.5,
            "tau_lr": 2e-4,
            "tau_threshold": 0.03,
        },
    ),
    "scent": (
        ONE,
        "per sample",
        {"scent_log_a": 10, "rho": 11, "tau_lr": 6.25e-5, "tau_threshold": 0.03, "eps": 1e-6, "temperature": 0.07},
    ),
    "tuneclip": (CONSTANT, "constant", {"margin": 0.1}),
    "drrho": (CONSTANT, "cosine", {"temperature": 0.01, "distillation": 0}),
    "drrho-learnable": (ONE, "cosine", {"distillation": 0, "rho": 6.5, "tau_lr": 2e-4, "tau_threshold": 0.03}),
    "nuclr": (
        CONSTANT,
        "constant",
        {"temperature": 0.01, "gamma": 0.8, "zeta": -0.05, "zeta_lr": 5e-6, "zeta_theta": 0.9, "zeta_start_epoch": 5},
    ),
    "amorlip": (
        ONE,
        "amortised",
        {
            "rho": 8.5,
            "rho_flip_epoch": 11,
            "partition_lr": 1e-3,
            "partition_steps": 3,
            "partition_average": 0.92,
            "partition_share": 0.8,
            "partition_share_epochs": 16,
        },
    ),
    "siglip": (ONE, "–", {"temperature": 0.1, "bias": -10}),
    "cyclip": (ONE, "–", {"in_modal": 0.25, "cross_modal": 0.25, "temperature": 0.07, "tau_min": 0.01, "tau_max": 1}),
    "vicreg": ("–", "–", {"invariance": 25, "variance": 25, "covariance": 1}),
    "onlineclr": (CONSTANT, "constant", {"temperature": 0.01, "gamma": 0.5}),
}


# two sides × 4 bytes × columns: log u; τ and its momentum, or τ, two moments and the visits
BYTES_A_SAMPLE = {"nuclr": 24, "isogclr": 24, "fastclip-v2": 40, "clip-per-sample": 32}


@pytest.mark.parametrize("name", NAMES)
def test_published_defaults(name: str) -> None:
    row, (temperature, gamma, values) = OBJECTIVES[name], PUBLISHED[name]
    assert (row.temperature, row.gamma) == (temperature, gamma)
    assert {key: row.arguments[key] for key in values} == values
    with_rho = (
        "amorlip",
        "drrho-learnable",
        "scent",
        "neuclip",
        "isogclr",
        "tempnet",
        "disttempnet",
        "disttempnet-v1",
        "fastclip-v2",
        "fastclip-v3",
    )
    assert ("rho" in row.arguments) == (name.removesuffix("-constant-gamma") in with_rho)
    assert row.title
    assert row.source.startswith("arXiv ")
    clamped = name in ("isogclr", "fastclip-v2")  # in their codes alone
    assert bool(row.arguments.get("tau_gradient_limit")) == clamped
    loss = build_loss(name, num_samples=N, embed_dim=D)
    assert row.bytes_a_sample() == BYTES_A_SAMPLE.get(
        name, 8 if hasattr(loss, "state") and gamma not in ("–", "1", "predicted") else 0
    )


@pytest.mark.parametrize("name", WITH_NETWORKS)
def test_seed_decides_the_start(name: str) -> None:
    sizes = {"num_samples": N, "embed_dim": D}
    one, same, other = (build_loss(name, **sizes, seed=seed, network="icml24", tau_initial=0) for seed in (3, 3, 4))
    x, y = pairs(4)
    torch.testing.assert_close(one.temperatures(x, y), same.temperatures(x, y), rtol=0, atol=0)
    assert not torch.equal(one.temperatures(x, y), other.temperatures(x, y))


def test_building_does_not_move_the_global_generator() -> None:
    before = torch.get_rng_state()
    make(NETWORK)
    assert torch.equal(before, torch.get_rng_state())


def test_disttempnet_is_tempnet_and_its_note_says_what_its_own_published_code_has() -> None:
    row = OBJECTIVES["disttempnet"]
    assert row.arguments == OBJECTIVES["tempnet"].arguments
    published = tomllib.loads((CONFIG_FOLDER / "cc12m_vitb32_v0.toml").read_text(encoding="utf-8"))["loss"]
    other = {key: value for key, value in published.items() if key != "name" and value != row.arguments[key]}
    assert other == {"rho": 9.5, "network": "dist", "prototypes": 512, "tau_min": 0.001}
    for words in ("rho = 9.5", "network = 'dist'", "prototypes = 512", "tau_min = .001", "cc12m_vitb32_v0.toml"):
        assert words in row.note


@pytest.mark.parametrize(("wrong", "nearest"), [("disttempnet_v1", "disttempnet-v1"), ("sogcl", "sogclr")])
def test_unknown_name_lists_what_exists(wrong: str, nearest: str) -> None:
    with refused(f"'{wrong}'.*'{nearest}'") as caught:
        build_loss(wrong, num_samples=N, embed_dim=D)
    for name in NAMES:
        assert name in str(caught.value)


@pytest.mark.parametrize(
    ("name", "wrong", "nearest"),
    [
        ("sogclr", "temprature", "temperature"),
        ("disttempnet-v1", "gamma_mim", "gamma_min"),
        ("disttempnet-v1", "gamma", "gamma_min"),
        ("tempnet", "gamma_min", "gamma"),
        ("clip", "tau_mim", "tau_min"),
        ("siglip", "bais", "bias"),
        ("vicreg", "covarience", "covariance"),
    ],
)
def test_unknown_argument_lists_what_exists(name: str, wrong: str, nearest: str) -> None:
    with refused(f"{name}.*'{wrong}'.*'{nearest}'") as caught:
        build_loss(name, num_samples=N, embed_dim=D, **{wrong: 0.5})
    for argument in OBJECTIVES[name].arguments:
        assert argument in str(caught.value)


@pytest.mark.parametrize("missing", ["num_samples", "embed_dim"])
def test_missing_argument_is_named(missing: str) -> None:
    given = {"num_samples": N, "embed_dim": D}
    del given[missing]
    with pytest.raises((TypeError, ValueError), match=missing):
        build_loss("sogclr", **given)


@pytest.mark.parametrize(
    ("name", "argument", "value"),
    [
        ("sogclr", "temperature", 0.0),
        ("sogclr", "temperature", -0.1),
        ("sogclr", "gamma", 0.0),
        ("sogclr", "gamma", 1.5),
        ("sogclr", "num_samples", 0),
        ("sogclr", "eps", -1e-6),
        ("sogclr", "drift", 1.5),
        ("clip", "temperature", 0.0),
        ("tempnet", "tau_min", 0.0),
        ("tempnet", "tau_min", 0.05),
        ("tempnet", "tau_max", 0.001),
        ("tempnet", "dropout", 1.0),
        ("tempnet", "dropout", -0.1),
        ("tempnet", "prototypes", 0),
        ("tempnet", "rho", 0.0),
        ("disttempnet-v1", "gamma_min", 0.0),
        ("disttempnet-v1", "gamma_min", 1.2),
        ("disttempnet-v1", "gamma_decay_epochs", 0),
        ("siglip", "temperature", 0.0),
        ("cyclip", "temperature", -1.0),
        ("cyclip", "in_modal", -0.5),
        ("cyclip", "cross_modal", -0.5),
        ("vicreg", "invariance", -1.0),
        ("vicreg", "variance", -1.0),
        ("vicreg", "covariance", -1.0),
        ("onlineclr", "temperature", 0.0),
        ("onlineclr", "gamma", 0.0),
        ("isogclr", "temperature", 0.06),
        ("isogclr", "tau_beta", 1.0),
        ("fastclip-v2", "tau_beta2", 1.0),
        ("fastclip-v2", "tau_lr", -0.5),
        ("fastclip-v3", "tau_lr", -0.5),
        ("fastclip-v3", "tau_threshold", -0.5),
        ("fastclip-v1", "gamma_min", 0.0),
    ],
)
def test_values_out_of_range_are_named(name: str, argument: str, value: float) -> None:
    with refused(argument) as caught:
        build_loss(name, **{"num_samples": N, "embed_dim": D, argument: value})
    assert name in str(caught.value)
    assert str(value) in str(caught.value)


@pytest.mark.parametrize(
    ("argument", "choices"),
    [
        ("tau_gradient", ("fcco", "batch")),
        ("network", ("icml24", "dist", "dist-clamped", "mlp")),
        ("tau_start", ("epoch", "ahead")),
    ],
)
def test_wrong_choice_lists_the_choices(argument: str, choices: tuple[str, ...]) -> None:
    with refused("'fast'") as caught:
        build_loss("tempnet", num_samples=N, embed_dim=D, **{argument: "fast"})
    for choice in choices:
        assert choice in str(caught.value)


@pytest.mark.parametrize(
    ("name", "argument"),
    [
        ("sogclr", "temperature"),
        ("tempnet", "tau_min"),
        ("sogclr", "gamma"),
        ("siglip", "temperature"),
        ("siglip", "bias"),
        ("cyclip", "in_modal"),
        ("vicreg", "variance"),
        ("onlineclr", "gamma"),
    ],
)
def test_wrong_type_names_the_objective(name: str, argument: str) -> None:
    with refused(name):
        build_loss(name, num_samples=N, embed_dim=D, **{argument: "small"})


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("broken", ["rows", "width", "ids", "ids_dtype"])
def test_wrong_batches_are_refused(name: str, broken: str) -> None:
    x, y = pairs(4)
    ids = torch.arange(4)
    if broken == "rows":
        y = y[:3]
    elif broken == "width":
        y = y[:, :-1]
    elif broken == "ids":
        ids = ids[:2]
    else:
        ids = ids.float()
    with pytest.raises(ValueError, match=r"features|ids"):
        build_loss(name, num_samples=N, embed_dim=D)(Features.unit(x, y), ids)


def test_arguments_that_a_saved_run_lacks_are_those_of_its_time() -> None:
    """ρ = 0 stood for a share of log(B − 1) then; a run of this version is left alone."""
    old = {"rho": 0.0, "tau_start_epoch": 2}
    assert with_later_arguments("disttempnet-v1", old, 128) == {
        "tau_gradient_limit": 5.0, "eps": 0.0, "drift": 0.0, "tau_start": "epoch", "tau_start_epoch": 2,
        "scent": False, "scent_log_a": 10.0, "tau_initial": 0.0, "rho": 0.3 * math.log(127),
    }  # fmt: skip
    later = {"eps": 0.0, "drift": 0.0, "scent": False, "scent_log_a": 10.0}
    assert with_later_arguments("sogclr", {"gamma": 0.8}, 128) == {"gamma": 0.8, **later}
    assert with_later_arguments("clip", {"tau_lr": 0.0}, 128) == {"tau_lr": 0.0}
    assert with_later_arguments("none", {"rho": 0.0}, 128) == {"rho": 0.0}
    for name, row in OBJECTIVES.items():
        assert with_later_arguments(name, row.arguments, 128) == row.arguments


# ---- scalars of numpy and torch ----


def test_scalars_of_numpy_are_numbers() -> None:
    plain = build_loss("disttempnet-v1", num_samples=N, embed_dim=D, seed=3, tau_max=0.25, prototypes=7, shuffle=True)
    numpy = build_loss(
        "disttempnet-v1", num_samples=np.int64(N), embed_dim=np.int32(D), seed=np.uint8(3), tau_max=np.float32(0.25),
        prototypes=np.int16(7), shuffle=np.True_, steps_per_epoch=np.int64(0),
    )  # fmt: skip
    assert plain.arguments == numpy.arguments
    torch.testing.assert_close(values(numpy), values(plain), rtol=0, atol=0)


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
