"""Sharded towers (train.shard) train as under DDP, and their checkpoints are those of any run."""

from __future__ import annotations

import json
import os
import pickle
import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from disttempnet import distributed
from disttempnet.config import CONFIG_FOLDER, load_config
from disttempnet.data import Batch
from disttempnet.distributed import fsdp
from disttempnet.errors import UserError, UserNotice
from disttempnet.losses import LossOutput
from disttempnet.models import load_model, save_model
from disttempnet.training import atomic_folder, checkpoint
from disttempnet.training.checkpoint import load_run
from disttempnet.training.run_folder import list_checkpoints
from disttempnet.training.trainer import Trainer
from tests import parts
from tests.gloo import GlooPool, Pools, WorkerError

import open_clip  # isort: skip (after disttempnet.models)

CPU = torch.device("cpu")
TOLERANCE = 2e-5  # relative, float32, over ten steps
OBJECTIVES = ['{name="clip"}', '{name="disttempnet-v1", rho=2.4, tau_max=0.15, tau_lr=1e-3}']
SHARD = "train.shard=true"


class Seen(NamedTuple):
    """What a rank saw of its run."""

    parameters: int
    held: int  # of these, on this rank
    whole: list[str]  # names of parameters that every rank holds
    moments_held: int
    norms: list[float]


def go(out: str, *overrides: str) -> Seen:
    """Train, or go on, in the process group that there is."""
    own = [f"out={json.dumps(out)}", "eval.tasks=[]", *overrides]
    trainer = Trainer(load_config(CONFIG_FOLDER / "debug.toml", own), CPU, "auto")
    norms = []
    step = trainer.train_step

    def train_step(batch: Batch) -> LossOutput:
        output = step(batch)
        norms.append(float(trainer._norm))
        return output

    trainer.train_step = train_step  # type: ignore[method-assign]
    trainer.run()
    named = dict(trainer.towers.module.named_parameters())
    held = {name: (p.to_local() if isinstance(p, DTensor) else p).numel() for name, p in named.items()}
    moments = [m for s in trainer.optimizers[0].state.values() for name, m in s.items() if name != "step"]
    return Seen(
        sum(p.numel() for p in named.values()),
        sum(held.values()),
        [name for name, p in named.items() if not isinstance(p, DTensor)],
        sum((m.to_local() if isinstance(m, DTensor) else m).numel() for m in moments),
        norms,
    )


def losses(out: Path) -> list[float]:
    lines = (out / "debug" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line)["loss"] for line in lines]


