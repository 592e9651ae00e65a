"""Run folders as the trainer writes them, with invented numbers and no model."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from disttempnet.config import config_from_table, dump_config

BOUNDS = {"tau_min": 0.005, "tau_max": 0.2}
FORMULA = "½ mean_i Σ_sides τ_i (log E_j exp(d_ij/τ_i) + ρ) <b>"


def write_run(
    folder: Path,
    title: str = "DistTempNet-v1",
    *,
    tasks: tuple[str, ...] = ("emoji-renderings", "emoji-concepts"),
    epochs: int = 4,
    finished: bool = True,
    spread: float = 0.01,
    train: str = "embedded:emoji/train",
    acc1: float = 0.4,
) -> Path:
    """Write a run of `epochs` epochs, evaluated after each; τ lies in 0.04 ± spread."""
    folder.mkdir(parents=True)
    config = config_from_table(
        {
            "name": folder.name,
            "data": {"train": train, "global_batch": 16},
            "model": {"name": "demo-convnext-32"},
            "loss": {"name": "disttempnet-v1", "rho": 2.0, "tau_min": 0.005, "tau_max": 0.2}
            if spread
            else {"name": "clip"},
            "optim": {"lr": 1e-3},
            "train": {"epochs": 4},
            "eval": {"tasks": list(tasks)},
        },
        "synthetic",
    )
    (folder / "config.toml").write_text(dump_config(config), encoding="utf-8")
    facts = {
        "objective": {"name": config.loss.name, "title": title, "formula": FORMULA},
        "started": "2026-01-01T00:00:00+00:00",
        "versions": {"torch": "2.9", "python": "3.11"},
        "git": "0123abcd",
        "device": "cpu",
        "world_size": 1,
        "index_digest": "feed",
        "num_samples": 160,
        "parameters": 12345,
        "command": "disttempnet train x.toml",
    } | ({"finished": "2026-01-01T00:04:00+00:00"} if finished else {})
    (folder / "run.json").write_text(json.dumps(facts), encoding="utf-8")
    with (folder / "metrics.jsonl").open("w", encoding="utf-8") as file:
        for step in range(1, 10 * epochs + 1):
            line = {"step": step, "epoch": step / 10, "loss": 5 / step, "lr": 1e-3, "samples_per_second": 100.0 + step}
            line |= {"grad_norm": 2.0 / step, "step_seconds": 0.5, "data_wait": 0.1}
            for side in ("image", "text"):
                line |= {f"tau/{side}_mean": 0.04, f"tau/{side}_min": 0.04 - spread, f"tau/{side}_max": 0.04 + spread}
            file.write(json.dumps(line | ({"gamma": 0.9} if spread else {})) + "\n")
    _write_evaluations(folder, tasks, epochs, spread, acc1)
    return folder


def _write_evaluations(folder: Path, tasks: tuple[str, ...], epochs: int, spread: float, acc1: float) -> None:
    (folder / "temperatures").mkdir()
    noise = np.random.default_rng(0).uniform(-1, 1, (2, 200))
    with (folder / "eval.jsonl").open("w", encoding="utf-8") as file:
        for epoch in range(1, epochs + 1):
            metrics = {"acc1": acc1 * epoch / epochs, "mean_recall": 0.5 * epoch / epochs}
            line = {
                "step": 10 * epoch,
                "epoch": epoch,
                "results": dict.fromkeys(tasks, metrics),
                "chance": {task: {"acc1": 0.01, "mean_recall": 0.02} for task in tasks},
                "samples": dict.fromkeys(tasks, 1000),
            }
            file.write(json.dumps(line) + "\n")
            tau = 0.04 + spread * noise
            np.savez(folder / "temperatures" / f"step-{10 * epoch:08d}.npz", image=tau[0], text=tau[1])
