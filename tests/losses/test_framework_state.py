"""What an objective remembers goes through the savers of others and comes back value by value, at any world size.

Two gloo processes save; one, two and four load. State that every rank holds whole is saved by each library as it saves
any module; sharded state by `gather_state`, or as one file a rank.
"""

from __future__ import annotations

import copy
import pickle
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_model, save_model
from torch import Tensor, nn

from disttempnet import Features, distributed, gather_state
from disttempnet.losses.sample_state import NEVER, SampleState
from tests.gloo import Pools
from tests.losses.scenario import EVERY, D, N, as_launched, every_objective, local_rows, make, step, stream

close = torch.testing.assert_close
RECIPES = {name: EVERY[name] for name in ("tempnet", "isogclr", "onlineclr")}
State = dict[str, Tensor]


class Model(nn.Module):
    """A tower and the objective, as one module."""

    def __init__(self, recipe: dict) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.tower, self.loss = nn.Linear(D, D).double(), make(recipe)

    def forward(self, image: Tensor, text: Tensor, ids: Tensor) -> dict[str, Tensor]:
        return {"loss": self.loss(Features.of(self.tower(image), text), ids).total}


def trained(recipe: dict) -> Model:
    model = Model(recipe)
    model.loss.set_epoch(1)
    optimizer = torch.optim.SGD([{"params": model.tower.parameters()}, *model.loss.parameter_groups()], lr=0.1)
    for batch in stream(2):
        optimizer.zero_grad()
        rows = (local_rows(part) for part in (batch.x, batch.y, batch.ids))
        model(*rows)["loss"].backward()
        for p in model.tower.parameters():  # the objective's own are averaged inside
            p.grad.copy_(distributed.all_sum(p.grad) / distributed.world_size())
        optimizer.step()
    return model


def whole(model: nn.Module) -> State:
    state = gather_state(model, everywhere=True)
    assert state is not None
    return state


# ---- the ways ----


def with_torch(model: Model, folder: Path, saves: bool) -> None:
    if not saves:
        model.load_state_dict(torch.load(folder / "x.pt", weights_only=True))
    elif distributed.is_main():
        torch.save(model.state_dict(), folder / "x.pt")


def with_safetensors(model: Model, folder: Path, saves: bool) -> None:
    if not saves:
        load_model(model, folder / "x.safetensors")
    elif distributed.is_main():
        save_model(model, str(folder / "x.safetensors"))


def with_dcp(model: Model, folder: Path, saves: bool) -> None:
    """torch.distributed.checkpoint, of a model that is wrapped in DDP where there are ranks."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict

    wrapped = distributed.data_parallel(model, torch.device("cpu"))
    state = get_model_state_dict(wrapped)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=UserWarning, module=r"torch\.")
        if saves:
            dcp.save(state, checkpoint_id=folder)
        else:
            dcp.load(state, checkpoint_id=folder)
            set_model_state_dict(wrapped, state)


def with_fsdp(model: Model, folder: Path, saves: bool) -> None:
    """FSDP2: the tower's parameters are DTensors where there are ranks, the objective beside them is whole."""
    if distributed.world_size() > 1:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        fully_shard(model.tower, mesh=init_device_mesh("cpu", (distributed.world_size(),)))
    with_dcp(model, folder, saves)


def with_accelerate(model: Model, folder: Path, saves: bool) -> None:
    """A prepared model, and an objective of its own that is registered for checkpointing."""
    with as_launched(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=DeprecationWarning)
        warnings.filterwarnings("ignore", category=FutureWarning)
        from accelerate import Accelerator
        from accelerate.state import AcceleratorState, GradientState, PartialState

        for state in (AcceleratorState, GradientState, PartialState):
            state._shared_state.clear()
        accelerator = Accelerator(cpu=True)
        assert accelerator.num_processes == distributed.world_size()
        accelerator.prepare(model)
        alone = copy.deepcopy(model.loss) if saves else make(model.recipe)
        accelerator.register_for_checkpointing(alone)
        (accelerator.save_state if saves else accelerator.load_state)(str(folder))
        close(whole(alone), whole(model.loss), rtol=0, atol=0, equal_nan=True)


