"""What the objective adds to a whole training step of ViT-B/32: operations, time, bytes between ranks.

    python benchmarks/step.py --out benchmarks/results/step.json

Operations: torch's counter over a real forward and backward of open_clip's ViT-B-32 (a few pairs), and over each
objective alone; then by formula for b rows a rank on K ranks. Time: whole steps with DistTempNet-v1 and plain CLIP,
with NeuCLIP (4,096 prototypes) and SogCLR (all this package's), alternating, one thread; ratio = median over the
pairs. Bytes: two gloo processes whose collectives are counted, beside the formula.
"""

import argparse
import json
import operator
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks
from torch.utils.flop_counter import FlopCounterMode, bmm_flop, mm_flop

from disttempnet import OBJECTIVES, Features, build_loss, distributed

MEASURED = ("clip", "sogclr", "disttempnet-v1", "neuclip")
RATIOS = {"disttempnet-v1": "clip", "neuclip": "sogclr"}  # whole steps of the first over those of the second
PROTOTYPES, INNER_STEPS = 4096, 10  # NeuCLIP's
LAYOUTS = ((512, 8), (512, 64), (4096, 8))  # rows a rank, ranks


# --- operations -------------------------------------------------------------------------------------------------------


def objective_flops(b: int, B: int, D: int, hidden: int) -> int:
    """Of products, forward and backward, a rank: two similarities, the same again in the gradient, two pulls.

    One process (b = B): both sides share a similarity. The networks: one layer forward, and its weight's gradient
    backward, a side.
    """
    contrast = 8 * b * B * D if b == B else 12 * b * B * D
    return contrast + 2 * 2 * 2 * b * D * hidden


def predicted_flops(B: int, ranks: int, D: int, prototypes: int, steps: int) -> int:
    """Of the products, a rank, that move NeuCLIP's prototypes and predict with them: both sides, each rank its part."""
    return 4 * (2 * steps + 1) * B * D * prototypes // ranks


def count(step: Callable[[], Any]) -> int:
    """FLOP of the products in a call, a multiplication and an addition each."""

    def addmm(result: Any, left: Any, right: Any, *_: Any, **__: Any) -> int:
        return mm_flop(left, right)

    def baddbmm(result: Any, left: Any, right: Any, *_: Any, **__: Any) -> int:
        return bmm_flop(left, right)

    in_place = {torch.ops.aten.addmm_: addmm, torch.ops.aten.baddbmm_: baddbmm}
    with FlopCounterMode(display=False, custom_mapping=in_place) as counter:
        step()
    return counter.get_total_flops()


