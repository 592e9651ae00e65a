"""The Triton kernels in Triton's interpreter on CPU, against the plain path; and that they compile for GPUs.

Skipped where triton is not installed: `.[kernels]` has it for Linux on x86_64. The interpreter shows that the
arithmetic and the edges are right, not that a GPU runs it fast. Triton reads TRITON_INTERPRET when it is first
imported, so one test here runs the others in a process that has it set.
"""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor

from disttempnet import Features, build_loss, distributed
from disttempnet.errors import UserError
from disttempnet.losses.contrast import backend
from disttempnet.losses.contrast.backend import anchor_statistics, feature_gradients
from disttempnet.losses.contrast.pairs import Anchors, BatchPairs, rounded
from tests.losses.scenario import pairs, reference_of

pytest.importorskip("triton")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
interpreted = pytest.mark.skipif(not INTERPRETED, reason="run by test_in_the_interpreter")
close = torch.testing.assert_close
ROWS, WIDTH = 37, 40  # no multiple of any block size


@pytest.mark.skipif(INTERPRETED, reason="this is the other process")
def test_in_the_interpreter() -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", __file__]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=Path(__file__).parents[3])
    assert result.returncode == 0, result.stdout
    assert " passed" in result.stdout, "not all skipped"


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The module with blocks so small that there are several of each kind."""
    monkeypatch.setenv(backend.KERNEL_SETTING, "triton")
    module = importlib.import_module("disttempnet.losses.contrast.triton")
    for constant, value in {
        "ROWS": 16,
        "COLUMNS": 16,
        "DEPTH": 32,
        "GRADIENT_WIDTH": 32,
        "PROGRAMS_A_PROCESSOR": 6,
    }.items():
        monkeypatch.setattr(module, constant, value)
    return module


def contrast(ids: Tensor | None, own: slice, width: int = WIDTH) -> tuple[BatchPairs, BatchPairs, Tensor]:
    """The same rounded features for the kernels in float32, for the plain path in float64; and n of every row."""
    x, y = (side.bfloat16().double() for side in pairs(ROWS, width=width))
    exact, negatives = BatchPairs.of((x, y), (x, y), ids, kernel=False)
    exact = exact._replace(image=x[own], text=y[own], first_row=own.start)
    low = BatchPairs(x[own].float(), y[own].float(), x.float(), y.float(), own.start, ids, kernel=True)
    return low, exact, negatives


@interpreted
@pytest.mark.parametrize("own", [slice(0, ROWS), slice(11, 30)], ids=str)
@pytest.mark.parametrize("case", ["every column counts", "repeated"])
def test_statistics_and_gradients(kernels: ModuleType, case: str, own: slice) -> None:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, 15, (ROWS,), generator=generator) if case == "repeated" else None
    low, exact, negatives = contrast(ids, own)
    taus = (torch.rand(2, ROWS, generator=generator, dtype=torch.float64) * 0.2 + 0.01)[:, own]
    positive = (exact.image * exact.text).sum(1)
    expected, _ = anchor_statistics(exact, positive, taus, negatives[own], moments=True, keep=False)
    actual, _ = anchor_statistics(low, positive.float(), taus.float(), negatives[own].float(), moments=True, keep=False)
    for a, e in zip(actual, expected, strict=True):
        close(a.log_mean.double(), e.log_mean, rtol=1e-5, atol=1e-4)
        close(a.mean_exponent.double(), e.mean_exponent, rtol=1e-5, atol=1e-4)

    image, text = (Anchors(20 * torch.rand(ROWS, generator=generator), torch.rand(ROWS, generator=generator) - 3)
                   for _ in range(2))  # fmt: skip
    push = torch.linspace(-1, 1, ROWS)[own]
    high = [Anchors(*(part.double() for part in anchors)) for anchors in (image, text)]
    for a, e in zip(
        feature_gradients(low, image, text, push, []), feature_gradients(exact, *high, push.double(), []), strict=True
    ):
        assert (a.double() - e).norm() < 2**-7 * e.norm()  # the interpreter rounds bf16 down, GPUs to nearest


@interpreted
@pytest.mark.parametrize("case", ["every column counts", "repeated"])
def test_columns_that_come_round_are_those_that_were_gathered(
    kernels: ModuleType, case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second of three ranks, whose blocks come in the ring's order, as bf16."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, 15, (36,), generator=generator) if case == "repeated" else None
    x, y = (side.bfloat16().float() for side in pairs(36, width=WIDTH))
    own = slice(12, 24)
    gathered = BatchPairs(x[own], y[own], x.bfloat16(), y.bfloat16(), 12, ids, kernel=True)
    handed = torch.stack([x, y]).view(2, 3, 12, WIDTH).bfloat16()
    sent: list[Tensor] = []
    monkeypatch.setattr(distributed, "world_size", lambda: 3)
    monkeypatch.setattr(distributed, "ring", lambda rows: sent.append(rows) or ((k, handed[:, k]) for k in (1, 0, 2)))
    in_ring = gathered._replace(all_image=None, all_text=None)
    taus = torch.rand(2, 12, generator=generator) * 0.2 + 0.01
    image, text = (Anchors(20 * torch.rand(36, generator=generator), torch.rand(36, generator=generator) - 3)
                   for _ in range(2))  # fmt: skip
    found, expected = [], []
    for results, batch in ((found, in_ring), (expected, gathered)):
        positive, count = (x * y).sum(1)[own], torch.full((12,), 30.0)
        sides, _ = anchor_statistics(batch, positive, taus, count, moments=True, keep=False)
        results += [side.log_mean for side in sides] + [side.mean_exponent for side in sides]
        results += feature_gradients(batch, image, text, torch.linspace(-1, 1, 12), [])
    close(found[:4], expected[:4], rtol=1e-5, atol=1e-5)
    for a, e in zip(found[4:], expected[4:], strict=True):
        assert (a - e).norm() < 1e-5 * e.norm()
    assert [rows.dtype for rows in sent] == [torch.bfloat16] * 2
    assert torch.equal(sent[0], handed[:, 1])


@interpreted
@pytest.mark.parametrize("name", ["sogclr", "disttempnet-v1", "clip", "onlineclr", "drrho"])
def test_the_objectives_step_is_that_of_the_rounded_features(kernels: ModuleType, name: str) -> None:
    """Value, state and temperature to float32, the features' gradient to the rounding of its weights."""
    x, y = (side.bfloat16() for side in pairs(ROWS, width=WIDTH))
    ids = torch.arange(ROWS)
    ids[-1] = ids[0]
    gradients, totals = [], []
    for dtype, setting in ((torch.float32, "triton"), (torch.float64, "torch")):
        os.environ[backend.KERNEL_SETTING] = setting  # put back by the fixture
        loss = build_loss(name, num_samples=ROWS, embed_dim=WIDTH, seed=1)
        for _ in range(2):
            features = [side.to(dtype).requires_grad_() for side in (x, y)]
            given = Features.unit(*features)
            if name == "drrho":  # no rounding of the reference's features either
                theirs = [side.bfloat16().to(dtype) for side in reference_of(x.double(), y.double())]
                given = given._replace(reference_image=theirs[0], reference_text=theirs[1])
            total = loss(given, ids).total
            total.backward()
        gradients.append([side.grad.double() for side in features])
        totals.append(total.detach().double())
    close(totals[0], totals[1], rtol=1e-5, atol=1e-6)
    for low, high in zip(*gradients, strict=True):
        assert (low - high).norm() < 2**-7 * high.norm()


