"""Whole training steps with captions trimmed to the longest of the batch, beside open_clip's own on the same pairs.

    python benchmarks/trim.py --out benchmarks/results/trim.json

Ours: uint8 images, normalised in the step; tokens as the loader hands them out, and once more untrimmed; both towers,
the CLIP objective, gradients; then their norm and AdamW. open_clip's: its model, float32 images normalised beforehand,
all positions of its context, its ClipLoss, gradients; then AdamW and its clamp of the logit scale. All begin from the
same weights, take turns and run on one thread; a ratio is the median over the rounds of CPU time, once up to the
gradients and once with the optimizer, which costs the same at any batch. Captions are random tokens of 8 to 32, 20 on
average. Also counted: products of a pair's forward and backward pass, by length.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from disttempnet import build_loss
from disttempnet.config import OptimConfig
from disttempnet.data.loader import LENGTH_STEP
from disttempnet.models import Towers, load_model
from disttempnet.models.text import Trim, trimming
from disttempnet.training.gradients import WholeBatch
from disttempnet.training.model import Contrast, ContrastiveModel, DualEncoder
from disttempnet.training.optim import build_optimizers

import open_clip  # isort: skip (after disttempnet.models)

CPU = torch.device("cpu")
OPTIM = OptimConfig(lr=1e-4, weight_decay=0.2)
COUNTED = (24, 32, 40, 56)
Step = tuple[Callable[[], float], Callable[[], None]]  # up to the gradients, returns the loss; the optimizer


def captions(rows: int, shortest: int, longest: int, context: int) -> Tensor:
    """int64 tokens [rows, context]: random words between start and end, of evenly spread lengths."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.zeros(rows, context, dtype=torch.int64)
    for row, length in enumerate(torch.linspace(shortest, longest, rows).round().long().tolist()):
        tokens[row, :length] = torch.randint(1, 49406, (length,), generator=generator)
        tokens[row, [0, length - 1]] = torch.tensor([49406, 49407])
    return tokens


def own_step(towers: Towers, images: Tensor, tokens: Tensor) -> Step:
    """As the trainer does it."""
    ids = torch.arange(len(images))
    loss = build_loss("clip", num_samples=len(images), embed_dim=towers.embed_dim)
    towers.module.logit_scale.requires_grad_(False)
    optimizers = build_optimizers(towers.module, loss, OPTIM)
    gradients = WholeBatch(ContrastiveModel(DualEncoder(towers, None), Contrast(loss, None)), CPU)

    def descend() -> float:
        for optimizer in optimizers:
            optimizer.zero_grad(set_to_none=True)
        return float(gradients(images, tokens, ids).metrics["loss"])

    def update() -> None:
        nn.utils.clip_grad_norm_(towers.module.parameters(), float("inf"))
        for optimizer in optimizers:
            optimizer.step()

    return descend, update


def open_clip_step(module: open_clip.CLIP, images: Tensor, tokens: Tensor) -> Step:
    """As its training loop does it."""
    loss = open_clip.ClipLoss()
    named = [(p.ndim < 2 or "bn" in n or "ln" in n or "bias" in n, p) for n, p in module.named_parameters()]
    groups = [
        {"params": [p for plain, p in named if plain], "weight_decay": 0.0},
        {"params": [p for plain, p in named if not plain], "weight_decay": OPTIM.weight_decay},
    ]
    optimizer = torch.optim.AdamW(groups, lr=OPTIM.lr, betas=(OPTIM.beta1, OPTIM.beta2), eps=OPTIM.eps)

    def descend() -> float:
        optimizer.zero_grad()
        total = loss(*module(images, tokens))
        total.backward()
        return float(total.detach())

    def update() -> None:
        optimizer.step()
        with torch.no_grad():
            module.logit_scale.clamp_(0, 4.6052)

    return descend, update