def weights(out: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(list_checkpoints(out / "debug")[-1] / "open_clip_model.safetensors")


def moments(folder: Path) -> list[dict[int, dict[str, torch.Tensor]]]:
    """Whole optimizer states of a checkpoint, whichever way they were written."""
    states = torch.load(folder / "trainer.pt", weights_only=True)["optimizers"]
    shapes = dict(enumerate(ordered_shapes(folder)))
    missing = {
        f"{number}.{index}.{name}": torch.full(shapes[index], torch.nan)
        for number, state in enumerate(states)
        for index, entries in state["state"].items()
        for name, value in entries.items()
        if value is None
    }
    if missing:
        fsdp.load_parts(missing, folder / "moments")
    for key, value in missing.items():
        number, index, name = key.split(".")
        states[int(number)]["state"][int(index)][name] = value
    return [state["state"] for state in states]


def ordered_shapes(folder: Path) -> list[torch.Size]:
    """Shapes of the parameters of the first optimizer, in its order."""
    run = load_run(folder)
    both = [
        [p for p in m.parameters() if p is not run.towers.module.logit_scale] for m in (run.towers.module, run.loss)
    ]
    if run.loss.temperature and getattr(run.loss.temperature, "tau_lr", 0.0):
        both[1] = []
    return [p.shape for matrices in (True, False) for part in both for p in part if (p.ndim >= 2) == matrices]


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("objective", OBJECTIVES, ids=["clip", "network"])
def test_losses_are_those_of_ddp(objective: str, accumulate: int, gloo: Pools, tmp_path: Path) -> None:
    same = [f"loss={objective}", f"train.accumulate={accumulate}", "train.stop_after_steps=10", "optim.grad_clip=0.5"]
    whole = gloo(2, go, str(tmp_path / "ddp"), *same)
    shared = gloo(2, go, str(tmp_path / "shard"), SHARD, *same)
    np.testing.assert_allclose(losses(tmp_path / "shard"), losses(tmp_path / "ddp"), rtol=TOLERANCE)
    assert len(losses(tmp_path / "shard")) == 10
    for one, other in zip(whole, shared, strict=True):
        np.testing.assert_allclose(other.norms, one.norms, rtol=1e-4)
        assert max(one.norms) > 0.5, "clipped"
        assert one.held == one.parameters
        assert other.whole == ["logit_scale"]
        assert other.held - 1 == pytest.approx((other.parameters - 1) / 2, rel=0.01)
        assert other.moments_held == pytest.approx(one.moments_held / 2, rel=0.01)
    exported, expected = weights(tmp_path / "shard"), weights(tmp_path / "ddp")
    assert exported.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(exported[name], value, rtol=1e-3, atol=1e-4, msg=name)


def test_evaluation_and_what_it_saves_are_those_of_ddp(gloo: Pools, tmp_path: Path) -> None:
    """With one batch of texts on a rank more than on the other: nothing waits for a forward pass of all ranks."""
    same = ["eval.tasks=['emoji-concepts']", "eval.every_epochs=1", "eval.batch=83"]
    gloo(2, go, str(tmp_path / "ddp"), *same)
    gloo(2, go, str(tmp_path / "shard"), SHARD, *same)
    lines = [(tmp_path / way / "debug" / "eval.jsonl").read_text().splitlines() for way in ("ddp", "shard")]
    assert len(lines[0]) == len(lines[1]) == 2
    np.testing.assert_allclose(losses(tmp_path / "shard"), losses(tmp_path / "ddp"), rtol=1e-3)
    name = "temperatures/step-00000020.npz"
    taus = [np.load(tmp_path / way / "debug" / name)["image"] for way in ("ddp", "shard")]
    np.testing.assert_allclose(taus[1], taus[0], rtol=1e-3)


@pytest.fixture(scope="module")
def straight(gloo: Pools, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Fourteen steps of two ranks, shared out, undisturbed."""
    out = tmp_path_factory.mktemp("straight")
    gloo(2, go, str(out), SHARD, "train.stop_after_steps=14")
    return out


def test_stop_and_resume_is_bit_exact(straight: Path, gloo: Pools, tmp_path: Path) -> None:
    for stop in (7, 14):
        gloo(2, go, str(tmp_path), SHARD, f"train.stop_after_steps={stop}")
    assert losses(tmp_path) == losses(straight)
    ours, theirs = weights(tmp_path), weights(straight)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    folders = [list_checkpoints(out / "debug")[-1] for out in (tmp_path, straight)]
    assert sorted(p.name for p in folders[0].iterdir()) == [
        "files.json",
        "moments",
        "open_clip_config.json",
        "open_clip_model.safetensors",
        "shard-00000-of-00002.pt",
        "shard-00001-of-00002.pt",
        "trainer.pt",
    ]
    for one, other in zip(*map(moments, folders), strict=True):
        assert one.keys() == other.keys()
        for index in one:
            assert all(torch.equal(one[index][name], other[index][name]) for name in one[index])


# where a run begins and where it goes on: processes, and whether its towers are shared out
CHANGES = [
    ((2, True), (1, True), OBJECTIVES[0]),
    ((1, True), (2, True), OBJECTIVES[0]),
    ((2, True), (2, False), OBJECTIVES[0]),
    ((2, False), (2, True), OBJECTIVES[1]),
]


@pytest.mark.parametrize(("before", "after", "objective"), CHANGES)
def test_it_goes_on_in_another_way(
    before: tuple[int, bool], after: tuple[int, bool], objective: str, gloo: Pools, tmp_path: Path
) -> None:
    """Moments are the same to the bit on the other side, and the curve is that of one process."""
    run(gloo, (1, False), tmp_path / "straight", objective, 12)
    run(gloo, before, tmp_path / "changed", objective, 7)
    saved = list_checkpoints(tmp_path / "changed" / "debug")[-1]
    run(gloo, after, tmp_path / "again", objective, 7, str(saved))
    again = list_checkpoints(tmp_path / "again" / "debug")[-1]
    for one, other in zip(moments(saved), moments(again), strict=True):
        assert one.keys() == other.keys()
        for index in one:
            assert one[index].keys() == other[index].keys()
            for name, value in one[index].items():
                assert torch.equal(value, other[index][name]), (index, name)
    run(gloo, after, tmp_path / "changed", objective, 12)
    np.testing.assert_allclose(losses(tmp_path / "changed"), losses(tmp_path / "straight"), rtol=2e-4, atol=1e-5)


def run(gloo: Pools, way: tuple[int, bool], out: Path, objective: str, steps: int, resume: str = "") -> None:
    processes, shared = way
    overrides = [f"loss={objective}", f"train.stop_after_steps={steps}", f"train.shard={str(shared).lower()}"]
    function: Callable = go if not resume else save_again
    arguments = [str(out), *([resume] if resume else []), *overrides]
    if processes == 1:
        function(*arguments)
    else:
        gloo(processes, function, *arguments)


def save_again(out: str, resume: str, *overrides: str) -> None:
    """Load a checkpoint and write it again, without a step."""
    own = [f"out={json.dumps(out)}", "eval.tasks=[]", *overrides]
    trainer = Trainer(load_config(CONFIG_FOLDER / "debug.toml", own), CPU, resume)
    trainer._save()


def go_and_die(out: str, *overrides: str) -> None:
    """As `go`, but rank 1 ends as if killed in the middle of writing its part of the second checkpoint's moments."""
    save, calls = fsdp.save_parts, []

    def save_parts(tensors: dict[str, torch.Tensor], folder: Path) -> None:
        calls.append(folder)
        if len(calls) == 2 and distributed.rank() == 1:
            folder.mkdir(exist_ok=True)
            (folder / "__1_0.distcp").write_bytes(b"half of a")
            os._exit(9)
        save(tensors, folder)

    checkpoint.fsdp.save_parts = save_parts
    go(out, *overrides)


def test_a_killed_write_leaves_the_last_checkpoint(straight: Path, gloo: Pools, tmp_path: Path) -> None:
    often = (SHARD, "train.checkpoint_every=3", "train.stop_after_steps=14")
    pool = GlooPool(2)
    with pytest.raises(WorkerError, match="exit code 9"):
        pool.run(go_and_die, str(tmp_path), *often)
    assert [p.name for p in list_checkpoints(tmp_path / "debug")] == ["step-00000003"]
    gloo(2, go, str(tmp_path), *often)
    assert losses(tmp_path) == losses(straight)
    ours, theirs = weights(tmp_path), weights(straight)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.filterwarnings("ignore:.*has no files.json:UserWarning")
def test_damage_is_named(straight: Path, gloo: Pools, tmp_path: Path) -> None:
    import shutil

    for name, content in (("__1_0.distcp", None), (".metadata", b"\x80\x04]"), (".metadata", None)):
        shutil.rmtree(tmp_path / "run", ignore_errors=True)
        shutil.copytree(straight, tmp_path / "run")
        last = list_checkpoints(tmp_path / "run" / "debug")[-1]
        damaged = last / "moments" / name
        if content is None:
            damaged.unlink()
        else:
            damaged.write_bytes(content)
        assert atomic_folder.damage(last).startswith(f"moments/{name} ")
        (last / atomic_folder.LISTING).unlink()  # as of a checkpoint without one
        with (
            pytest.warns(UserNotice, match=r"has no files.json"),
            pytest.raises(UserError, match="moments: cannot be read as a checkpoint"),
        ):
            go(str(tmp_path / "run"), "train.stop_after_steps=15")


class Malice:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("broken-in",)


def no_room(out: str, who: int, most: int) -> tuple[str, list[str]]:
    """What this rank hears where rank `who` can write no file of more bytes, and what is in the folder then."""
    own = [f"out={json.dumps(out)}", "eval.tasks=[]", SHARD, "train.stop_after_steps=2"]
    trainer = Trainer(load_config(CONFIG_FOLDER / "debug.toml", own), CPU, "auto")
    trainer.run()
    trainer.step += 1
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    if distributed.rank() == who:
        resource.setrlimit(resource.RLIMIT_FSIZE, (most, before[1]))
    told = ""
    try:
        trainer._save()
    except UserError as error:
        told = str(error)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    distributed.barrier()  # rank 0 removes what was half written
    return told, sorted(p.name for p in (Path(out) / "debug" / "checkpoints").iterdir())


@pytest.mark.parametrize(("who", "most"), [(0, 100), (1, 300_000)])
def test_a_full_disk_while_moments_are_written_is_the_same_line(
    who: int, most: int, gloo: Pools, tmp_path: Path
) -> None:
    """As for a run under DDP: of the checkpoint, not of the hidden folder, and on every rank."""
    for told, left in gloo(2, no_room, str(tmp_path), who, most):
        assert told.startswith(f"{tmp_path / 'debug' / 'checkpoints' / 'step-00000003'}: cannot be written: ")
        assert told.endswith(" MB are free there. --resume auto continues from the last checkpoint")
        assert "inline_container" not in told
        assert left == ["best.json", "step-00000002"]


def interrupted(folder: str, fault: type[BaseException]) -> str:
    """What a rank meets where writing is broken off on rank 1 by something that is no fault of the disk."""
    from torch.distributed.checkpoint.filesystem import FileSystemWriter

    def write_data(*_: object) -> None:
        raise fault("here")

    mesh = init_device_mesh("cpu", (distributed.world_size(),))
    parts = {"a": distribute_tensor(torch.arange(6.0), mesh, [Shard(0)])}
    with pytest.MonkeyPatch.context() as patched:
        if distributed.rank() == 1:
            patched.setattr(FileSystemWriter, "write_data", write_data)
        try:
            atomic_folder.write_folder(Path(folder) / "step", lambda to: fsdp.save_parts(parts, to / "m") or [])
        except BaseException as error:
            return repr(error)
    return ""


@pytest.mark.parametrize("fault", [KeyboardInterrupt, KeyError])
def test_what_is_no_fault_of_the_disk_is_not_called_so(fault: type[BaseException], gloo: Pools, tmp_path: Path) -> None:
    assert gloo(2, interrupted, str(tmp_path), fault) == [f"{fault.__name__}('here')"] * 2
    assert list(tmp_path.iterdir()) == []


def few_rows(folder: str) -> dict[str, torch.Tensor]:
    mesh = init_device_mesh("cpu", (distributed.world_size(),))
    wholes = {"one row": torch.arange(5.0).view(1, 5), "three": torch.arange(3.0)}
    fsdp.save_parts({k: distribute_tensor(v, mesh, [Shard(0)]) for k, v in wholes.items()}, Path(folder))
    return wholes


def test_ranks_without_a_row_and_paths_of_other_pythons(gloo: Pools, tmp_path: Path) -> None:
    """Python 3.13 pickles paths as of a module that others have not; the metadata holds one."""
    wholes = gloo(2, few_rows, str(tmp_path))[0]
    contents = tmp_path / ".metadata"
    plain = pickle.dumps(pickle.loads(contents.read_bytes()), 2)  # the protocol that spells names out
    assert plain.count(b"cpathlib\nPosixPath\n") == 1
    contents.write_bytes(plain.replace(b"cpathlib\n", b"cpathlib._local\n"))
    read = {name: torch.full(value.shape, torch.nan) for name, value in wholes.items()}
    fsdp.load_parts(read, tmp_path)
    assert all(torch.equal(read[name], wholes[name]) for name in wholes)


def test_not_even_a_module_is_imported_from_a_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "malice_beside.py").write_text("raise SystemExit('imported')")
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / ".metadata").write_bytes(b"cmalice_beside\nMetadata\n.")
    with pytest.raises(UserError, match=r"malice_beside\.Metadata does not belong into the metadata of a checkpoint"):
        fsdp.load_parts({"a": torch.zeros(2)}, tmp_path)


