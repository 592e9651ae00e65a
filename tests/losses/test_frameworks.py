"""The losses train in the loops of others: plain DDP, accelerate, Lightning Fabric, Hugging Face's Trainer, FSDP2.

One small model and the same global batches everywhere, at 1 and 2 gloo processes. What is asked of each: the parameters
of towers and objective are those of a plain loop in one process, equal on all ranks to the bit, and τ has moved.
"""

from __future__ import annotations

import contextlib
import tempfile
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel as DDP

from disttempnet import Features, distributed
from tests.losses.scenario import EVERY, B, D, as_launched, local_rows, make, pairs

SAMPLES, EPOCHS, STEPS = 16, 3, 2
ROWS = pairs(SAMPLES, seed=3)
RECIPES = {
    "disttempnet-v1": {**EVERY["disttempnet-v1"], "tau_start_epoch": 1},
    **{name: EVERY[name] for name in ("fastclip-v3", "clip", "siglip", "isogclr", "sogclr")},
}
Towers = tuple[nn.Module, nn.Module, torch.optim.Optimizer]


class Model(nn.Module):
    """Linear towers: rows [b, D] and [b, D] → embeddings."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.image, self.text = (nn.Linear(D, D).double() for _ in range(2))

    def forward(self, image: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
        return self.image(image), self.text(text)


def optimizer_of(model: nn.Module, loss: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW([{"params": model.parameters()}, *loss.parameter_groups()], lr=0.01, weight_decay=0.1)


def batches() -> Iterator[tuple[int, Tensor, Tensor, Tensor]]:
    """(epoch, image rows, text rows, ids) of this rank; torch's own generator is another on every rank, as it often
    is."""
    for epoch in range(EPOCHS):
        for ids in torch.arange(SAMPLES).split(B):
            yield epoch, *(local_rows(rows) for rows in (ROWS[0][ids], ROWS[1][ids], ids))


def plain(recipe: dict, wrap: Callable[[nn.Module], nn.Module] = lambda model: model, whole: bool = False) -> dict:
    """The loop of README; `wrap` wraps the model, and with `whole` the loss as well."""
    model, loss = wrap(Model()), make(recipe, SAMPLES)
    called = wrap(loss) if whole and list(loss.parameters()) else loss
    optimizer = optimizer_of(model, loss)
    for epoch, image, text, ids in batches():
        loss.set_epoch(epoch)
        out = called(Features.of(*model(image, text)), ids)
        optimizer.zero_grad()
        out.total.backward()
        optimizer.step()
    return trained(model, loss)


def trained(model: nn.Module, loss: nn.Module) -> dict[str, Tensor]:
    named = {f"towers {name.removeprefix('module.')}": p for name, p in model.named_parameters()}
    named |= {f"loss {name}": p for name, p in loss.named_parameters()}
    if loss.tracked_temperatures() is not None:
        named["tau"] = loss.temperature.state.read(torch.arange(SAMPLES))[:2]
    return {name: getattr(p, "full_tensor", lambda p=p: p)().detach().clone() for name, p in named.items()}


def in_ddp(recipe: dict, whole: bool) -> dict:
    return plain(recipe, DDP, whole)


def in_chunks(recipe: dict) -> dict:
    """A scaled loss, and gradients that add up over two batches a step, of which DDP exchanges the sum only."""
    model, loss = Model(), make(recipe, SAMPLES, steps_per_epoch=STEPS)
    wrapped = DDP(model) if distributed.world_size() > 1 else model
    optimizer = optimizer_of(model, loss)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for number, (_, image, text, ids) in enumerate(batches()):
        last = number % 2 == 1
        with contextlib.nullcontext() if last or wrapped is model else wrapped.no_sync():
            scaler.scale(loss(Features.of(*wrapped(image, text)), ids).total / 2).backward()
        if last:
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
    return trained(model, loss)


def in_fsdp(recipe: dict) -> dict:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    def sharded(model: nn.Module) -> nn.Module:
        mesh = init_device_mesh("cpu", (distributed.world_size(),))
        for part in (*model.children(), model):
            fully_shard(part, mesh=mesh).set_force_sum_reduction_for_comms(True)
        return model

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=UserWarning, module=r"torch\.")
        return plain(recipe, sharded)


def in_accelerate(recipe: dict, prepared: bool) -> dict:
    with as_launched(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=DeprecationWarning)
        from accelerate import Accelerator
        from accelerate.state import AcceleratorState, GradientState, PartialState

        for state in (AcceleratorState, GradientState, PartialState):
            state._shared_state.clear()
        accelerator = Accelerator(cpu=True)
        assert accelerator.num_processes == distributed.world_size()
        loss = make(recipe, SAMPLES)
        model = Model()
        optimizer = optimizer_of(model, loss)
        model, optimizer = accelerator.prepare(model, optimizer)
        called = accelerator.prepare(loss) if prepared else loss.to(accelerator.device)
        for epoch, image, text, ids in batches():
            loss.set_epoch(epoch)
            out = called(Features.of(*model(image, text)), ids)
            optimizer.zero_grad()
            accelerator.backward(out.total)
            optimizer.step()
        return trained(accelerator.unwrap_model(model), loss)


def in_fabric(recipe: dict) -> dict:
    with as_launched(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=DeprecationWarning)
        warnings.filterwarnings("ignore", category=UserWarning, module="lightning_fabric")
        from lightning_fabric import Fabric

        size = distributed.world_size()
        fabric = Fabric(accelerator="cpu", devices=size, strategy="ddp" if size > 1 else "auto")
        fabric.launch()
        assert fabric.world_size == size
        bare, loss = Model(), make(recipe, SAMPLES).to(fabric.device)
        model, optimizer = fabric.setup(bare, optimizer_of(bare, loss))
        for epoch, image, text, ids in batches():
            loss.set_epoch(epoch)
            out = loss(Features.of(*model(image, text)), ids)
            optimizer.zero_grad()
            fabric.backward(out.total)
            optimizer.step()
        return trained(bare, loss)


class Whole(nn.Module):
    """Model and loss as one, which returns what Hugging Face's Trainer asks for."""

    def __init__(self, recipe: dict) -> None:
        super().__init__()
        self.towers = Model()
        self.loss = make(recipe, SAMPLES, steps_per_epoch=STEPS)

    def forward(self, image: Tensor, text: Tensor, ids: Tensor) -> dict[str, Tensor]:
        return {"loss": self.loss(Features.of(*self.towers(image, text)), ids).total}