def timing(name: str, pairs: int, rounds: int) -> dict[str, Any]:
    """Return CPU seconds a step, and the speed-up over open_clip's step."""
    torch.manual_seed(0)
    trimmed, whole, theirs = load_model(name), load_model(name), open_clip.create_model(name)
    for module in (trimmed.module, whole.module, theirs):
        module.load_state_dict(theirs.state_dict())
        module.train()
    context, side = trimmed.architecture["text_cfg"]["context_length"], trimmed.image_size
    longest = min(32, context - 4)
    tokens, trim = captions(pairs, longest // 4, longest, context), trimming(trimmed.module)
    assert isinstance(trim, Trim)
    images = torch.randint(0, 256, (pairs, 3, side, side), dtype=torch.uint8)
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (trimmed.mean, trimmed.std))
    steps = {
        "open_clip": open_clip_step(theirs, (images / 255 - mean) / std, tokens),
        "ours, untrimmed": own_step(whole, images, tokens),
        "ours": own_step(trimmed, images, trim(tokens, LENGTH_STEP)),
    }
    first = {who: descend() for who, (descend, _) in steps.items()}
    spent: dict[str, list[tuple[float, float]]] = {who: [] for who in steps}
    for number in range(rounds + 1):
        for who, (descend, update) in steps.items():
            begin = time.process_time()
            descend()
            half = time.process_time() - begin
            update()
            if number:
                spent[who].append((half, time.process_time() - begin))
    result: dict[str, Any] = {"pairs": pairs, "rounds": rounds, "first_loss": first}
    result |= {"tokens_mean": round(float((tokens > 0).sum(1).float().mean()), 1), "tokens_longest": longest}
    for what, place in (("gradients", 0), ("gradients and AdamW", 1)):
        times = {who: [one[place] for one in all_] for who, all_ in spent.items()}
        result[what] = {who: compared(times["open_clip"], own) for who, own in times.items()}
    return result


def compared(theirs: list[float], ours: list[float]) -> dict[str, float]:
    """Return our CPU seconds, and the ratio of theirs to ours."""
    ratios = [a / b for a, b in zip(theirs, ours, strict=True)]
    return {
        "cpu_s": round(statistics.median(ours), 2),
        "ratio": round(statistics.median(ratios), 3),
        "smallest": round(min(ratios), 3),
        "largest": round(max(ratios), 3),
    }


def operations(name: str) -> list[dict[str, float]]:
    """GFLOP of the towers' products a pair, forward and backward, at several lengths and untrimmed."""
    towers = load_model(name)
    context = towers.architecture["text_cfg"]["context_length"]
    images = torch.zeros(2, 3, towers.image_size, towers.image_size, dtype=torch.uint8)
    encoder = DualEncoder(towers, None)
    found = []
    for length in (*(n for n in COUNTED if n < context), context):
        tokens = captions(2, length, length, length)
        with FlopCounterMode(display=False) as counter:
            sum(side.sum() for side in encoder(images, tokens)).backward()
        found.append({"length": length, "gflop": round(counter.get_total_flops() / 2e9, 2)})
    return [{**row, "fewer": round(found[-1]["gflop"] / row["gflop"], 2)} for row in found]


def show(results: dict[str, Any]) -> None:
    """Tables for docs/performance.md."""
    print("| up to | step of | seconds of CPU | × as fast as open_clip | smallest – largest |")
    print("|---|---|---|---|---|")
    for what in ("gradients", "gradients and AdamW"):
        for who, row in results["timing"][what].items():
            print(f"| {what} | {who} | {row['cpu_s']} | {row['ratio']} | {row['smallest']} – {row['largest']} |")
    print("\n| longest text of the batch, tokens | GFLOP a pair | times fewer |")
    print("|---|---|---|")
    for row in results["operations"]:
        print(f"| {row['length']} | {row['gflop']} | {row['fewer']} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="ViT-B-32")
    parser.add_argument("--pairs", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=3, help="timed steps of each, after one that is not")
    parser.add_argument("--out", type=Path, help="file for the result, JSON")
    options = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    torch.set_num_threads(1)
    results: dict[str, Any] = {"model": options.model, "python": platform.python_version()}
    results |= {package: version(package) for package in ("torch", "open_clip_torch")}
    results["operations"] = operations(options.model)
    results["timing"] = timing(options.model, options.pairs, options.rounds)
    if options.out:
        options.out.write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    show(results)


if __name__ == "__main__":
    main()