def test_nothing_is_executed_from_a_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / ".metadata").write_bytes(pickle.dumps(Malice()))
    with pytest.raises(UserError, match="does not belong into the metadata of a checkpoint"):
        fsdp.load_parts({"a": torch.zeros(2)}, tmp_path)
    assert not (tmp_path / "broken-in").exists()


HALF = "train.precision=bf16"


@pytest.mark.parametrize("overrides", [("locked",), (HALF,), (HALF, "train.accumulate=2")])
def test_locked_towers_and_half_precision(overrides: tuple[str, ...], gloo: Pools, tmp_path: Path) -> None:
    if overrides == ("locked",):
        save_model(load_model("demo-vit-32"), tmp_path, 10.0)
        pretrained = f"model.pretrained={json.dumps(str(tmp_path))}"
        overrides = ("model.lock_image=true", "model.unlocked_image_groups=2", "model.lock_text=true", pretrained)
    for way, own in (("ddp", []), ("shard", [SHARD])):
        gloo(2, go, str(tmp_path / way), *own, *overrides, "train.stop_after_steps=6")
    # chunks add up in another order: where weights are rounded to bf16, the last bit of a sum can become a whole step
    rtol = 2e-3 if len(overrides) == 2 else TOLERANCE
    np.testing.assert_allclose(losses(tmp_path / "shard"), losses(tmp_path / "ddp"), rtol=rtol)
    if HALF not in overrides:
        before, after = load_model("demo-vit-32", str(tmp_path)).module.state_dict(), weights(tmp_path / "shard")
        stayed = {name for name in before if torch.equal(before[name], after[name])}
        assert "visual.transformer.resblocks.0.mlp.c_fc.weight" in stayed
        assert "visual.transformer.resblocks.1.mlp.c_fc.weight" not in stayed


