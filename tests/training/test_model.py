"""Towers and objective under autocast."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from disttempnet import Features, build_loss
from disttempnet.config import CONFIG_FOLDER, Config, LossConfig, load_config
from disttempnet.errors import UserError
from disttempnet.losses import LossOutput, Objective
from disttempnet.models import encode_images, load_model
from disttempnet.training.model import (
    Contrast,
    build_objective,
    compile_failure_named,
    continued,
    refuse_without_compiler,
    resolved,
)
from tests.losses.scenario import pairs


def test_a_missing_compiler_is_found_before_the_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    for variable in ("CC", "CXX"):
        monkeypatch.delenv(variable, raising=False)
    with pytest.raises(UserError, match=r"train.compile needs a compiler, and there is neither g\+\+ nor clang\+\+: "):
        refuse_without_compiler(torch.device("cpu"))
    with pytest.raises(UserError, match="there is neither gcc nor clang: "):
        refuse_without_compiler(torch.device("cuda"))
    monkeypatch.setenv("CXX", "mine")
    with pytest.raises(UserError, match="CXX=mine does not exist"):
        refuse_without_compiler(torch.device("cpu"))
    (tmp_path / "mine").touch(mode=0o755)
    refuse_without_compiler(torch.device("cpu"))


def test_a_run_goes_on_with_the_defaults_that_it_began_with() -> None:
    """Of a version whose DistTempNet-v1 had other defaults and fewer arguments; what the config names is its own."""

    def config(**loss: object) -> Config:
        base = load_config(CONFIG_FOLDER / "demo.toml")
        return base.model_copy(update={"loss": LossConfig(name="disttempnet-v1", **loss)})

    now = resolved(config()).loss.arguments
    later = ("tau_gradient_limit", "eps", "drift", "tau_start", "tau_initial")
    then = {key: value for key, value in now.items() if key not in later} | {"rho": 0.0, "tau_start_epoch": 2}
    begun = resolved(continued(config(), config(**then))).loss.arguments
    changed = {key: value for key, value in begun.items() if value != now[key]}
    assert changed.pop("rho") == pytest.approx(1.4533, abs=1e-4)  # .3 log(128 − 1)
    assert changed == {"tau_gradient_limit": 5.0, "tau_start": "epoch", "tau_start_epoch": 2, "tau_initial": 0.0}
    assert continued(config(tau_lr=0.5), config(**then)).loss.arguments["tau_lr"] == 0.5
    assert continued(config(), config(**now)) == config(), "a run of this version has its own"
    clip = config().model_copy(update={"loss": LossConfig(name="clip")})
    assert continued(clip, config(**then)) == clip, "another objective is refused later"


@pytest.mark.parametrize("name", ["seed", "num_samples", "steps_per_epoch", "shard_state"])
def test_what_a_run_tells_its_loss_is_no_key_of_the_config(name: str) -> None:
    config = load_config(CONFIG_FOLDER / "debug.toml", [f'loss={{name="clip", {name}=3}}'])
    with pytest.raises(UserError, match=rf"\[loss\] unknown argument of objective clip: '{name}'"):
        build_objective(config, 9, 8)


def test_what_cannot_be_compiled_is_one_line() -> None:
    class InductorError(RuntimeError):
        pass

    said = (
        "CppCompileError: C++ compile error\n\nOutput:\n/tmp/x.cpp:1: fatal error: Python.h: No such file\n  1 | #incl"
    )
    with (
        pytest.raises(UserError, match=r"train.compile failed: /tmp/x.cpp:1: fatal error: Python.h: No such file: fix"),
        compile_failure_named(),
    ):
        raise InductorError(said)
    with (
        pytest.raises(UserError, match=r"with train.checkpoint_activations: .* No such file: leave one of them out"),
        compile_failure_named(recomputes=True),
    ):
        raise InductorError(said)
    with pytest.raises(RuntimeError, match=r"^other$"), compile_failure_named():
        raise RuntimeError("other")


class Seen(Objective):
    """Keeps what it is given, and whether autocast is on around it."""

    def forward(self, features: Features, ids: Tensor) -> LossOutput:
        self.features, self.autocast = features, torch.is_autocast_enabled("cpu")
        return LossOutput(features.image.sum(), {})


@pytest.mark.parametrize("precision", [torch.bfloat16, None])
def test_the_objective_sees_whether_the_run_is_in_half_precision(precision: torch.dtype | None) -> None:
    """The choice of the GPU kernels hangs on it. Rows are normalised in float32 all the same."""
    seen = Seen()
    image, text = (3 * side.bfloat16() for side in pairs(8, width=64))
    Contrast(seen, precision)(image, text, torch.arange(8))
    assert seen.autocast == (precision is not None)
    for unit, embedding in ((seen.features.image, image), (seen.features.text, text)):
        assert unit.dtype == torch.float32
        torch.testing.assert_close(unit.norm(dim=1), torch.ones(8), rtol=0, atol=1e-6)
        torch.testing.assert_close(unit, nn.functional.normalize(embedding.float(), dim=1))
    assert seen.features.image_embedding is image


@pytest.mark.parametrize("name", ["sogclr", "clip", "siglip", "cyclip", "vicreg", "onlineclr", "disttempnet-v1"])
def test_autocast_around_the_objective_changes_nothing(name: str) -> None:
    """Value and gradient are those of the same embeddings in float32, the gradient rounded to the embeddings' type."""
    found = []
    for precision in (torch.bfloat16, None):
        arguments = {"rho": 1.0} if name == "disttempnet-v1" else {}
        loss = build_loss(name, num_samples=8, embed_dim=64, seed=1, **arguments)
        sides = [side.bfloat16().requires_grad_() for side in pairs(8, width=64)]
        given = sides if precision else [side.float() for side in sides]
        total = Contrast(loss, precision)(*given, torch.arange(8)).total
        total.backward()
        found.append((total.detach(), [side.grad.float() for side in sides]))
    torch.testing.assert_close(found[0][0], found[1][0], rtol=1e-6, atol=1e-7)
    for low, high in zip(found[0][1], found[1][1], strict=True):
        assert high.norm() > 0
        assert (low - high).norm() < 2**-7 * high.norm()


def test_pixels_are_normalised_by_numbers_that_are_sent_once(monkeypatch: pytest.MonkeyPatch) -> None:
    towers = load_model("demo-vit-32", "")
    pixels = torch.zeros(2, 3, towers.image_size, towers.image_size, dtype=torch.uint8)
    first = encode_images(towers, pixels)

    def refuse(*_: object, **__: object) -> Tensor:
        raise AssertionError("a transfer in every step")

    monkeypatch.setattr(torch, "tensor", refuse)
    torch.testing.assert_close(encode_images(towers, pixels), first)