@interpreted
def test_what_rounding_the_features_costs(kernels: ModuleType) -> None:
    """At D = 512 and τ = .01: ℓ errs by less than .03 nat in the mean square, of values spread over tens of nats."""
    kernels.DEPTH = 256  # fewer steps of the interpreter; put back by the fixture
    x, y = pairs(ROWS, width=512)
    exact, negatives = BatchPairs.of((x, y), (x, y), torch.arange(ROWS), kernel=False)
    taus = torch.full((2, ROWS), 0.01, dtype=torch.float64)
    expected, _ = anchor_statistics(exact, (x * y).sum(1), taus, negatives, moments=True, keep=False)
    low = [rounded(side, True).float() for side in (x, y)]
    seen, _ = BatchPairs.of((low[0], low[1]), (low[0], low[1]), torch.arange(ROWS), kernel=True)
    positive = (low[0] * low[1]).sum(1)
    actual, _ = anchor_statistics(seen, positive, taus.float(), negatives.float(), moments=True, keep=False)
    for a, e in zip(actual, expected, strict=True):
        error = a.log_mean.double() - e.log_mean
        assert 1e-4 < error.square().mean().sqrt() < 0.03
        assert e.log_mean.std() > 1


@interpreted
def test_where_the_kernels_cannot_run(monkeypatch: pytest.MonkeyPatch, kernels: ModuleType) -> None:
    with pytest.raises(UserError, match="the features are float64"):
        backend.use_kernel(torch.zeros(2, 4, dtype=torch.float64))
    assert backend.use_kernel(torch.zeros(2, 4))
    monkeypatch.delenv("TRITON_INTERPRET")
    with pytest.raises(UserError, match="the features are on cpu, and the kernels need an NVIDIA GPU"):
        backend.use_kernel(torch.zeros(2, 4))


