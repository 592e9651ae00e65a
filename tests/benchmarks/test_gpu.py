"""benchmarks/gpu.py on the CPU: steps, loss and tables are real, a case that cannot run is a line of the result."""

from __future__ import annotations

import json
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn

from tests.benchmarks.benchmark import benchmark

STEP = {
    "what": "step", "device": "cpu", "model": "demo-vit-32", "precision": "bf16", "batch": 8, "tokens": 12,
    "compile": False, "warm": 1, "steps": 2, "tflops": 0.001,
}  # fmt: skip
LOSS = {"what": "loss", "device": "cpu", "warm": 1, "steps": 2}


@pytest.fixture(scope="module")
def gpu() -> ModuleType:
    return benchmark("gpu")


@pytest.fixture
def cases(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.setenv("DISTTEMPNET_KERNEL", "auto")  # puts back what the cases leave
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    return benchmark("gpu_cases")


def test_a_step_is_measured(cases: ModuleType) -> None:
    (found,) = cases.measure(STEP)
    assert found["images_per_s"] == pytest.approx(8e3 / found["ms"], rel=0.01)
    flop = found["gflop_a_pair"] * found["images_per_s"]
    assert found["mfu_per_cent"] == pytest.approx(100 * flop * 1e9 / 1e9, rel=0.1)
    assert 0 < found["loss_ms"] < found["ms"]
    # products alone: 17 positions of width 64 in two layers, `positions` in one; 3 times for forward and backward
    products = 2 * (12 * 64**2) * (2 * 17 + found["positions"]) * 3
    assert products < 1e9 * found["gflop_a_pair"] < 1.3 * products


def test_captions_are_as_long_as_is_said(cases: ModuleType, tmp_path: Path) -> None:
    trainer, batch = cases.training(STEP, tmp_path)
    end_of_text = 49407
    assert (batch.tokens.argmax(1) == 11).all()
    assert (batch.tokens[:, 11] == end_of_text).all()
    assert batch.images.float().std() > 70  # noise, not one picture
    assert len(trainer.optimizers) == 2  # that of the temperature among them


def test_the_share_of_the_loss_is_that_of_the_contrast(cases: ModuleType) -> None:
    """Towers whose backward pass sleeps, and an objective whose forward and backward pass sleep less."""

    class Slow(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor, seconds: float) -> torch.Tensor:
            ctx.seconds = seconds
            time.sleep(seconds)
            return x.clone()

        @staticmethod
        def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
            time.sleep(ctx.seconds)
            return gradient, None

    class Contrast(nn.Module):
        def forward(self, image: torch.Tensor, text: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
            return Slow.apply(image, 0.02).sum() + Slow.apply(text, 0.02).sum()

    clock, contrast = cases.Clock(torch.device("cpu")), Contrast()
    seen = cases.Contrasted(contrast, clock)
    image, text = (Slow.apply(torch.ones(2, 2, requires_grad=True), 0.2) for _ in range(2))
    contrast(image, text, torch.arange(2)).backward()
    assert 80 <= clock.milliseconds(seen.begin, seen.end) < 180


def test_the_loss_is_measured_and_what_cannot_run_says_why(cases: ModuleType) -> None:
    for case in ("core torch", "rank torch", "network torch", "clip torch", "dense", "open_clip"):
        (found,) = cases.measure({**LOSS, "case": case, "batches": [64]})
        assert found["batch"] == 64
        assert 0 < found["ms"] < 60_000, case
    for what in ({**LOSS, "case": "core", "batches": [64]}, {"what": "agreement", "device": "cpu"}):
        (found,) = cases.measure(what)
        assert "DISTTEMPNET_KERNEL=triton: " in found["skipped"]
    (found,) = cases.measure({**LOSS, "case": "inf-cl", "batches": [64]})
    assert found["skipped"] in (f"not installed: {cases.INF_CL}", "has kernels for GPUs only")


def test_a_rank_computes_its_rows_of_the_whole(cases: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    from disttempnet.losses.contrast import backend

    x, y, ids = cases.loss_benchmark.unit_pairs(64)
    seen: list[torch.Tensor] = []
    feature_gradients = backend.feature_gradients
    monkeypatch.setattr(backend, "feature_gradients", lambda *given: seen.extend(feature_gradients(*given)))
    cases.rank_step(x, y, ids, kernel=False)()
    tau, mine = 0.05, slice(0, 64 // cases.RANKS)
    s = (x @ y.T).double()
    positive = s.diagonal()
    weights = ((s - positive[:, None]) / tau).exp() / 63 + ((s - positive) / tau).exp() / 63
    expected = weights.fill_diagonal_(0)[mine].float() @ y - positive[mine, None].float() * y[mine]
    torch.testing.assert_close(seen[0], expected, rtol=1e-3, atol=1e-5)


def test_out_of_memory_is_a_line_and_the_next_batch_is_measured(
    cases: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = cases.loss_step

    def full(name: str, batch: int, device: torch.device) -> Any:
        if batch > 32:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(name, batch, device)

    monkeypatch.setattr(cases, "loss_step", full)
    found = list(cases.measure({**LOSS, "case": "dense", "batches": [64, 32]}))
    assert found[0] == {"batch": 64, "skipped": "out of memory"}
    assert found[1]["ms"] > 0
    monkeypatch.setattr(cases, "training", lambda *_: full("", 64, torch.device("cpu")))
    assert list(cases.measure(STEP)) == [{"skipped": "out of memory"}]


def test_all_of_it(
    gpu: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What is written and shown, of processes that find, refuse, fail and die."""

    asked: list[str] = []

    def answers(case: dict[str, Any], seconds: float) -> list[dict[str, Any]]:
        assert 0 < seconds <= 600
        asked.append(case["what"])
        if case["what"] == "agreement":
            return [{"objective": "clip", "value_error": 0.1, "gradient_error": 0.2, "agree": False}]
        if case["what"] == "step":
            return [{"skipped": "out of memory"}] if case["batch"] > 8 else list(gpu.measure(STEP))
        if case["what"] == "golden":
            return [{"steps": 20, "largest_difference": 1e-5, "agree": True}]
        ms = {"core": 2.0, "dense": 5.0}.get(case["case"])
        return [{"batch": 64, "ms": ms, "peak_mib": 1.0} if ms else {"failed": "RuntimeError: no"}]

    monkeypatch.setattr(gpu, "in_a_process", answers)
    out = tmp_path / "gpu.json"
    arguments = "--device cpu --model demo-vit-32 --tokens 12 --batches 8 16 --compile off --loss-batches 64"
    whole = [*arguments.split(), "--loss-cases", "core", "dense", "inf-cl", "--runs", "golden", "--out", str(out)]
    assert gpu.main(whole) == 1
    result = json.loads(out.read_text(encoding="utf-8"))
    assert result["torch"] == torch.__version__
    assert result["tflops"] is None
    assert [row["batch"] for row in result["steps"]] == [8, 16]
    shown = capsys.readouterr().out
    for line in (
        "| 16 | 12 | off | out of memory | – | – | – | – | – |",
        "| core | 2 |",
        "| core than dense | 2.5 |",
        "inf-cl, all: RuntimeError: no",
        "kernels, clip: DO NOT AGREE (value 1.0e-01, gradient 2.0e-01 from float64)",
        "golden: largest_difference 1e-05, agrees",
    ):
        assert line in shown.splitlines()

    # the same command again: only what failed is measured
    assert asked == ["agreement", "loss", "loss", "loss", "step", "step", "golden"]
    asked.clear()
    assert gpu.main(whole) == 1
    assert asked == ["loss"]
    again = json.loads(out.read_text(encoding="utf-8"))
    assert sorted(map(str, again.pop("loss"))) == sorted(map(str, result.pop("loss")))
    assert again == result
    with pytest.raises(SystemExit, match=r"setting was .*: take another file"):
        gpu.main([*whole, "--steps", "7"])


def test_what_no_time_was_left_for_is_named(
    gpu: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "gpu.json"
    monkeypatch.setattr(gpu, "in_a_process", lambda *_: pytest.fail("no time is left"))
    arguments = ["--device", "cpu", "--minutes", "0", "--batches", "8", "--tokens", "12", "--compile", "off"]
    assert gpu.main([*arguments, "--loss-batches", "64", "--loss-cases", "core", "--out", str(out)]) == 1
    wanted = ["agreement", "loss, case core, batches [64]", "steps, batch 8, tokens 12, compile False"]
    wanted += [f"runs, run {run}" for run in gpu.RUNS]
    assert json.loads(out.read_text(encoding="utf-8"))["not_reached"] == wanted
    assert "not reached: runs, run demo" in capsys.readouterr().out.splitlines()


def test_the_most_important_comes_first(gpu: ModuleType) -> None:
    from argparse import Namespace

    options = Namespace(
        loss_batches=[32768], loss_cases=["core torch", "inf-cl", "rank"], compile="both", tokens=[77, 20],
        batches=[1024, 512], runs=["golden", "demo"],
    )  # fmt: skip
    plan = [(kind, *case.values()) for kind, case in gpu.cases(options)]
    assert plan[:4] == [("agreement",), *(("loss", name, [32768]) for name in ("rank", "inf-cl", "core torch"))]
    steps = [entry[1:] for entry in plan if entry[0] == "steps"]
    assert steps[:2] == [(1024, 77, True), (512, 77, True)]
    assert len(steps) == len(set(steps)) == 8
    assert plan.index(("runs", "golden")) == 4 + 5, "after the steps at the first batch or the first setting"


@pytest.mark.slow
def test_runs_and_a_group_of_one_rank(cases: ModuleType) -> None:
    (golden,) = cases.measure({"what": "golden", "device": "cpu"})
    assert golden == {"steps": 20, "largest_difference": 0.0, "agree": True}
    found = list(cases.measure({"what": "group", "device": "cpu"}))
    assert [row["checked"] for row in found] == ["collectives", "DDP, bf16", "FSDP2"]
    assert all(row["agree"] for row in found)


def test_a_process_that_takes_too_long_is_ended(gpu: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    script = tmp_path / "sleeps.py"
    script.write_text("import json, time\nprint(json.dumps({'batch': 1}), flush=True)\ntime.sleep(600)\n", "utf-8")
    monkeypatch.setattr(gpu, "__file__", str(script))
    found = list(gpu.in_a_process({}, 8.0))
    assert found[-1] == {"failed": "not done after 8 s"}


def test_a_process_that_dies_leaves_what_it_had(gpu: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    script = tmp_path / "dies.py"
    script.write_text("import os, json\nprint(json.dumps({'batch': 1}), flush=True)\nos._exit(3)\n", encoding="utf-8")
    monkeypatch.setattr(gpu, "__file__", str(script))
    assert list(gpu.in_a_process({}, 300.0)) == [{"batch": 1}, {"failed": "the process ended with exit code 3"}]


@pytest.mark.parametrize(
    ("name", "tflops"),
    [
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA A10G", None),
        ("NVIDIA L40S", 362),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
    ],
)
def test_the_peak_of_a_device(gpu: ModuleType, name: str, tflops: float | None) -> None:
    assert gpu.peak_tflops(name) == tflops


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so_in_a_line(gpu: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        gpu.main([])
    assert end.value.code == 2
    assert "error: no NVIDIA GPU here" in capsys.readouterr().err.splitlines()[-1]
