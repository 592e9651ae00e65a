"""What every objective accepts and refuses: epochs, evaluation, ids, rows, second gradients."""

from __future__ import annotations

import math
import warnings
from collections import deque

import numpy as np
import pytest
import torch

from disttempnet import OBJECTIVES, Features, distributed
from disttempnet.losses import objective as core
from tests.losses.scenario import EVERY, B, D, N, every_objective, kept, make, pairs, stream, unique_batch

close = torch.testing.assert_close


# ---- epochs ----

SCHEDULED = ["disttempnet-v1", "fastclip-v1", "fastclip-v3-constant-gamma", "tempnet"]


@pytest.mark.parametrize("name", SCHEDULED)
def test_epochs_by_steps_are_epochs_that_are_told(name: str) -> None:
    """γ, the temperature's rate and what it is after six epochs of two steps; a resumed loss goes on by itself."""
    recipe = {**EVERY[name], "gamma_decay_epochs": 5.0} if "gamma_decay_epochs" in EVERY[name] else EVERY[name]
    told, counting = make(recipe), make(recipe, steps_per_epoch=2)
    for number, batch in enumerate(stream(12)):
        told.set_epoch(number // 2)
        if number == 7:
            saved = counting.state_dict()
            counting = make(recipe, steps_per_epoch=2)
            counting.load_state_dict(saved)
        outs = [one(Features.unit(batch.x, batch.y), batch.ids) for one in (told, counting)]
        close(outs[1], outs[0], rtol=0, atol=0)
        assert counting.current_rate() == told.current_rate()
    assert counting.epoch == 5


def test_telling_takes_over_from_counting() -> None:
    loss = make(EVERY["disttempnet-v1"], steps_per_epoch=1)
    loss.set_epoch(1)
    for batch in stream(3):
        loss(Features.unit(batch.x, batch.y), batch.ids)
    assert loss.epoch == 1


@pytest.mark.parametrize("name", SCHEDULED)
def test_an_epoch_that_nobody_tells_is_named_once(name: str) -> None:
    loss = make(EVERY[name])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for batch in stream(3):  # N + B rows may still be one epoch
            loss(Features.unit(batch.x, batch.y), batch.ids)
        assert not caught
        for batch in stream(6):
            loss(Features.unit(batch.x, batch.y), batch.ids)
    (notice,) = caught
    assert "set_epoch was never called" in str(notice.message)
    assert "steps_per_epoch=len(loader)" in str(notice.message)
    assert notice.filename == __file__


@pytest.mark.parametrize("name", [name for name in EVERY if name not in (*SCHEDULED, "disttempnet", "clip-network")])
def test_who_has_no_schedule_or_was_told_hears_nothing(name: str) -> None:
    loss = make(EVERY[name])
    if loss.scheduled or OBJECTIVES[name].arguments.get("tau_threshold"):
        loss.set_epoch(0)
    for batch in stream(8):
        loss(Features.unit(batch.x, batch.y), batch.ids)


@pytest.mark.parametrize("epoch", [-1, math.nan])
def test_no_epoch_is_negative(epoch: float) -> None:
    with pytest.raises(ValueError, match="epoch must not be negative"):
        make(EVERY["sogclr"]).set_epoch(epoch)


# ---- evaluation ----


@every_objective
def test_an_evaluation_borrows_nothing_from_training_samples(recipe: dict) -> None:
    """The value is that of a loss that never saw a sample, at its τ; ids may be left out, and may be any numbers."""
    loss = make(recipe)
    for batch in stream(4):
        loss.set_epoch(batch.epoch)
        loss(Features.unit(batch.x, batch.y), batch.ids)
    loss.eval()
    batch = unique_batch(7)
    features = Features.unit(batch.x, batch.y)
    without = loss(features).total
    for ids in (batch.ids, torch.arange(B) + 10**6, list(range(B))):
        assert loss(features, ids).total == without
    if recipe["name"] in ("sogclr", "fastclip-v1", "onlineclr"):  # a constant τ
        fresh = make(recipe)
        close(fresh(features, batch.ids).total, without, rtol=1e-12, atol=0)


@pytest.mark.parametrize("name", ["isogclr", "fastclip-v2", "clip-per-sample"])
def test_pairs_without_a_tau_of_their_own_have_the_mean_of_those_learned(gloo, name: str) -> None:
    recipe = EVERY[name]
    found = evaluated_tau(recipe)
    loss = make(recipe).eval()
    batch = unique_batch(7)
    assert loss(Features.unit(batch.x, batch.y)).metrics["tau/image_mean"].item() == pytest.approx(0.06)
    assert found[0] != pytest.approx(0.06, rel=1e-3)
    assert found == pytest.approx(found[2:] * 2, rel=1e-6), "of the samples that were seen, and only of those"
    for rank in gloo(2, evaluated_tau, recipe):
        assert rank == pytest.approx(found, rel=1e-6)


def evaluated_tau(recipe: dict) -> list[float]:
    """τ of both sides in an evaluation, and the means over the training samples that were seen."""
    loss, seen = make(recipe), set()
    for batch in stream(2):
        loss.set_epoch(0)
        share = B // distributed.world_size()
        rows = slice(distributed.rank() * share, (distributed.rank() + 1) * share)
        loss(Features.unit(batch.x[rows], batch.y[rows]), batch.ids[rows])
        seen |= set(batch.ids.tolist())
    assert len(seen) < N
    loss.eval()
    batch = unique_batch(7)
    metrics = loss(Features.unit(batch.x, batch.y)).metrics
    table = loss.temperature.state.read(torch.tensor(sorted(seen)))[:2]
    return [metrics["tau/image_mean"].item(), metrics["tau/text_mean"].item(), *table.mean(1).tolist()]


# ---- ids ----


@pytest.mark.parametrize(
    "kind",
    [list, tuple, np.asarray, lambda ids: np.asarray(ids, np.int32), lambda ids: torch.tensor(ids, dtype=torch.int32),
     lambda ids: [np.int64(i) for i in ids], lambda ids: torch.tensor(ids, dtype=torch.uint8),
     lambda ids: torch.tensor(ids, dtype=torch.uint16), lambda ids: torch.tensor(ids, dtype=torch.uint64)],
    ids=["list", "tuple", "numpy", "numpy int32", "int32", "numpy scalars", "uint8", "uint16", "uint64"],
)  # fmt: skip
@pytest.mark.parametrize("name", ["sogclr", "isogclr", "onlineclr", "clip"])
def test_ids_of_any_kind(name: str, kind) -> None:
    one, other = make(EVERY[name]), make(EVERY[name])
    for batch in stream(3):
        features = Features.unit(batch.x, batch.y)
        expected = one(features, batch.ids)
        close(other(features, kind(batch.ids.tolist())), expected, rtol=0, atol=0)
        close(kept(other, batch.ids), kept(one, batch.ids), rtol=0, atol=0)
    if name != "onlineclr":
        close(
            other.temperatures(batch.x, batch.y, kind(batch.ids.tolist())),
            one.temperatures(batch.x, batch.y, batch.ids),
        )


@pytest.mark.parametrize("ids", [[0.0] * B, torch.zeros(B), [True] * B, torch.zeros(B, 1).long(), [1, 2], "abc"])
def test_what_is_no_id_is_refused_in_one_line(ids: object) -> None:
    x, y = pairs(B)
    with pytest.raises(ValueError, match=rf"ids must be integers of shape \[{B}\], got ") as caught:
        make(EVERY["sogclr"])(Features.unit(x, y), ids)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["sogclr", "isogclr", "fastclip-v3"])