class OnAGpu(torch.Tensor):
    is_cuda = True
    device = torch.device("cuda:0")  # type: ignore[assignment]


@pytest.mark.skipif(INTERPRETED, reason="the interpreter needs no GPU")
def test_gpus_that_cannot_run_the_kernels_are_known(monkeypatch: pytest.MonkeyPatch) -> None:
    from disttempnet.losses.contrast.triton import unusable

    features = torch.zeros(2, 4).as_subclass(OnAGpu)
    for capability, message in (((7, 5), "compute capability 7.5 cannot"), ((8, 0), ""), ((12, 0), "")):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _, c=capability: c)
        assert unusable(features).endswith(message)
        assert bool(unusable(features)) == bool(message)
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert "an AMD GPU" in unusable(features)


COMPILE = """
import sys
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from disttempnet.losses.contrast import triton as p

pointers = {"rows": "*bf16", "columns": "*bf16", "row_ids": "*i64", "column_ids": "*i64"}
blocks = {"EXCLUDE": True, "NOTHING": p.EXCLUDED, "ROWS": p.ROWS, "COLUMNS": p.COLUMNS, "DEPTH": p.DEPTH}
kernels = {
    p._statistics_kernel: (blocks, {}),
    p._gradient_kernel: ({**blocks, "WIDTH": p.GRADIENT_WIDTH}, {"num_warps": 8, "num_stages": 2}),
}
for capability, limit in ((80, 163 * 1024), (89, 99 * 1024), (90, 227 * 1024)):
    for kernel, (constants, options) in kernels.items():
        kinds = {name: pointers.get(name, "*fp32") for name in kernel.arg_names}
        sizes = [name for name in kernel.arg_names if name in ("b", "B", "D", "share", "first_row")]
        kinds |= {name: "i32" for name in sizes} | {name: "constexpr" for name in constants}
        source = ASTSource(kernel, kinds, constants)
        compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
        assert "cubin" in compiled.asm
        assert compiled.metadata.shared <= limit, (kernel, capability, compiled.metadata.shared)
        print(kernel.__name__, capability, compiled.metadata.shared)
"""


@pytest.mark.slow
@pytest.mark.skipif(INTERPRETED, reason="compiles")
def test_the_kernels_compile_for_a_gpu_and_fit_into_its_shared_memory(tmp_path: Path) -> None:
    """For compute capability 8.0 (A100), 8.9 (RTX 4090, L40) and 9.0 (H100), without one."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    result = subprocess.run([sys.executable, "-c", COMPILE], env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert len(result.stdout.splitlines()) == 6
