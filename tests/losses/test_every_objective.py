"""What holds for every row of the list: world size, small batches, number formats, saving, memory, metrics."""

from __future__ import annotations

import copy
from contextlib import nullcontext

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from disttempnet import OBJECTIVES, Features
from disttempnet.losses.contrast import blocks
from disttempnet.losses.sample_state import SampleState
from tests.losses.scenario import (
    EVERY,
    B,
    D,
    GlobalBatch,
    N,
    StepResult,
    assert_same_steps,
    descend,
    every_objective,
    joined,
    kept,
    make,
    pairs,
    run,
    run_saved,
    step,
    stream,
    unique_batch,
)

close = torch.testing.assert_close


# ---- world size ----


@pytest.mark.parametrize("world_size", [2, 4])
@every_objective
def test_world_size_is_invisible(gloo, recipe: dict, world_size: int) -> None:
    """Value, feature and parameter gradients, metrics, and everything that is kept; parameters move in between."""
    batches, expected = stream(5, seed=3), run(recipe, stream(5, seed=3))
    assert_same_steps(joined(gloo(world_size, run, recipe, batches)), expected)
    if any(isinstance(module, SampleState) for module in make(recipe).modules()):
        assert_same_steps(joined(gloo(world_size, run, {**recipe, "shard_state": True}, batches)), expected)


@pytest.mark.parametrize(("rows", "world_size"), [(4, 4), (2, 2)])
@every_objective
def test_one_row_a_rank(gloo, recipe: dict, rows: int, world_size: int) -> None:
    """Four ranks with a row each, and the smallest contrast there is."""
    batches = [batch.first(rows) for batch in stream(4, seed=1)]
    assert_same_steps(joined(gloo(world_size, run, recipe, batches)), run(recipe, batches))


@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@every_objective
def test_smallest_batches_are_finite(recipe: dict, rows: int, dtype: torch.dtype) -> None:
    loss = make(recipe).float()
    for seed in range(2):
        result = step(loss, unique_batch(seed, rows=rows).to(dtype))
        for value in (
            result.total,
            result.grad_x,
            result.grad_y,
            *result.parameters.values(),
            *result.metrics.values(),
        ):
            assert value.isfinite().all()


# ---- number formats ----


@every_objective
def test_half_precision_features(recipe: dict) -> None:
    """bf16 features: the numbers are those of the same features in float32, gradients come back in bf16."""
    half, full = make(recipe).float(), make(recipe).float()
    for batch in stream(3):
        low, high = step(half, batch.to(torch.bfloat16)), step(full, batch.to(torch.bfloat16).to(torch.float32))
        assert low.grad_x.dtype == low.grad_y.dtype == torch.bfloat16
        assert low.total.dtype == torch.float32
        close(low.total, high.total, rtol=1e-6, atol=1e-7)
        close(low.kept, high.kept, rtol=1e-6, atol=1e-6)
        for rounded, exact in ((low.grad_x, high.grad_x), (low.grad_y, high.grad_y)):
            assert (rounded.float() - exact).norm() < 2**-8 * exact.norm()
        close(low.parameters, high.parameters, rtol=1e-5, atol=1e-7)


@every_objective
def test_autocast_does_not_reach_inside(recipe: dict) -> None:
    plain, cast = make(recipe).float(), make(recipe).float()
    for batch in stream(3):
        expected, actual = (step(loss, batch.to(torch.float32), on) for loss, on in ((plain, False), (cast, True)))
        assert actual.total.dtype == torch.float32
        assert_same_steps([actual], [expected], tolerance=0)


@every_objective
def test_float32_stays_near_float64(recipe: dict) -> None:
    low, high = make(recipe).float(), make(recipe)
    for batch in stream(4):
        actual, expected = step(low, batch.to(torch.float32)), step(high, batch)
        close(actual.total.double(), expected.total, rtol=1e-4, atol=1e-5)
        close(actual.grad_x.double(), expected.grad_x, rtol=1e-3, atol=1e-5)
        close(actual.grad_y.double(), expected.grad_y, rtol=1e-3, atol=1e-5)


# ---- what is kept ----


@pytest.mark.parametrize("cut", [1, 3])
@every_objective
def test_state_dict_continues_bit_for_bit(recipe: dict, cut: int) -> None:
    """Parameters, tables, buffers, step (dropout masks); at 1 with half of the prototypes started."""
    batches = stream(5)
    results, _ = run_saved(recipe, batches, cut)
    assert_same_steps(results, run(recipe, batches), tolerance=0)


@every_objective
def test_state_dict_continues_bit_for_bit_over_ranks(gloo, recipe: dict) -> None:
    batches = stream(5)
    resumed = joined([results for results, _ in gloo(2, run_saved, recipe, batches, 3)])
    assert_same_steps(resumed, joined(gloo(2, run, recipe, batches)), tolerance=0)


