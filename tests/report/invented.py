"""Results over seeds with invented numbers: no run folder, no model."""

from __future__ import annotations

from typing import Any

import numpy as np

from disttempnet.evaluation.scores import Scores
from disttempnet.report.compact import CompactResult
from disttempnet.report.read import Evaluation

TITLES = {"clip": "CLIP", "sogclr": "SogCLR", "disttempnet-v1": "DistTempNet-v1"}


def config(name: str, loss: str, seed: int, batch: int = 128, **train: Any) -> dict[str, Any]:
    return {
        "name": name,
        "out": "runs/compare",
        "data": {"train": "embedded:emoji/train", "global_batch": batch},
        "model": {"name": "demo-convnext-48"},
        "loss": {"name": loss},
        "train": {"epochs": 4, "seed": seed, **train},
    }


def result(
    loss: str,
    seed: int,
    final: dict[str, dict[str, float]],
    *,
    run: str = "",
    batch: int = 128,
    varied: str = "",
    finished: bool = True,
    title: str = "",
    epochs: int = 4,
    **train: Any,
) -> CompactResult:
    """A run whose metrics rise linearly to `final` (task → metric → share) over its epochs."""
    name = f"{run or loss}{varied}--seed-{seed}"
    facts = {
        "objective": {"name": loss, "title": title or TITLES.get(loss, loss), "formula": "f"},
        "versions": {"torch": "2.9"},
        "git": "0123abcd",
        "device": "cpu",
        "world_size": 1,
        "index_digest": "feed",
        "num_samples": 160,
        "started": "2026-01-01T00:00:00+00:00",
    } | ({"finished": "2026-01-01T00:01:30+00:00"} if finished else {})
    chance = {task: dict.fromkeys(metrics, 0.01) for task, metrics in final.items()}
    evaluations = tuple(
        Evaluation(
            10 * e,
            float(e),
            {
                task: Scores(
                    {k: v * e / epochs for k, v in metrics.items()}, chance[task], dict.fromkeys(metrics, 1000), 1000
                )
                for task, metrics in final.items()
            },
        )
        for e in range(1, epochs + 1)
    )
    epoch = np.linspace(0.1, epochs, 20)
    mean = 0.03 + 0.04 * np.exp(-epoch) + 0.001 * seed
    curve = {"epoch": epoch, "mean": mean, "min": mean - 0.01, "max": mean + 0.02}
    return CompactResult(
        name,
        config(name, loss, seed, batch, **train),
        facts,
        90.0 if finished else None,
        evaluations,
        {side: [0.03, 0.02, 0.05, 0.004] for side in ("image", "text")},
        {key: values.tolist() for key, values in curve.items()},
        {"frequency": [5, 50], "image": [0.02, 0.03], "text": [0.04, 0.01], "spearman": [0.5 + 0.1 * seed, -0.25]},
    )