def with_fabric(model: Model, folder: Path, saves: bool) -> None:
    with as_launched(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=DeprecationWarning)
        warnings.filterwarnings("ignore", category=UserWarning, module="lightning_fabric")
        from lightning_fabric import Fabric

        size = distributed.world_size()
        fabric = Fabric(accelerator="cpu", devices=size, strategy="ddp" if size > 1 else "auto")
        fabric.launch()
        state = {"model": fabric.setup(model), "loss": model.loss}
        (fabric.save if saves else fabric.load)(folder / "x.ckpt", state)


def with_trainer(model: Model, folder: Path, saves: bool) -> None:
    """Hugging Face's Trainer: rank 0 alone asks for the state. It goes on from the step that was its last."""
    with as_launched(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=DeprecationWarning)
        warnings.filterwarnings("ignore", category=FutureWarning)
        warnings.filterwarnings("ignore", "the loss's temperature has a learning rate of its own")  # not learned here
        import disttempnet.models  # noqa: F401  first: it lets torchvision load beside a CPU-only torch

        from accelerate.state import AcceleratorState, GradientState, PartialState  # isort: skip
        from transformers import Trainer, TrainingArguments

        for state in (AcceleratorState, GradientState, PartialState):
            state._shared_state.clear()
        batch = stream(1)[0]
        rows = [{"image": x, "text": y, "ids": i} for x, y, i in zip(batch.x, batch.y, batch.ids, strict=True)]
        arguments = TrainingArguments(
            str(folder), use_cpu=True, per_device_train_batch_size=len(rows) // distributed.world_size(), max_steps=1,
            report_to=[], save_strategy="steps", save_steps=1, disable_tqdm=True, remove_unused_columns=False,
            logging_strategy="no", dataloader_pin_memory=False, learning_rate=0.0,
        )  # fmt: skip
        trainer = Trainer(model, arguments, train_dataset=rows)
        trainer.train(resume_from_checkpoint=None if saves else str(folder / "checkpoint-1"))


def gathered(model: Model, folder: Path, saves: bool) -> None:
    """Sharded state as one file of rank 0."""
    if saves:
        state = gather_state(model)
        assert (state is None) == (distributed.rank() > 0)
        if state is not None:
            torch.save(state, folder / "x.pt")
    else:
        model.load_state_dict(torch.load(folder / "x.pt", weights_only=True))


def file_a_rank(model: Model, folder: Path, saves: bool) -> None:
    """Sharded state as one file a rank."""
    if saves:
        torch.save(model.state_dict(), folder / f"{distributed.rank()}.pt")
    else:
        model.load_state_dict({k: v for p in folder.glob("*.pt") for k, v in torch.load(p, weights_only=True).items()})


WHOLE: dict[str, Callable[[Model, Path, bool], None]] = {
    "torch": with_torch, "safetensors": with_safetensors, "dcp": with_dcp, "fsdp": with_fsdp,
    "accelerate": with_accelerate, "fabric": with_fabric, "trainer": with_trainer,
}  # fmt: skip
SHARDED = {"gather_state": gathered, "file_a_rank": file_a_rank, "dcp": with_dcp}
LIGHT = [(False, way) for way in ("torch", "safetensors", "dcp", "fsdp")] + [
    (True, "gather_state"),
    (True, "file_a_rank"),
]
OF_LIBRARIES = [(False, way) for way in ("accelerate", "fabric", "trainer")]


def go(folder: str, ways: list[tuple[bool, str]], saves: bool) -> dict[str, State]:
    """Save what was trained, or load it into an objective that knows nothing; the whole state, by way and recipe."""
    states = {}
    for shard, way in ways:
        for name, recipe in RECIPES.items():
            recipe = {**recipe, "shard_state": shard}
            place = Path(folder, f"{way}-{name}-{shard}")
            place.mkdir(exist_ok=True)
            model = trained(recipe) if saves else Model(recipe)
            model.recipe = recipe
            (SHARDED if shard else WHOLE)[way](model, place, saves)
            distributed.barrier()
            states[f"{way} {name} {'sharded' if shard else 'whole'}"] = whole(model)
    return states