# ---- other towers ----


def trained(name: str, shared: bool) -> tuple[float, dict[str, torch.Tensor]]:
    """Sum of both features' squares, and the whole gradient, of towers by name."""
    torch.manual_seed(3)
    towers = load_model(name)
    module = towers.module.train()
    for p in module.parameters():
        p.requires_grad_(p.ndim > 0)
    if shared:
        fsdp.shard(module, CPU)
    generator = torch.Generator().manual_seed(4 + distributed.rank())
    images = torch.randn(2, 3, towers.image_size, towers.image_size, generator=generator)
    total = (
        module.encode_image(images).square().sum() + module.encode_text(towers.tokenizer(["a", "two"])).square().sum()
    )
    total.backward()
    gradients = {k: p.grad for k, p in module.named_parameters() if p.grad is not None}
    if not shared:
        gradients = {k: distributed.all_sum(g) / distributed.world_size() for k, g in gradients.items()}
    assert not shared or all(isinstance(g, DTensor) for g in gradients.values())
    return float(total.detach()), {k: fsdp.full_tensor(g) for k, g in gradients.items()}


def trained_scalar() -> str:
    module = torch.nn.Sequential(torch.nn.Linear(4, 4))
    module.gain = torch.nn.Parameter(torch.zeros(()))
    try:
        fsdp.shard(module, CPU)
    except UserError as error:
        return str(error)
    return ""