def unit_rows(rows: int, width: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x, y = (F.normalize(torch.randn(rows, width, generator=generator), dim=1) for _ in range(2))
    return x, y


def objective_step(name: str, rows: int, width: int, **arguments: Any) -> Callable[[], None]:
    loss = build_loss(name, num_samples=rows, embed_dim=width, **arguments)
    loss.set_epoch(0)
    x, y = unit_rows(rows, width)

    def step() -> None:
        loss(Features.unit(x.requires_grad_(), y.requires_grad_()), torch.arange(rows)).total.backward()

    return step


def towers() -> nn.Module:
    from disttempnet.models.towers import open_clip

    return open_clip.create_model("ViT-B-32")


def tower_step(model: nn.Module, images: Tensor, tokens: Tensor, loss: nn.Module) -> None:
    features = Features.of(model.encode_image(images), model.encode_text(tokens))
    loss(features, torch.arange(len(images))).total.backward()
    model.zero_grad(set_to_none=True)
    loss.zero_grad(set_to_none=True)


def batch_of(pairs: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(1, 49406, (pairs, 77), generator=generator)
    tokens[:, -1] = 49407
    return torch.randn(pairs, 3, 224, 224, generator=generator), tokens


def operations(model: nn.Module) -> dict[str, Any]:
    """FLOP of the towers a pair, and the objective's share of a step at several layouts."""
    pairs, width = 2, 512
    images, tokens = batch_of(pairs)
    loss = build_loss("clip", num_samples=pairs, embed_dim=width)
    whole = count(lambda: tower_step(model, images, tokens, loss))
    pair = (whole - objective_flops(pairs, pairs, width, 0)) // pairs
    result: dict[str, Any] = {"towers_gflop_a_pair": round(pair / 1e9, 2), "layouts": []}
    for b, ranks in LAYOUTS:
        clip, ours = (objective_flops(b, b * ranks, width, hidden) for hidden in (0, 256))
        predicted = predicted_flops(b * ranks, ranks, width, PROTOTYPES, INNER_STEPS)
        result["layouts"].append(
            {
                "rows_a_rank": b,
                "ranks": ranks,
                "clip_per_cent": round(100 * clip / (b * pair), 3),
                "disttempnet_v1_per_cent": round(100 * ours / (b * pair), 3),
                "overhead_per_cent": round(100 * (ours - clip) / (b * pair + clip), 3),
                "neuclip_overhead_per_cent": round(100 * predicted / (b * pair + clip), 3),
            }
        )
    return result


def timing(model: nn.Module, pairs: int, rounds: int) -> dict[str, float]:
    """Seconds of CPU of whole steps, and each objective's overhead over its peer."""
    images, tokens = batch_of(pairs)
    losses = {name: build_loss(name, num_samples=pairs, embed_dim=512) for name in MEASURED}
    for loss in losses.values():
        loss.set_epoch(0)
    features = Features.unit(*unit_rows(PROTOTYPES, 512))
    losses["neuclip"](features)  # fills its prototypes
    spent: dict[str, list[float]] = {name: [] for name in losses}
    for number in range(rounds + 1):
        for name, loss in losses.items():
            begin = time.process_time()
            tower_step(model, images, tokens, loss)
            if number:
                spent[name].append(time.process_time() - begin)
    seconds = {f"{name}_cpu_s": round(statistics.median(times), 3) for name, times in spent.items()}
    ratios = {
        f"{name}_over_{peer}": round(statistics.median(map(operator.truediv, spent[name], spent[peer])), 4)
        for name, peer in RATIOS.items()
    }
    return {"pairs": pairs, "rounds": rounds, **seconds, **ratios}


# --- bytes between ranks ----------------------------------------------------------------------------------------------


def communication(
    name: str,
    b: int,
    ranks: int,
    width: int,
    *,
    item: int = 4,
    state_columns: int = 0,
    prototypes: int = PROTOTYPES,
    parameters: int,
) -> dict[str, int]:
    """Bytes a rank receives of the others in the gathers of a step, and those of the tensors that are all-reduced.

    Every objective gathers what each rank is at: rows, epoch, whether it has been compared (three float64).
    The family: features of both sides, ids (8 bytes), five float32 a sample (s_ii, τ and ℓ of both sides), seven where
    τ is learned (and m). Reduced: the state's rows of the global batch, 2 numbers a column and sample; the gradients.
    Of the family, DRRho gathers features of a reference too, of width D here; NeuCLIP gathers two float32 an anchor and
    pass over its prototypes, and sums these and AdaGrad's sums.
    The others: SigLIP gathers features and sums its value; CyCLIP sums three D × D matrices beside CLIP; VICReg sums
    three rows of D and two D × D matrices; onlineCLR gathers ids and two float32 with the features,
    AmorLIP ids and six.
    """
    features = 2 * width * item * (2 if name.startswith("drrho") else 1)
    family = features + 8 + 4 * (5 if OBJECTIVES[name].temperature == "constant" else 7)
    row = {"siglip": features, "vicreg": 0, "amorlip": features + 8 + 4 * 6, "onlineclr": features + 8 + 4 * 2}.get(
        name, family
    )
    summed = {"siglip": 4, "cyclip": 12 * width**2, "vicreg": 12 * width + 8 * width**2}
    if name == "neuclip":
        row += 2 * 4 * ranks * (INNER_STEPS + 1)
        summed[name] = 4 * 2 * 2 * prototypes * width
    return {
        "gathered": (ranks - 1) * (b * row + 3 * 8),
        "reduced": summed.get(name, 8 * b * ranks * state_columns) + 4 * parameters,
    }


@contextmanager
def counted() -> Iterator[dict[str, int]]:
    """Counts, by kind, what collectives of torch.distributed move: received of others, or handed in to be summed."""
    seen = {"gathered": 0, "reduced": 0}
    names = [name for name in ("all_gather_single", "all_gather_into_tensor") if hasattr(dist, name)]
    originals = {name: getattr(dist, name) for name in (*names, "all_reduce")}

    def gather(original: Callable[..., Any]) -> Callable[..., Any]:
        def call(output: Tensor, local: Tensor, *args: Any, **kwargs: Any) -> Any:
            seen["gathered"] += output.nbytes - local.nbytes
            return original(output, local, *args, **kwargs)

        return call

    def reduce(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
        seen["reduced"] += tensor.nbytes
        return originals["all_reduce"](tensor, *args, **kwargs)

    for name in names:
        setattr(dist, name, gather(originals[name]))
    dist.all_reduce = reduce
    try:
        yield seen
    finally:
        for name, original in originals.items():
            setattr(dist, name, original)


class Pair(nn.Module):
    """A linear map a side: the smallest towers."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.image, self.text = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        return self.image(x), self.text(y)


def traffic(name: str, b: int, width: int) -> tuple[dict[str, int], int]:
    """Bytes of the second step of this rank under data parallelism, and the number of parameters."""
    K, rank = distributed.world_size(), distributed.rank()
    towers = Pair(width)
    loss = build_loss(name, num_samples=K * b, embed_dim=width, shard_state=True)  # as in a run
    loss.set_epoch(0)
    parallel = distributed.data_parallel(towers, torch.device("cpu"))
    parallel.register_comm_hook(None, default_hooks.allreduce_hook)  # what it does anyway, where it can be counted
    mine = slice(rank * b, (rank + 1) * b)
    x, y = (side[mine] for side in unit_rows(K * b, width))
    for _ in range(2):  # the first has no prototypes yet
        with counted() as seen:
            reference = (x, y) if name.startswith("drrho") else None
            loss(Features.of(*parallel(x, y), reference), torch.arange(K * b)[mine]).total.backward()
    return seen, sum(p.numel() for model in (towers, loss) for p in model.parameters())


def _rank(rank: int, ranks: int, store: str, answers: Any) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=ranks)
    found = {}
    for name in MEASURED:
        seen, parameters = traffic(name, 64, 512)
        found[name] = {**seen, "parameters": parameters}
    if rank == 0:
        answers.put(found)
    dist.destroy_process_group()


def bytes_between_ranks() -> dict[str, Any]:
    ranks = 2
    context = torch.multiprocessing.get_context("spawn")
    answers = context.SimpleQueue()
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(_rank, (ranks, str(Path(folder, "store")), answers), nprocs=ranks)
    return {"rows_a_rank": 64, "ranks": ranks, **answers.get()}


def show(results: dict[str, Any]) -> None:
    """Tables for docs/performance.md."""
    operations, timed = results["operations"], results.get("timing")
    print(f"towers: {operations['towers_gflop_a_pair']} GFLOP a pair\n")
    print(
        "| rows a rank × ranks | CLIP, % of the towers | DistTempNet-v1 | more than a step with CLIP, % "
        "| NeuCLIP, more than a step with SogCLR, % |"
    )
    print("|---|---|---|---|---|")
    for row in operations["layouts"]:
        print(
            f"| {row['rows_a_rank']} × {row['ranks']} | {row['clip_per_cent']} | {row['disttempnet_v1_per_cent']} "
            f"| {row['overhead_per_cent']} | {row['neuclip_overhead_per_cent']} |"
        )
    if timed:
        print(f"\n| s of CPU, whole steps of {timed['pairs']} pairs | over | median ratio |")
        print("|---|---|---|")
        for name, peer in RATIOS.items():
            ratio = timed[f"{name}_over_{peer}"]
            print(f"| {name} {timed[f'{name}_cpu_s']} | {peer} {timed[f'{peer}_cpu_s']} | {ratio} |")
    moved = results["bytes"]
    layout = f"{moved['rows_a_rank']} rows × {moved['ranks']} ranks"
    print(f"\n| bytes, {layout} | gathered | all-reduced | of that, gradients |")
    print("|---|---|---|---|")
    for name in MEASURED:
        seen = moved[name]
        print(f"| {name} | {seen['gathered']:,} | {seen['reduced']:,} | {4 * seen['parameters']:,} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=16, help="of a timed step")
    parser.add_argument("--rounds", type=int, default=3, help="timed steps of each objective; 0 = none")
    parser.add_argument("--out", type=Path, help="file for the result, JSON")
    options = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    torch.set_num_threads(1)
    torch.manual_seed(0)
    results: dict[str, Any] = {"python": platform.python_version()}
    results |= {package: version(package) for package in ("torch", "open_clip_torch")}
    model = towers()
    results["operations"] = operations(model)
    if options.rounds:
        results["timing"] = timing(model, options.pairs, options.rounds)
    results["bytes"] = bytes_between_ranks()
    if options.out:
        options.out.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    show(results)


if __name__ == "__main__":
    sys.exit(main())
