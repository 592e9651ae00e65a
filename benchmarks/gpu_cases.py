"""What benchmarks/gpu.py measures, each in a process of its own; its --help says what the cases are."""

from __future__ import annotations

import gc
import importlib.util
import json
import os
import random
import statistics
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).parent))
import loss as loss_benchmark
from loss import D

if TYPE_CHECKING:  # the process that only starts others does without
    import torch
    from torch import Tensor

LOSS_CASES = (
    *(f"{case}{path}" for case in ("core", "network", "clip", "rank") for path in ("", " torch")),
    *("dense", "dense-network", "open_clip", "inf-cl"),
)
RANKS = 8  # of which `rank` is one
AGREEMENT_ROWS = 1000  # no multiple of a kernel's block
VALUE_LIMIT, GRADIENT_LIMIT = 1e-5, 2**-7  # those of tests/losses/contrast/test_triton.py
WORDS = "a red dog on the grass near two small cats and one old car in front of some big green trees"  # a token each
INF_CL = "pip install inf-cl==1.2.1"


class Skipped(Exception):
    """A case that cannot be measured here, and why."""


# --- clock and memory of a device -------------------------------------------------------------------------------------


class Clock:
    """Moments on the device's own time line: the host does not wait for it. On a CPU, the host's."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def mark(self) -> Any:
        if self.device.type == "cpu":
            return time.perf_counter()
        import torch

        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def milliseconds(self, begin: Any, end: Any) -> float:
        if self.device.type == "cpu":
            return 1e3 * (end - begin)
        end.synchronize()
        return float(begin.elapsed_time(end))


def growth(device: torch.device, step: Callable[[], Any]) -> float:
    """MiB that a call takes at most beside what is there already."""
    if device.type == "cpu":
        return loss_benchmark.peak(step)["growth"]
    import torch

    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


# --- whole steps ------------------------------------------------------------------------------------------------------


def write_pairs(folder: Path, rows: int, tokens: int) -> Path:
    """A listing of one small picture, `rows` times, under captions that take `tokens` with start and end of text."""
    from PIL import Image

    Image.new("RGB", (32, 32), "green").save(folder / "one.png")
    draw = random.Random(0)
    captions = (" ".join(draw.choices(WORDS.split(), k=tokens - 2)) for _ in range(rows))
    listing = folder / "pairs.jsonl"
    lines = (json.dumps({"image": "one.png", "caption": caption}) for caption in captions)
    listing.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return listing


def training(case: dict[str, Any], folder: Path) -> tuple[Any, Any]:
    """A trainer of the published configuration of ViT-B/32, and a batch of it on its device, with random pixels."""
    import torch

    from disttempnet.config import CONFIG_FOLDER, load_config
    from disttempnet.training.trainer import Trainer

    listing = write_pairs(folder, case["batch"], case["tokens"])
    overrides = [
        f"data.train=[{{path={json.dumps(str(listing))}, join_rows=false}}]",  # one picture, a sample a row
        f"out={json.dumps(str(folder))}",
        f"data.global_batch={case['batch']}",
        "data.lanes=1",
        "data.workers=0",
        "data.transform=open_clip",
        f"model.name={case['model']}",
        f"train.precision={case['precision']}",
        f"train.compile={json.dumps(case['compile'])}",
        "loss.tau_start=epoch",  # the temperature's optimizer is part of the step
        "loss.rho=1",  # below log(N − 1) of the few pairs
    ]
    config = load_config(CONFIG_FOLDER / "cc12m_vitb32_v1_corrected.toml", overrides)
    trainer = Trainer(config, torch.device(case["device"]))
    trainer.loss.set_epoch(0)
    batch = next(iter(trainer.data.loader_from(0)))
    pixels = torch.randint(0, 256, batch.images.shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    return trainer, replace(batch, images=pixels).to(trainer.device)


def tower_flop(trainer: Any, batch: Any) -> int:
    """Operations of both towers a pair, forward and backward, attention with them."""
    import torch
    from step import count
    from torch.nn.attention import SDPBackend, sdpa_kernel

    encoder, pairs = trainer.gradients.model.encoder, 2

    def step() -> None:
        image, text = encoder(batch.images[:pairs], batch.tokens[:pairs])
        (image.sum() + text.sum()).backward()

    with torch.compiler.set_stance("force_eager"), sdpa_kernel(SDPBackend.MATH):  # else nothing to count
        return count(step) // pairs


class Contrasted:
    """When the contrast of the last step began, and when its gradient was complete.

    It runs last in the forward pass and first in the backward pass, so nothing else lies between. Autograd takes what
    was recorded last first: when it comes to the first of the towers, all of the contrast is done. A hook of the other
    tower's embeddings is called after the first tower's backward pass, not when its gradient is there.
    """

    def __init__(self, contrast: torch.nn.Module, clock: Clock) -> None:
        self.clock = clock
        contrast.register_forward_pre_hook(self._begins)

    def _begins(self, _: torch.nn.Module, arguments: tuple[Tensor, ...]) -> None:
        self.begin, self.end = self.clock.mark(), None
        for embeddings in arguments[:2]:
            embeddings.register_hook(self._ends)

    def _ends(self, _: Tensor) -> None:
        self.end = self.end or self.clock.mark()


def measure_step(case: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Training steps of one batch size."""
    import torch
    from accumulate import peak

    with tempfile.TemporaryDirectory() as folder:
        trainer, batch = training(case, Path(folder))
        flop = tower_flop(trainer, batch)
        clock = Clock(trainer.device)
        contrasted = Contrasted(trainer.gradients.model.contrast, clock)
        marks, contrasts = [], []
        for number in range(case["warm"] + case["steps"]):
            if number == case["warm"] and trainer.device.type == "cuda":
                torch.cuda.reset_peak_memory_stats()
            marks.append(clock.mark())
            trainer.train_step(batch)
            contrasts.append((contrasted.begin, contrasted.end))
        marks.append(clock.mark())
    begins, ends = marks[case["warm"] : -1], marks[case["warm"] + 1 :]
    milliseconds = statistics.median(map(clock.milliseconds, begins, ends))
    loss_ms = statistics.median(clock.milliseconds(*moments) for moments in contrasts[case["warm"] :])
    memory = torch.cuda.max_memory_allocated() / 2**30 if trainer.device.type == "cuda" else peak() * 1e6 / 2**30
    images = 1e3 * case["batch"] / milliseconds
    yield {
        "positions": batch.tokens.shape[1],
        "gflop_a_pair": round(flop / 1e9, 3),
        "ms": round(milliseconds, 3),
        "images_per_s": round(images, 1),
        "mfu_per_cent": round(100 * flop * images / (1e12 * case["tflops"]), 1) if case["tflops"] else None,
        "peak_gib": round(memory, 2),
        "loss_ms": round(loss_ms, 3),
        "loss_per_cent": round(100 * loss_ms / milliseconds, 2),
    }


