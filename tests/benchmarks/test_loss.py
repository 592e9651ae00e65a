"""Benchmarks of loss and step: peers are what is said of them, counts equal formulas, docs show results."""

from __future__ import annotations

import json
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from disttempnet import OBJECTIVES, build_loss
from disttempnet.losses.contrast import blocks
from disttempnet.losses.sample_state import SampleState
from tests.benchmarks.benchmark import benchmark
from tests.losses.oracle import Twin
from tests.losses.scenario import pairs

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "performance.md").read_text(encoding="utf-8")


def recorded(name: str) -> dict[str, Any]:
    return json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", ["accumulate", "loss", "step", "trim"])
def test_the_page_shows_the_recorded_result(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    benchmark(name).show(recorded(name))
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert len(rows) > 5
    assert [row for row in rows if row not in PAGE] == []


# ---- the dense peer ----


class Squares(TorchDispatchMode):
    """Counts the n × n tensors that operations make in memory of their own."""

    def __init__(self, n: int) -> None:
        super().__init__()
        self.n, self.made = n, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        given = {a.untyped_storage().data_ptr() for a in args if isinstance(a, Tensor)}
        for item in result if isinstance(result, tuple | list) else (result,):
            if isinstance(item, Tensor) and item.numel() == self.n**2:
                self.made += item.untyped_storage().data_ptr() not in given
        return result


def test_the_dense_peer_is_the_objective_made_of_squares() -> None:
    """Value and gradient at unique ids and fresh u are those of the estimator; 28 B × B tensors a step are made."""
    dense = benchmark("dense")
    rows, tau, gamma = 32, 0.05, 0.8
    x, y = (side.float().requires_grad_() for side in pairs(rows, width=16))
    peer, squares, twin = dense.DenseObjective(rows, tau, 16, 8, gamma), Squares(rows), Twin()
    ids, taus = torch.arange(rows), torch.full((2, rows), tau, dtype=torch.float64)
    for number in range(2):
        expected = twin.step(x, y, ids, taus, gamma)
        x.grad = y.grad = None
        with squares:
            peer(x, y, ids).backward()
        log_u = peer.u.log() + peer.largest
        torch.testing.assert_close(log_u.double(), expected.log_u, rtol=1e-4, atol=1e-4)
        for actual, gradient in ((x.grad, expected.grad_x), (y.grad, expected.grad_y)):
            torch.testing.assert_close(actual.double() / 2, gradient, rtol=1e-3, atol=1e-6)
        assert squares.made == 28 * (number + 1) + 2  # and the mask, once


def test_every_case_of_the_loss_benchmark_runs() -> None:
    loss = benchmark("loss")
    for case in loss.CASES:
        step = loss.make_step(case, 32)
        cost = loss.timed(lambda step=step: step(32))
        assert 0 < cost["cpu"] < 60, case
        assert loss.summary(case, {case: {"growth": 1.5, "before": 1.0}}, {case: [cost]})["peak_mib"] == 1.5


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_the_peak_is_that_of_the_step() -> None:
    loss = benchmark("loss")
    assert loss.peak(lambda: torch.ones(16 << 20))["growth"] == pytest.approx(64, abs=8)


# ---- the step ----


@pytest.mark.parametrize("kept", [False, True])
@pytest.mark.parametrize("name", ["clip", "sogclr", "disttempnet-v1"])
def test_counted_operations_are_those_of_the_formula(name: str, kept: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """In one process; kept similarities are one product less."""
    monkeypatch.setattr(blocks, "KEPT_BYTES", blocks.KEPT_BYTES if kept else 0)
    step = benchmark("step")
    rows, width, hidden = 96, 32, 256
    counted = step.count(step.objective_step(name, rows, width))
    expected = step.objective_flops(rows, rows, width, hidden if name == "disttempnet-v1" else 0)
    # the networks' last layer is a vector
    vector = 2 * 2 * 3 * rows * hidden if name == "disttempnet-v1" else 0
    assert expected - 2 * rows**2 * width * kept <= counted <= expected - 2 * rows**2 * width * kept + vector


def test_counted_operations_of_the_prediction_are_those_of_the_formula() -> None:
    """All prototypes are filled after the first batch; bmm and baddbmm are counted by torch."""
    step = benchmark("step")
    rows, width, prototypes, inner = 96, 32, 40, 3
    run = step.objective_step("neuclip", rows, width, prototypes=prototypes, normaliser_steps=inner, rho=1.0)
    first, second = step.count(run), step.count(run)
    assert second - first == step.predicted_flops(rows, 1, width, prototypes, inner)


def traffic(rows: int, width: int) -> dict[str, tuple[dict[str, int], int]]:
    step = benchmark("step")
    with warnings.catch_warnings(action="ignore", category=UserWarning):  # published ρ are for larger batches
        return {name: step.traffic(name, rows, width) for name in OBJECTIVES}


@pytest.mark.parametrize("ranks", [2, 4])
def test_counted_bytes_are_those_of_the_formula(gloo, ranks: int) -> None:
    """Of every objective, on every rank."""
    rows, width, step = 6, 8, benchmark("step")
    for rank in gloo(ranks, traffic, rows, width):
        assert rank.keys() == OBJECTIVES.keys()
        for name, (seen, parameters) in rank.items():
            loss = build_loss(name, num_samples=8, embed_dim=8)
            columns = sum(len(module.columns) for module in loss.modules() if isinstance(module, SampleState))
            sizes = {"state_columns": columns, "prototypes": rows * ranks, "parameters": parameters}
            expected = step.communication(name, rows, ranks, width, **sizes)
            assert seen == expected, name


# ---- trimmed texts ----


def test_trimmed_and_whole_steps_begin_alike() -> None:
    """open_clip's step, ours and ours without trimming, of a small model: one loss, and a time each."""
    found = benchmark("trim").timing("demo-vit-32", pairs=4, rounds=1)
    assert (found["tokens_mean"], found["tokens_longest"]) == (10.0, 16)
    losses = found["first_loss"].values()
    assert len(losses) == 3
    assert max(losses) - min(losses) < 1e-5
    assert found["gradients"]["ours"].keys() == found["gradients and AdamW"]["open_clip"].keys()


def test_captions_are_as_long_as_they_are_said_to_be() -> None:
    tokens = benchmark("trim").captions(16, 8, 32, 77)
    lengths = tokens.argmax(1) + 1
    assert (int(lengths.min()), int(lengths.max()), float(lengths.float().mean())) == (8, 32, 20.0)
    assert torch.equal((tokens > 0).sum(1), lengths)