def test_training_needs_ids_where_something_is_kept_a_sample(name: str) -> None:
    x, y = pairs(B)
    with pytest.raises(ValueError, match="ids are needed in training"):
        make(EVERY[name])(Features.unit(x, y))


@pytest.mark.parametrize("name", ["clip", "siglip", "cyclip", "vicreg", "clip-network"])
def test_who_keeps_nothing_a_sample_needs_no_ids(name: str) -> None:
    x, y = pairs(B)
    one, other = make(EVERY[name]), make(EVERY[name])
    close(one(Features.unit(x, y)).total, other(Features.unit(x, y), torch.arange(B)).total, rtol=0, atol=0)


def test_a_loss_on_another_device_than_the_features_says_so() -> None:
    x = torch.empty(B, D, device="meta")
    for name in ("sogclr", "clip", "onlineclr", "isogclr"):
        with pytest.raises(ValueError, match=r"the loss is on cpu, the features are on meta: .*loss\.to\(\)"):
            make(EVERY[name])(Features.unit(x, x), torch.arange(B))


@every_objective
def test_exact_arithmetic_follows_the_features_and_ids_follow_them(
    recipe: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    """ids on the CPU, features elsewhere."""
    devices = []
    monkeypatch.setattr(core, "exact_arithmetic", lambda device: devices.append(device))
    monkeypatch.setattr(torch, "autocast", lambda device, **_: devices.append(device) or warnings.catch_warnings())
    loss = make({k: v for k, v in recipe.items() if k != "dropout"}).float().eval().to("meta")
    x, y = (torch.empty(B, D, device="meta") for _ in range(2))
    assert loss(Features.of(x, y), torch.arange(B)).total.device.type == "meta"
    assert set(devices) == {"meta"}


# ---- rows, and gradients of gradients ----


@every_objective
def test_no_rows_are_refused(recipe: dict) -> None:
    empty = torch.empty(0, D)
    with pytest.raises(ValueError, match="a batch of 0 rows has no loss"):
        make(recipe)(Features.of(empty, empty), torch.empty(0).long())


@every_objective
def test_a_gradient_is_not_differentiated_again(recipe: dict) -> None:
    """It would be 0 or wrong. A second backward pass of a kept graph is the same again."""
    loss, batch = make(recipe), unique_batch(1)
    x = batch.x.clone().requires_grad_()
    total = loss(Features.unit(x, batch.y), batch.ids).total
    (first,) = torch.autograd.grad(total, x, retain_graph=True)
    close(torch.autograd.grad(total, x, retain_graph=True), (first,), rtol=0, atol=0)
    with pytest.raises(RuntimeError, match="cannot be differentiated again"):
        torch.autograd.grad(total, x, create_graph=True)


def test_features_of_another_width_are_refused() -> None:
    x, y = pairs(B, width=D + 1)
    with pytest.raises(ValueError, match=f"features are {D + 1} wide, the loss was built with embed_dim = {D}"):
        make(EVERY["disttempnet-v1"])(Features.unit(x, y), torch.arange(B))


ROWS = "every rank needs the same number of rows, got 4, 3 of ranks 0 to 1"


def refusal(recipe: dict, what: str) -> tuple[str, float]:
    """What this rank is told, and the value of a right step afterwards."""
    first = distributed.rank() == 0
    loss = make(recipe, seed=distributed.rank() if what == "seed" else 0)
    loss.set_epoch(0)
    if what == "state" and first:
        with torch.no_grad():
            next(loss.parameters()).add_(1)
    rows = {"uneven": 4 if first else 3, "none": 4 if first else 0}.get(what, 4)
    x, y = pairs(rows, seed=distributed.rank())
    ids = torch.arange(rows) + 4 * distributed.rank() + (N if what == "ids" and not first else 0)
    try:
        loss(Features.unit(x, y), ids)
    except (ValueError, IndexError) as error:
        message = str(error)
    x, y = pairs(4, seed=distributed.rank())
    loss = make(recipe)
    return message, loss(Features.unit(x, y), torch.arange(4) + 4 * distributed.rank()).total.item()


@pytest.mark.parametrize("name", ["sogclr", "siglip", "vicreg", "cyclip"])
def test_uneven_rows_are_refused_on_every_rank_which_goes_on(gloo, name: str) -> None:
    answers = gloo(2, refusal, EVERY[name], "uneven")
    assert [message.partition(":")[0] for message, _ in answers] == [ROWS, ROWS]
    assert answers[0][1] == answers[1][1]


@pytest.mark.parametrize(
    ("what", "name", "of_rank_1"),
    [("none", "clip", "a batch of 0 rows has no loss"), ("ids", "sogclr", "sample ids must lie in")],
)
def test_what_one_rank_refuses_ends_no_other_in_a_collective(gloo, what: str, name: str, of_rank_1: str) -> None:
    (first, value), (second, other) = gloo(2, refusal, EVERY[name], what)
    assert first == "rank 1 has refused its batch: its own message says why"
    assert second.startswith(of_rank_1)
    assert value == other


@pytest.mark.parametrize(
    ("what", "name", "named"),
    [
        ("seed", "sogclr", "arguments"),
        ("seed", "disttempnet-v1", "arguments"),
        ("seed", "cyclip", "arguments"),
        ("state", "clip", "parameters"),
    ],
)
def test_losses_that_differ_between_ranks_are_refused_at_the_first_step(gloo, what: str, name: str, named: str) -> None:
    for message, _ in gloo(2, refusal, EVERY[name], what):
        assert f"the loss of rank 1 has other {named} than that of rank 0" in message


def warnings_of_a_first_step(what: str) -> list[str]:
    """Warnings of two steps in which every rank has the samples of rank 0, or its own; `eval` does not train."""
    loss = make(EVERY["sogclr"]).train(what != "eval")
    ids = torch.arange(4) + (4 * distributed.rank() if what == "own" else 0)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for seed in range(2):
            loss(Features.unit(*pairs(4, seed=seed)), None if what == "none" else ids)
    return [str(one.message) for one in caught]


@pytest.mark.parametrize("what", ["same", "own", "eval"])
def test_ranks_that_train_on_the_same_samples_are_told_so_once(gloo, what: str) -> None:
    """A loader without a DistributedSampler; evaluations may well have the same samples everywhere."""
    first, second = gloo(2, warnings_of_a_first_step, what)
    assert second == []
    assert len(first) == (what == "same")
    if first:
        assert first[0].startswith("all 2 ranks have the same samples in their first step: give every rank its own")


def test_data_parallel_is_refused() -> None:
    """As torch replicates a module where there are several GPUs."""
    whole = torch.nn.ModuleDict({"loss": make(EVERY["clip"])})
    parts = list(whole.modules())
    with pytest.raises(RuntimeError, match="start one process a GPU"):
        deque((part._replicate_for_data_parallel() for part in parts), maxlen=0)