# --- the loss alone ---------------------------------------------------------------------------------------------------


def loss_step(name: str, batch: int, device: torch.device) -> Callable[[], Any]:
    """Forward and backward of one case."""
    from disttempnet.losses.contrast import backend

    kind, _, path = name.partition(" ")
    ours = kind in (*loss_benchmark.OURS, "rank")
    os.environ[backend.KERNEL_SETTING] = path or "triton" if ours else "auto"
    x, y, ids = (side.to(device) for side in loss_benchmark.unit_pairs(batch))
    if ours:
        refuse_kernel_that_cannot_run(x)
    if kind == "rank":
        return rank_step(x, y, ids, kernel=not path)
    objective = inf_cl(device) if kind == "inf-cl" else loss_benchmark.make_objective(kind, batch, device)

    def step() -> None:
        objective(x.requires_grad_(), y.requires_grad_(), ids).backward()
        x.grad = y.grad = None  # the next step takes their memory again, and its peak counts them

    return step


def refuse_kernel_that_cannot_run(features: Tensor) -> None:
    from disttempnet.errors import UserError
    from disttempnet.losses.contrast.backend import use_kernel

    try:
        use_kernel(features)
    except UserError as error:
        raise Skipped(str(error)) from None


def rank_step(x: Tensor, y: Tensor, ids: Tensor, kernel: bool) -> Callable[[], Any]:
    """What one of RANKS ranks computes once features are gathered: statistics of its rows, and their pulls."""
    from disttempnet.losses.contrast.backend import anchor_statistics, feature_gradients
    from disttempnet.losses.contrast.pairs import Anchors, BatchPairs, rounded

    everyone = tuple(rounded(side, kernel) for side in (x, y))
    rows = len(x) // RANKS
    local = tuple(side[:rows] for side in everyone)
    pairs = BatchPairs(*local, *everyone, first_row=0, ids=ids, kernel=kernel)
    positive, all_positive = ((a.float() * b.float()).sum(1) for a, b in (local, everyone))
    n = x.new_full((len(x),), len(x) - 1.0)
    taus, tau, log_u = x.new_full((2, rows), 0.05), x.new_full((len(x),), 0.05), x.new_zeros(len(x))

    def step() -> None:
        _, kept = anchor_statistics(pairs, positive, taus, n[:rows], moments=True, keep=True)
        anchors = Anchors.of(tau, all_positive, log_u, n)
        feature_gradients(pairs, anchors, anchors, positive, kept)

    return step