def check(pools: Pools, folder: Path, ways: list[tuple[bool, str]], sizes: tuple[int, ...]) -> None:
    saved, other = pools(2, go, str(folder), ways, True)
    fresh = {f"{name}": whole(Model(recipe)) for name, recipe in RECIPES.items()}
    for what, state in saved.items():
        close(other[what], state, rtol=0, atol=0)
        before = fresh[what.split()[1]]
        assert state.keys() == before.keys()
        learnt = {key for key, value in state.items() if not torch.equal(value, before[key])}
        assert {key for key in state if "tower" in key or "log_u" in key or "tau" in key} <= learnt, what
    for size in sizes:
        run = (lambda *args: [go(*args)]) if size == 1 else (lambda *args, size=size: pools(size, go, *args))
        for rank in run(str(folder), ways, False):
            for what, state in rank.items():
                close(state, saved[what], rtol=0, atol=0, msg=lambda m, w=what, s=size: f"{w}, 2 to {s}: {m}")


def test_two_processes_save_and_others_load(gloo: Pools, tmp_path: Path) -> None:
    check(gloo, tmp_path, LIGHT, (1, 2, 4))


def test_two_processes_save_and_load_with_libraries(gloo: Pools, tmp_path: Path) -> None:
    check(gloo, tmp_path, OF_LIBRARIES, (1, 2))


@pytest.mark.slow
def test_two_processes_save_and_four_load_with_libraries(gloo: Pools, tmp_path: Path) -> None:
    check(gloo, tmp_path, OF_LIBRARIES, (4,))


def test_shards_go_through_dcp_at_their_own_world_size(gloo: Pools, tmp_path: Path) -> None:
    """Every shard has a name of its own, so that it is not taken for a copy of the others."""
    check(gloo, tmp_path, [(True, "dcp")], (2,))


@pytest.mark.parametrize("epochs", [1, 3], ids=["waits", "has started"])
def test_moments_go_through_dcp_where_the_loss_is_loaded_first(epochs: int, tmp_path: Path) -> None:
    """torch makes empty moments to load into: a network that waits gets none, one that has started does."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint import state_dict as states

    def begun() -> tuple[Model, torch.optim.Optimizer]:
        model = Model({**EVERY["disttempnet-v1"], "tau_start_epoch": 1})
        groups = [{"params": model.tower.parameters()}, *model.loss.parameter_groups()]
        return model, torch.optim.AdamW(groups, lr=0.1)

    def train(model: Model, optimizer: torch.optim.Optimizer, epochs: range) -> None:
        for epoch in epochs:
            model.loss.set_epoch(epoch)
            batch = stream(1, seed=epoch)[0]
            optimizer.zero_grad()
            model(batch.x, batch.y, batch.ids)["loss"].backward()
            optimizer.step()

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=UserWarning, module=r"torch\.")
        first, moved = begun()
        train(first, moved, range(epochs))
        dcp.save(
            dict(zip(("model", "moments"), states.get_state_dict(first, moved), strict=True)), checkpoint_id=tmp_path
        )

        second, other = begun()
        saved = {"model": states.get_model_state_dict(second)}
        dcp.load(saved, checkpoint_id=tmp_path)
        states.set_model_state_dict(second, saved["model"])
        saved = {"moments": states.get_optimizer_state_dict(second, other)}
        dcp.load(saved, checkpoint_id=tmp_path)
        states.set_optimizer_state_dict(second, other, saved["moments"], options=states.StateDictOptions(strict=False))
    held = [len(optimizer.state) for optimizer in (moved, other)]
    assert held == [len(list((first if epochs > 1 else first.tower).parameters()))] * 2
    for model, optimizer in ((first, moved), (second, other)):
        train(model, optimizer, range(epochs, epochs + 2))
    close(whole(second), whole(first), rtol=0, atol=0)


# ---- what every tool expects of a state_dict ----


@every_objective
def test_a_state_dict_is_tensors_in_memory_of_their_own(recipe: dict) -> None:
    loss = make(recipe)
    step(loss, stream(1)[0])
    state = loss.state_dict()
    assert all(isinstance(value, Tensor) for value in state.values())
    assert all(value.is_contiguous() for value in state.values())
    assert len({value.untyped_storage().data_ptr() for value in state.values()}) == len(state)
    for value in state.values():
        assert value.untyped_storage().nbytes() == value.nbytes


@every_objective
def test_copies_are_apart(recipe: dict) -> None:
    """deepcopy and pickle, as EMA and worker processes make them."""
    loss = make(recipe)
    step(loss, stream(1)[0])
    before = copy.deepcopy(loss.state_dict())
    for other in (copy.deepcopy(loss), pickle.loads(pickle.dumps(loss))):
        close(other.state_dict(), before, rtol=0, atol=0)
        step(other, stream(2)[1])
        close(loss.state_dict(), before, rtol=0, atol=0)


@every_objective
def test_an_ema_of_model_and_loss(recipe: dict) -> None:
    """timm's: parameters are averaged, and the copy can go on as an objective of its own."""
    import disttempnet.models  # noqa: F401  first: it lets torchvision load beside a CPU-only torch

    from timm.utils import ModelEmaV2, ModelEmaV3  # isort: skip

    model = Model(recipe)
    averages = [ModelEmaV2(model, decay=0.5), ModelEmaV3(model, decay=0.5), ModelEmaV3(model, decay=0.5, foreach=False)]
    expected = {name: p.detach().clone() for name, p in model.named_parameters()}
    for batch in stream(3):
        step(model.loss, batch)
        with torch.no_grad():
            for name, p in model.named_parameters():
                p += 1.0
                expected[name] = (expected[name] + p) / 2
        live = copy.deepcopy(model.state_dict())
        for average in averages:
            average.update(model)
        close(model.state_dict(), live, rtol=0, atol=0)
    for average in averages:
        close(dict(average.module.named_parameters()), expected, rtol=1e-6, atol=1e-6, check_dtype=False)
        for batch in stream(2, seed=5):
            result = step(average.module.loss.train(), batch)
            assert result.total.isfinite()
            assert all(value.isfinite().all() for value in result.kept.values())