def in_trainer(recipe: dict) -> dict:
    with as_launched(), warnings.catch_warnings(), tempfile.TemporaryDirectory() as folder:
        warnings.filterwarnings("ignore", category=DeprecationWarning)
        warnings.filterwarnings("ignore", category=FutureWarning)
        import disttempnet.models  # noqa: F401  first: it lets torchvision load beside a CPU-only torch

        from accelerate.state import AcceleratorState, GradientState, PartialState  # isort: skip
        from transformers import Trainer, TrainingArguments

        class InOrder(Trainer):
            def _get_train_sampler(self, *_: Any) -> torch.utils.data.Sampler:
                return torch.utils.data.SequentialSampler(rows)

        for state in (AcceleratorState, GradientState, PartialState):
            state._shared_state.clear()
        rows = [{"image": ROWS[0][i], "text": ROWS[1][i], "ids": i} for i in range(SAMPLES)]
        model = Whole(recipe)
        arguments = TrainingArguments(
            folder, use_cpu=True, per_device_train_batch_size=B // distributed.world_size(), num_train_epochs=EPOCHS,
            max_grad_norm=0.0, report_to=[], save_strategy="no", disable_tqdm=True, remove_unused_columns=False,
            logging_strategy="no", dataloader_pin_memory=False,
        )  # fmt: skip
        optimizer = optimizer_of(model.towers, model.loss)
        constant = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
        InOrder(model, arguments, train_dataset=rows, optimizers=(optimizer, constant)).train()
        assert arguments.world_size == distributed.world_size()
        return trained(model.towers, model.loss)


def check(ranks: list[dict[str, Tensor]], recipe: dict, expected: dict[str, Tensor] | None = None) -> None:
    expected = plain(recipe) if expected is None else expected
    start = trained(Model(), make(recipe, SAMPLES))
    for number, rank in enumerate(ranks):
        assert rank.keys() == expected.keys()
        for name, value in rank.items():
            assert torch.equal(value, ranks[0][name]), f"rank {number}, {name}: not that of rank 0"
            torch.testing.assert_close(value, expected[name], rtol=1e-6, atol=1e-8, msg=lambda m, n=name: f"{n}: {m}")
    moved = {name for name, value in ranks[0].items() if not torch.equal(value, start[name])}
    assert moved == set(expected), "something was not trained"


each = pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES.keys())
LEARNED = {name: RECIPES[name] for name in ("disttempnet-v1", "fastclip-v3", "siglip")}
learned = pytest.mark.parametrize("recipe", LEARNED.values(), ids=LEARNED.keys())
world_sizes = pytest.mark.parametrize("world_size", [1, 2])


def on(gloo: Callable[..., list], world_size: int, function: Callable, *args: object) -> list:
    return gloo(world_size, function, *args) if world_size > 1 else [function(*args)]


def test_the_reference_waits_for_its_epoch_and_moves() -> None:
    """What all others are compared with: in epoch 0 the network of disttempnet-v1 stays, at its own rate then."""
    recipe = RECIPES["disttempnet-v1"]
    start, first = trained(Model(), make(recipe, SAMPLES)), plain({**recipe, "tau_start_epoch": EPOCHS})
    for name, value in first.items():
        assert torch.equal(value, start[name]) == name.startswith("loss "), name


@pytest.mark.parametrize("whole", [False, True], ids=["model", "model and loss"])
@each
def test_ddp(gloo, recipe: dict, whole: bool) -> None:
    check(gloo(2, in_ddp, recipe, whole), recipe)


@learned
def test_ddp_with_accumulation_and_a_scaler(gloo, recipe: dict) -> None:
    check(gloo(2, in_chunks, recipe), recipe, in_chunks(recipe))


@world_sizes
@learned
def test_fsdp2(gloo, recipe: dict, world_size: int) -> None:
    check(gloo(world_size, in_fsdp, recipe), recipe)


@pytest.mark.parametrize("prepared", [False, True], ids=["loss as it is", "loss prepared"])
@world_sizes
@each
def test_accelerate(gloo, recipe: dict, world_size: int, prepared: bool) -> None:
    check(on(gloo, world_size, in_accelerate, recipe, prepared), recipe)


@world_sizes
@learned
def test_fabric(gloo, recipe: dict, world_size: int) -> None:
    check(on(gloo, world_size, in_fabric, recipe), recipe)


@pytest.mark.parametrize(("name", "world_size"), [*((name, 1) for name in LEARNED), ("disttempnet-v1", 2)])
def test_hugging_face_trainer(gloo, name: str, world_size: int) -> None:
    recipe = LEARNED[name]
    check(on(gloo, world_size, in_trainer, recipe), recipe)
