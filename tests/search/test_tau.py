"""τ of a classification, from every kind of objective and from a model that is no run."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn.functional import normalize
from torch.testing import assert_close

from disttempnet.losses import Features, Objective, build_loss
from disttempnet.models import Towers, load_model
from disttempnet.search.tau import ImageTau


@pytest.fixture(scope="module")
def own() -> Towers:
    """Towers whose logit scale is one over .04."""
    towers = load_model("demo-vit-32")
    with torch.no_grad():
        towers.module.logit_scale.fill_(math.log(1 / 0.04))
    return towers


@pytest.fixture(scope="module")
def images(own: Towers) -> torch.Tensor:
    return normalize(torch.randn(5, own.embed_dim, generator=torch.Generator().manual_seed(1)), dim=1)


def objective(name: str, width: int, **arguments: object) -> Objective:
    return build_loss(name, num_samples=8, embed_dim=width, **arguments).eval()


def test_a_model_that_is_no_run_has_its_logit_scale(own: Towers, images: torch.Tensor) -> None:
    tau = ImageTau(own)
    assert_close(tau(images), torch.full((5,), 0.04, dtype=torch.float64), rtol=1e-6, atol=0)
    assert tau.describe() == "τ = 0.04, one over the model's logit scale"


@pytest.mark.parametrize(
    ("name", "arguments"),
    [("sogclr", {"temperature": 0.06}), ("clip", {"temperature": 0.06}), ("siglip", {"temperature": 0.06})],
)
def test_one_number_of_an_objective(name: str, arguments: dict, own: Towers, images: torch.Tensor) -> None:
    tau = ImageTau(own, objective(name, own.embed_dim, **arguments), name)
    assert_close(tau(images), torch.full((5,), 0.06, dtype=torch.float64), rtol=1e-6, atol=0)
    assert tau.describe() == f"τ = 0.06, the run's ({name})"


def test_a_network_gives_a_tau_of_each_image(own: Towers, images: torch.Tensor) -> None:
    loss = objective("disttempnet-v1", own.embed_dim, network="icml24", tau_initial=0, feature_scale=8.0)
    tau = ImageTau(own, loss, "disttempnet-v1")
    expected = loss.temperatures(images, torch.zeros_like(images))[0].double()
    assert expected.std() > 0
    found = torch.cat([tau(images[:2]), tau(images[2:])])
    assert_close(found, expected, rtol=1e-6, atol=0)
    numbers = f"{expected.min():.4g} to {expected.max():.4g}, mean {expected.mean():.4g}"
    assert tau.describe() == f"τ of each image by the temperature network of the run (disttempnet-v1): {numbers}"


def test_a_tau_of_training_samples_alone_is_replaced_by_their_mean(own: Towers, images: torch.Tensor) -> None:
    loss = objective("isogclr", own.embed_dim, rho=1.0)
    loss.train()(Features.of(images, images), torch.arange(5))
    tau = ImageTau(own, loss.eval(), "isogclr")
    assert_close(tau(images), torch.full((5,), 0.04, dtype=torch.float64), rtol=1e-6, atol=0)
    about = "the mean of the run's last batch: isogclr has a τ for each training sample alone"
    assert tau.describe() == f"τ = 0.04, {about}"


def test_an_objective_without_tau(own: Towers, images: torch.Tensor) -> None:
    tau = ImageTau(own, objective("vicreg", own.embed_dim), "vicreg")
    assert_close(tau(images), torch.full((5,), 0.04, dtype=torch.float64), rtol=1e-6, atol=0)
    assert tau.describe() == "τ = 0.04, CLIP's first value: vicreg has none"