def test_half_precision_copies_keep_the_step() -> None:
    loss, other = make(EVERY["tempnet"]), make(EVERY["tempnet"])
    for batch in stream(3):
        step(loss, batch)
    rounded = {k: v.bfloat16() if v.dtype.is_floating_point else v for k, v in loss.state_dict().items()}
    other.load_state_dict(rounded)
    assert other.step == 3
    assert other.epoch == loss.epoch
    assert other.temperature.prototypes_started == 13
    assert other.state.local("log_u").dtype == torch.float32


# ---- another data set, other files ----


def visited(num_samples: int, **changes: Any) -> SampleState:
    state = SampleState(num_samples, {"tau": 0.5, "visits": 0.0}, **changes)
    ids = torch.arange(num_samples)
    state.write(ids, ids + torch.arange(4)[:, None] / 8)
    return state


def test_new_samples_start_as_never_visited() -> None:
    grown = visited(12)
    with pytest.warns(UserWarning, match="the state holds 9 of 12 samples: the others start as never visited"):
        grown.load_state_dict(visited(9).state_dict())
    rows = grown.read(torch.arange(12))
    close(rows[:, :9], visited(9).read(torch.arange(9)), rtol=0, atol=0)
    close(rows[:, 9:], torch.tensor([0.5, 0.5, 0.0, 0.0])[:, None].expand(4, 3), rtol=0, atol=0)


def grow_sharded(state: State) -> State:
    grown = visited(12, sharded=True)
    with pytest.warns(UserWarning, match="holds 9 of 12"):
        grown.load_state_dict(state)
    return whole(grown)


def test_sharded_state_grows_too(gloo: Pools) -> None:
    with pytest.warns(UserWarning, match="holds 9 of 12"):
        (expected := visited(12)).load_state_dict(visited(9).state_dict())
    for state in gloo(4, grow_sharded, visited(9).state_dict()):
        close(state, expected.state_dict(), rtol=0, atol=0)