@every_objective
def test_state_dict_goes_through_a_weights_only_file(recipe: dict, tmp_path) -> None:
    loss, other = make(recipe).float(), make(recipe).float()
    step(loss, stream(1)[0].to(torch.float32))
    torch.save(loss.state_dict(), tmp_path / "loss.pt")
    other.load_state_dict(torch.load(tmp_path / "loss.pt", weights_only=True))
    batch = stream(2)[1].to(torch.float32)
    assert_same_steps([step(other, batch)], [step(loss, batch)], tolerance=0)


def continue_resharded(recipe: dict, states: list[dict], batches: list[GlobalBatch]) -> list[StepResult]:
    """Go on at this world size from the states of all old ranks."""
    loss = make(recipe)
    loss.load_state_dict({key: value for state in states for key, value in state.items()})
    results = []
    for batch in batches:
        results.append(step(loss, batch))
        descend(loss, 0.3)
    return results


@pytest.mark.parametrize(("old", "new"), [(4, 1), (4, 2), (2, 4)])
@every_objective
def test_training_goes_on_at_another_world_size(gloo, recipe: dict, old: int, new: int) -> None:
    """Every rank saves the state of the samples that it owns."""
    batches, cut = stream(5), 3
    expected = run(recipe, batches)[cut:]
    recipe = {**recipe, "shard_state": True}
    states = [saved for _, saved in gloo(old, run_saved, recipe, batches[:cut], cut)]
    if new == 1:
        actual = continue_resharded(recipe, states, batches[cut:])
    else:
        actual = joined(gloo(new, continue_resharded, recipe, states, batches[cut:]))
    assert_same_steps(actual, expected)


@every_objective
def test_evaluation_reads_and_does_not_write(recipe: dict) -> None:
    """Buffers, tables, prototypes, step count: an evaluation changes no bit, and training goes on as without it."""
    loss, other, batches = make(recipe), make(recipe), stream(2)
    step(loss, batches[0])
    step(other, batches[0])
    before = copy.deepcopy(loss.state_dict())
    loss.eval()
    first, second = (loss(Features.unit(batches[1].x, batches[1].y), batches[1].ids) for _ in range(2))
    assert first.total == second.total
    after = loss.state_dict()
    assert before.keys() == after.keys()
    for key, value in before.items():
        if isinstance(value, Tensor):
            close(after[key], value, rtol=0, atol=0)
        else:
            assert after[key] == value
    loss.train()
    assert_same_steps([step(loss, batches[1])], [step(other, batches[1])], tolerance=0)


def test_what_is_kept_is_what_the_objective_needs() -> None:
    """The case of each list entry says something: who has tables, buffers and parameters."""
    tables, buffers, parameters = set(), set(), set()
    for name, recipe in EVERY.items():
        loss = make(recipe)
        found = kept(loss, torch.arange(N))
        named = {key for key, _ in loss.named_buffers()}
        tables |= {name} if found.keys() - named else set()
        buffers |= {name} if named else set()
        parameters |= {name} if list(loss.parameters()) else set()
    assert buffers == {"amorlip", "neuclip", "onlineclr"}
    no_tables = {
        "amorlip",
        "clip",
        "clip-constant",
        "clip-network",
        "dcl",
        "neuclip",
        "siglip",
        "cyclip",
        "vicreg",
        "onlineclr",
    }
    assert set(EVERY) - tables == no_tables
    no_parameters = {"clip-constant", "clip-per-sample", "dcl", "sogclr", "isogclr", "fastclip-v1", "fastclip-v2"}
    no_parameters |= {"drrho", "nuclr", "tuneclip", "vicreg", "onlineclr"}
    assert set(EVERY) - parameters == no_parameters


# ---- graph, memory, metrics ----


@every_objective
def test_a_step_neither_asks_the_device_nor_sends_it_numbers(recipe: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    """Either makes the host wait for a GPU. On the meta device, which holds no numbers that could be asked for."""

    def refuse(*_: object, **__: object) -> Tensor:
        raise AssertionError("a number is sent to the device")

    loss = make({key: value for key, value in recipe.items() if key != "dropout"}).float()
    for temperature in (module for module in loss.modules() if hasattr(module, "dropout")):
        temperature.dropout = 0.0  # its generator has no meta device
    loss.to("meta")
    x, y = (torch.empty(B, D, device="meta", requires_grad=True) for _ in range(2))
    ids = torch.empty(B, dtype=torch.int64, device="meta")
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())  # knows no meta device
    for module, name in ((torch, "tensor"), (torch, "as_tensor"), (Tensor, "new_tensor")):
        monkeypatch.setattr(module, name, refuse)
    with pytest.raises(RuntimeError):
        x.sum().item()  # so would any question
    for _ in range(2):
        loss(Features.of(x, y), ids).total.backward()
    assert x.grad is not None