def test_trained_scalars_are_refused(gloo: Pools) -> None:
    """As of timm's NFNets: FSDP2 takes none, and left alone they would become other ones on every rank."""
    assert gloo(2, trained_scalar) == [
        "train.shard: the towers train a scalar (gain), which cannot be sharded"
    ] * 2  # fmt: skip


@pytest.mark.parametrize("kind", ["demo-convnext-32", "timm-and-hf", "modified-resnet"])
def test_gradients_of_other_towers(kind: str, gloo: Pools, tmp_path: Path) -> None:
    name = kind
    if kind == "timm-and-hf":
        name = parts.write_architecture(tmp_path / "architecture", "test_vit")
        parts.write_text_folder(tmp_path / "architecture")
    if kind == "modified-resnet":
        shape = {"layers": [2, 1, 1, 1], "width": 8, "image_size": 32, "patch_size": None}
        text = {"context_length": 12, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 2}
        config = {"embed_dim": 16, "vision_cfg": shape, "text_cfg": text}
        (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": {}}))
        name = str(tmp_path / "open_clip_config.json")
    for (one, wanted), (other, found) in zip(gloo(2, trained, name, False), gloo(2, trained, name, True), strict=True):
        assert other == pytest.approx(one, rel=1e-5)
        assert found.keys() == wanted.keys()
        for key, value in wanted.items():
            torch.testing.assert_close(found[key], value, rtol=1e-4, atol=1e-5, msg=key)


def pieces(name: str) -> tuple[int, list[int]]:
    """Blocks of an architecture, and how many parameters are gathered at a time; without its memory."""
    with torch.device("meta"):
        module = open_clip.create_model(name, device="meta")
    module.logit_scale = torch.nn.Parameter(torch.zeros(()), requires_grad=False)
    count = len(fsdp.repeated_blocks(module))
    fsdp.shard(module, CPU)
    sizes, counted = [], set()
    for part in reversed([m for m in module.modules() if isinstance(m, FSDPModule)]):  # inner ones first
        own = {p for p in part.parameters() if isinstance(p, DTensor)} - counted
        counted |= own
        sizes.append(sum(p.numel() for p in own))
    return count, sizes


@pytest.mark.parametrize(
    ("name", "blocks", "millions"),
    [("ViT-L-14", 24 + 12, 428), ("ViT-H-14", 32 + 24, 986), ("ViT-bigG-14", 48 + 32, 2540)],
)
def test_larger_models_come_by_name_and_in_small_pieces(name: str, blocks: int, millions: int, gloo: Pools) -> None:
    for count, sizes in gloo(2, pieces, name):
        assert count == blocks
        assert sum(sizes) == pytest.approx(millions * 1e6, rel=0.01)
        assert max(sizes) < 0.1 * sum(sizes)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train={epochs=1, shard=true, freeze='towers'}", "shard is for trained towers"),
        ("train={epochs=1, shard=true, compile=true}", "shard and compile do not go together"),
    ],
)
def test_what_does_not_go_together_is_refused(override: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_config(CONFIG_FOLDER / "debug.toml", [override])


def test_in_one_process_nothing_is_sharded() -> None:
    towers = load_model("demo-vit-32")
    before = list(towers.module.parameters())
    fsdp.shard(towers.module, CPU)
    assert all(one is other for one, other in zip(before, towers.module.parameters(), strict=True))
    assert fsdp.full_module(towers.module, CPU) is towers.module