def test_fewer_samples_are_cut_by_hand() -> None:
    state = visited(12).state_dict()
    with pytest.raises(RuntimeError, match=r"holds 12 samples, this loss has 9: .* cut each column .* to \[:, :9\]"):
        visited(9).load_state_dict(state)
    smaller = visited(9)
    smaller.load_state_dict({key: column[:, :9] for key, column in state.items()})
    close(smaller.state_dict(), visited(9).state_dict(), rtol=0, atol=0)


def test_what_is_not_finite_in_a_file_starts_anew() -> None:
    """Runs of older versions that met a NaN kept it."""
    state = visited(9).state_dict()
    state["tau"][1, 3] = torch.nan
    with pytest.warns(UserWarning, match="tau: 1 saved values are not finite: they start again"):
        (loaded := visited(9)).load_state_dict(state)
    expected = visited(9)
    expected.local("tau")[1, 3] = 0.5
    close(loaded.state_dict(), expected.state_dict(), rtol=0, atol=0)


def as_before(rank: int, parts: int) -> dict[str, Any]:
    """What a rank saved when bookkeeping was a dict: its columns by their plain names."""
    columns = {name: torch.full((2, -(-9 // parts)), NEVER) for name in ("tau", "visits")}
    for name, column in columns.items():
        own = visited(9).local(name)[:, rank::parts]
        column[:, : own.shape[1]] = own
    return {**columns, "_extra_state": {"num_samples": 9, "world_size": parts, "rank": rank}}


def load_own_shard_of_before() -> State:
    state = SampleState(9, {"tau": 0.5, "visits": 0.0}, sharded=True)
    state.load_state_dict(as_before(distributed.rank(), distributed.world_size()))
    return whole(state)


def test_states_whose_bookkeeping_was_a_dict(gloo: Pools) -> None:
    one = SampleState(9, {"tau": 0.5, "visits": 0.0})
    one.load_state_dict(as_before(0, 1))
    close(one.state_dict(), visited(9).state_dict(), rtol=0, atol=0)
    for state in gloo(2, load_own_shard_of_before):
        close(state, visited(9).state_dict(), rtol=0, atol=0)
    with pytest.raises(RuntimeError, match=r"tau: holds only the shard of rank 1 of 2, and rank 0 of 1 needs"):
        one.load_state_dict(as_before(1, 2))


def test_keys_that_are_missing_or_unknown_are_named() -> None:
    state = visited(9).state_dict()
    del state["tau"]
    with pytest.raises(
        RuntimeError, match=r'(?s)Missing key.*"tau".*Unexpected key.*|Unexpected.*"speed".*Missing.*"tau"'
    ):
        visited(9).load_state_dict({**state, "speed": torch.ones(2, 9)})
    mixed = {"tau": torch.ones(2, 9), "tau:0-of-2": torch.ones(2, 5), "visits": torch.ones(2, 9)}
    with pytest.raises(RuntimeError, match="tau: shards of 1 and of 2 processes are mixed"):
        visited(9).load_state_dict(mixed)
    with pytest.raises(RuntimeError, match=r"tau: shape \(2, 9, 1\), expected \(2, 9\)"):
        visited(9).load_state_dict({"tau": torch.ones(2, 9, 1), "visits": torch.ones(2, 9)})
    for shape in ((), (3,), (3, 9)):
        with pytest.raises(RuntimeError, match=re.escape(f"tau: shape {shape}, expected (2, 9)")):
            visited(9).load_state_dict({"tau": torch.ones(shape), "visits": torch.ones(2, 9)})


@pytest.mark.parametrize(("name", "at"), [("sogclr", ""), ("fastclip-v3", "temperature."), ("tempnet", "temperature.")])
def test_bookkeeping_of_another_length_is_one_line(name: str, at: str) -> None:
    loss = make(EVERY[name])
    state = loss.state_dict() | {f"{at}_extra_state": torch.zeros(3)}
    with pytest.raises(ValueError, match=r"^_extra_state holds 3 numbers, expected \d \([a-z_, ]+\): "):
        loss.load_state_dict(state)


def test_a_checksum_tells_places_apart() -> None:
    state, swapped = visited(9), visited(9)
    with torch.no_grad():
        swapped.local("tau").copy_(state.local("tau").flip(1))
    assert not torch.equal(state.local("tau"), swapped.local("tau"))
    assert state.checksum() == visited(9).checksum() != swapped.checksum()


# ---- over ranks ----


def load_on_rank_0_alone(state: State) -> str:
    loss = make(EVERY["sogclr"])
    if distributed.is_main():
        loss.load_state_dict(state)
    batch = stream(1)[0]
    with pytest.raises(ValueError, match="rank 1 has other per-sample state than that of rank 0") as error:
        loss(Features.unit(local_rows(batch.x), local_rows(batch.y)), local_rows(batch.ids))
    return str(error.value)


def test_a_state_that_rank_0_alone_has_loaded_is_refused_on_every_rank(gloo: Pools) -> None:
    loss = make(EVERY["sogclr"])
    step(loss, stream(1)[0])
    for message in gloo(2, load_on_rank_0_alone, loss.state_dict()):
        assert "load the same state" in message


def after_one_step(what: str, state: State) -> str:
    """What this rank is told at a step before which rank 0 alone has done something."""
    batch = stream(1)[0]
    features, ids = Features.unit(local_rows(batch.x), local_rows(batch.y)), local_rows(batch.ids)
    loss = make(EVERY["sogclr"], shard_state=what == "sharded")
    if what == "evaluated":
        loss.eval()(features, ids)
        loss.train()
    else:
        loss(features, ids)
    if distributed.is_main():
        if what == "epoch":
            loss.set_epoch(7)
        else:
            loss.load_state_dict(state)
    elif what == "twice":
        for _ in range(2):
            loss.load_state_dict(state)
    try:
        loss(features, ids)
    except ValueError as error:
        return str(error)
    return f"step {loss.step}"


@pytest.mark.parametrize(
    ("what", "told"),
    [
        ("evaluated", "the loss of rank 1 has other per-sample state than that of rank 0"),
        ("trained", "the loss of rank 1 has other per-sample state than that of rank 0"),
        ("sharded", "the loss of rank 1 has other per-sample state than that of rank 0"),
        ("epoch", "the ranks are in epochs 7, 0: call set_epoch with the same number on every rank"),
        ("twice", "step 2"),
    ],
)
def test_what_rank_0_alone_has_done_is_told_at_the_next_step_on_every_rank(gloo: Pools, what: str, told: str) -> None:
    loss = make(EVERY["sogclr"])
    step(loss, stream(1)[0])
    if what == "trained":
        loss.state.local("log_u").copy_(loss.state.local("log_u").flip(1))
    for message in gloo(2, after_one_step, what, loss.state_dict()):
        assert message.startswith(told)


def gather_in_pieces(piece: int) -> tuple[State | None, State]:
    from disttempnet.losses import sample_state

    state = visited(19, sharded=True)
    state.write(torch.arange(19), torch.arange(19) + torch.arange(4)[:, None] / 8)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sample_state, "GATHER_BYTES", piece)
        return gather_state(state), state.state_dict()


@pytest.mark.parametrize("piece", [1, 100, 1 << 20])
def test_gathering_in_pieces(gloo: Pools, piece: int) -> None:
    """One slot of each rank at a time, a few, all."""
    for size in (2, 4):
        (first, _), *others = gloo(size, gather_in_pieces, piece)
        close(first, visited(19).state_dict(), rtol=0, atol=0)
        assert all(state is None for state, _ in others)


def build_large() -> list[str]:
    from disttempnet.losses import sample_state

    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings(record=True) as caught:
        patch.setattr(sample_state, "LARGE", 8 * N)
        warnings.simplefilter("always")
        make({**EVERY["sogclr"], "shard_state": True})
        make(EVERY["sogclr"])
        make(EVERY["sogclr"], num_samples=N - 1)
    return [str(one.message) for one in caught]


def test_a_large_state_on_every_rank_is_said_once(gloo: Pools) -> None:
    first, second = gloo(2, build_large)
    assert [line.partition(";")[0] for line in first] == [f"the state of {N} samples takes 0.0 GB on every rank"]
    assert second == []