class LargestTensor(TorchDispatchMode):
    """Remembers the number of elements of the largest tensor that any operation made."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for item in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(item, Tensor):
                self.elements = max(self.elements, item.numel())
        return result


@every_objective
def test_memory_does_not_grow_with_the_square_of_the_batch(recipe: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither in passing (blocks only), nor saved for the backward pass ([b, D], not b × B); a batch whose
    similarities fit into a fixed memory keeps them, which is left out here."""
    monkeypatch.setattr(blocks, "KEPT_BYTES", 0)
    rows, width = 2200, 4
    x, y = (side.float().requires_grad_() for side in pairs(rows, width=width))
    loss = make(recipe, num_samples=rows, embed_dim=width).float()
    saved: list[int] = []

    def pack(tensor: Tensor) -> Tensor:
        saved.append(tensor.numel())
        return tensor

    with LargestTensor() as largest, torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss(Features.unit(x, y), torch.arange(rows)).total.backward()
    assert largest.elements <= rows * rows // 4
    assert sum(saved) <= rows * rows // 10  # networks keep a few [b, M] as well
    assert x.grad.isfinite().all()


@every_objective
def test_total_is_a_scalar_whose_gradient_scales_linearly(recipe: dict) -> None:
    """total is a leaf of nothing else: an outer factor (accumulation, scaling) reaches every gradient."""
    batch, gradients = unique_batch(1), []
    for factor in (1.0, 3.0):
        loss = make(recipe)
        x, y = batch.x.clone().requires_grad_(), batch.y.clone().requires_grad_()
        out = loss(Features.unit(x, y), batch.ids)
        assert out.total.shape == ()
        (factor * out.total).backward()
        gradients.append([x.grad, y.grad, *(p.grad for p in loss.parameters())])
    for once, thrice in zip(*gradients, strict=True):
        close(thrice, 3 * once, rtol=1e-12, atol=1e-15)


@every_objective
def test_metrics_are_detached_scalars(recipe: dict) -> None:
    batch, loss = unique_batch(1), make(recipe)
    x = batch.x.clone().requires_grad_()
    wanted = loss.temperatures(batch.x, batch.y, batch.ids)
    out = loss(Features.unit(x, batch.y), batch.ids)
    for name, value in out.metrics.items():
        assert isinstance(value, Tensor), name
        assert value.shape == (), name
        assert not value.requires_grad, name
    close(out.metrics["loss"], out.total.detach(), rtol=1e-12, atol=1e-15)
    assert (wanted is None) == (recipe["name"] == "vicreg")
    assert ("tau/image_mean" in out.metrics) == (wanted is not None)
    if wanted is not None:
        assert wanted.shape == (2, B)
        assert not wanted.requires_grad
        kind = OBJECTIVES[recipe["name"]].temperature
        if kind != "network":  # dropout and prototypes
            close(out.metrics["tau/image_mean"].double(), wanted[0].double().mean(), rtol=1e-6, atol=0)
            close(out.metrics["tau/text_mean"].double(), wanted[1].double().mean(), rtol=1e-6, atol=0)


class Towers(nn.Module):
    """Linear towers and the objective, as one module: the way it is trained."""

    def __init__(self, recipe: dict) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.image, self.text, self.loss = nn.Linear(6, 6).double(), nn.Linear(6, 6).double(), make(recipe)

    def forward(self, x: Tensor, y: Tensor, ids: Tensor) -> Tensor:
        return self.loss(Features.of(self.image(x), self.text(y)), ids).total


def descent(recipe: dict) -> list[float]:
    model = Towers(recipe)
    model.loss.set_epoch(0)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    batch = unique_batch(1)
    totals = []
    for _ in range(30):
        optimizer.zero_grad()
        total = model(batch.x, batch.y, batch.ids)
        total.backward()
        optimizer.step()
        totals.append(total.item())
    return totals


@pytest.mark.filterwarnings("ignore:the loss's temperature has a learning rate of its own:UserWarning")
@every_objective
def test_following_the_gradient_lowers_the_value(recipe: dict) -> None:
    changes = {
        key: value
        for key, value in (("gamma", 1.0), ("gamma_min", 1.0), ("dropout", 0.0))
        if key in OBJECTIVES[recipe["name"]].arguments
    }
    totals = descent({**recipe, **changes})
    assert totals[-1] < totals[0] - 0.01 * abs(totals[0])