def inf_cl(device: torch.device) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """CLIP's loss by Inf-CL's kernels: what its cal_inf_loss calls in one process, where the scale can learn."""
    if not importlib.util.find_spec("inf_cl"):
        raise Skipped(f"not installed: {INF_CL}")
    if device.type == "cpu":
        raise Skipped("has kernels for GPUs only")
    import torch
    from inf_cl import cal_flash_loss

    scale = torch.tensor(1 / 0.07, requires_grad=True, device=device)
    return lambda x, y, _: 0.5 * (cal_flash_loss(x, y, scale=scale) + cal_flash_loss(y, x, scale=scale)).mean()


def measure_loss(case: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """One case at every batch."""
    import torch

    device = torch.device(case["device"])
    clock = Clock(device)
    for batch in case["batches"]:
        yield {"batch": batch, **attempt(lambda batch=batch: time_loss(case, batch, device, clock))}
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()


def time_loss(case: dict[str, Any], batch: int, device: torch.device, clock: Clock) -> dict[str, Any]:
    step = loss_step(case["case"], batch, device)
    for _ in range(case["warm"]):
        step()
    memory, times = growth(device, step), []
    for _ in range(case["steps"]):
        begin = clock.mark()
        step()
        times.append((begin, clock.mark()))
    milliseconds = statistics.median(clock.milliseconds(*moments) for moments in times)
    return {"ms": round(milliseconds, 3), "peak_mib": round(memory, 1)}


def measure_agreement(case: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Kernels against the plain path in float64, on the same rounded features; two rows have one id."""
    import torch

    from disttempnet import Features, build_loss
    from disttempnet.losses.contrast import backend

    x, y, ids = (side.to(case["device"]) for side in loss_benchmark.unit_pairs(AGREEMENT_ROWS))
    ids[-1] = ids[0]
    os.environ[backend.KERNEL_SETTING] = "triton"
    refuse_kernel_that_cannot_run(x)
    for name in ("sogclr", "disttempnet-v1", "clip", "onlineclr"):
        found = []
        for setting, dtype in (("triton", torch.float32), ("torch", torch.float64)):
            os.environ[backend.KERNEL_SETTING] = setting
            loss = build_loss(name, num_samples=len(x), embed_dim=D, seed=1).to(x.device)
            loss.set_epoch(0)
            features = [side.bfloat16().to(dtype).requires_grad_() for side in (x, y)]
            for _ in range(2):
                features[0].grad = features[1].grad = None
                total = loss(Features.unit(*features), ids).total
                total.backward()
            found.append((total.detach().double(), torch.cat([side.grad.double() for side in features])))
        (low, low_gradient), (high, high_gradient) = found
        value = float((low - high).abs() / high.abs().clamp(min=0.1))
        gradient = float((low_gradient - high_gradient).norm() / high_gradient.norm())
        agree = value < VALUE_LIMIT and gradient < GRADIENT_LIMIT
        yield {"objective": name, "value_error": value, "gradient_error": gradient, "agree": agree}


# --- whole runs, and what ranks exchange ------------------------------------------------------------------------------

GOLDEN_LIMIT = 2e-3  # what the suite's golden test allows between processors (tests/training/test_trainer.py)


def measure_golden(case: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The losses of the smallest run in float32, without dropout, on the CPU and on the device."""
    import torch

    from disttempnet.config import CONFIG_FOLDER, load_config
    from disttempnet.training.trainer import Trainer

    losses = []
    with tempfile.TemporaryDirectory() as folder:
        for number, device in enumerate(("cpu", case["device"])):
            overrides = [f"out={json.dumps(folder)}", f"name=golden-{number}", "loss.dropout=0.0", "eval.tasks=[]"]
            config = load_config(CONFIG_FOLDER / "debug.toml", [*overrides, "train.precision=fp32"])
            Trainer(config, torch.device(device)).run()
            lines = (Path(folder) / config.name / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
            losses.append([json.loads(line)["loss"] for line in lines])
    difference = max(abs(one - two) / abs(one) for one, two in zip(*losses, strict=True))
    yield {"steps": len(losses[0]), "largest_difference": difference, "agree": difference < GOLDEN_LIMIT}


def measure_group(case: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """A process group of one rank: collectives, DDP with its bf16 exchange, FSDP2; gradients beside the plain ones."""
    import torch
    import torch.distributed as dist

    device = torch.device(case["device"])
    with tempfile.TemporaryDirectory() as folder:
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, init_method=f"file://{folder}/store", rank=0, world_size=1)
        try:
            for what, check in {"collectives": _collectives, "DDP, bf16": _ddp, "FSDP2": _fsdp}.items():
                yield {"backend": backend, "checked": what, **attempt(lambda check=check: check(device))}
        finally:
            dist.destroy_process_group()


def _collectives(device: torch.device) -> dict[str, Any]:
    import torch
    import torch.distributed as dist

    rows = torch.randn(64, D, device=device).bfloat16()
    gathered, summed = torch.empty_like(rows), rows.float()
    gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # its name before torch 2.13
    gather(gathered, rows)
    dist.all_reduce(summed)
    return {"agree": bool(torch.equal(gathered, rows) and torch.equal(summed, rows.float()))}


def _ddp(device: torch.device) -> dict[str, Any]:
    import torch
    from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook

    def wrap(layers: torch.nn.Module) -> torch.nn.Module:
        wrapped = torch.nn.parallel.DistributedDataParallel(layers, gradient_as_bucket_view=True)
        wrapped.register_comm_hook(None, lambda group, bucket: bf16_compress_hook(group, bucket))
        return wrapped

    return _gradients_agree(wrap, device, limit=2**-7)


def _fsdp(device: torch.device) -> dict[str, Any]:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(device.type, (1,))

    def wrap(layers: torch.nn.Module) -> torch.nn.Module:
        for part in (*layers, layers):
            sharded = fully_shard(part, mesh=mesh)
            if device.type == "cpu":
                sharded.set_force_sum_reduction_for_comms(True)
        return layers

    return _gradients_agree(wrap, device, limit=1e-5)


def _gradients_agree(wrap: Callable[[Any], Any], device: torch.device, limit: float) -> dict[str, Any]:
    """Whether the gradients of small layers are the same wrapped and alone."""
    import torch

    found = []
    for wrapped in (False, True):
        torch.manual_seed(0)
        layers = torch.nn.Sequential(torch.nn.Linear(32, 64), torch.nn.Linear(64, 8)).to(device)
        model = wrap(layers) if wrapped else layers
        model(torch.randn(16, 32, device=device)).square().sum().backward()
        gradients = [p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad for p in model.parameters()]
        found.append(torch.cat([gradient.flatten() for gradient in gradients]))
    error = float((found[1] - found[0]).norm() / found[0].norm())
    return {"gradient_error": error, "agree": error < limit}


def measure_demo(case: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Seconds of the demo as a user runs it."""
    import subprocess

    begin = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "disttempnet", "demo", "--out", folder]
        process = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if process.returncode:
        last = (process.stdout.strip().splitlines() or [""])[-1]
        yield {"failed": f"exit code {process.returncode}: {last[:200]}"}
        return
    yield {"seconds": round(time.perf_counter() - begin, 1)}


# --- a case -----------------------------------------------------------------------------------------------------------


def attempt(measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """The result of a measurement, or why there is none: a GPU, a driver or a peer may refuse in its own way."""
    import torch

    try:
        return measure()
    except Skipped as reason:
        return {"skipped": str(reason)}
    except torch.OutOfMemoryError:
        return {"skipped": "out of memory"}
    except Exception as error:
        traceback.print_exc()
        return {"failed": f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"}


MEASURES = {
    "step": measure_step,
    "loss": measure_loss,
    "agreement": measure_agreement,
    "golden": measure_golden,
    "group": measure_group,
    "demo": measure_demo,
}


def measure(case: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """What one process finds, piece by piece; a failure is a piece."""
    pieces = MEASURES[case["what"]](case)
    while piece := attempt(lambda: next(pieces, {})):
        yield piece
