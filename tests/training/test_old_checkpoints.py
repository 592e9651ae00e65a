"""Checkpoints of earlier formats are opened, and runs continue from them.

Two archives in tests/fixtures/: in checkpoints_of_dicts.tar.xz the bookkeeping of per-sample state is dicts of numbers
(the first 0.1.0), in checkpoints_of_tensors.tar.xz it is tensors (shortly before `warmup_steps` was saved). Each holds,
for OBJECTIVE-PROCESSES, what was saved after step 8 of 12 (trainer.pt, shard-*.pt) and the losses of all 12 steps
(losses.json). The towers, small and frozen, are built from a seed.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import tarfile
import warnings
from pathlib import Path
from unittest import mock

import pytest
import torch
from torch import Tensor

from disttempnet.config import CONFIG_FOLDER, Config, load_config
from disttempnet.losses.sample_state import SampleState
from disttempnet.models import load_model, save_model
from disttempnet.training import trainer as module
from disttempnet.training.trainer import Trainer
from tests.gloo import Pools
from tests.training.test_trainer import GOLDEN_TOLERANCE, losses

FIXTURES = Path(__file__).parents[1] / "fixtures"
FORMATS = ("checkpoints_of_dicts", "checkpoints_of_tensors")
STEP, END = 8, 12
ARCHITECTURE = {
    "embed_dim": 8,
    "vision_cfg": {"image_size": 32, "patch_size": 16, "width": 8, "layers": 1, "head_width": 8},
    "text_cfg": {"context_length": 20, "vocab_size": 49408, "width": 8, "heads": 1, "layers": 1},
}
LOSS = {
    "isogclr": 'loss={name="isogclr", rho=1.5, tau_max=0.15}',
    "tempnet": 'loss={name="tempnet", rho=1.5, tau_max=0.15, prototypes=24, tau_lr=1e-3}',
    "sogclr": 'loss={name="sogclr"}',
}


def config(name: str) -> Config:
    own = [
        "out=out", f"name={name}", LOSS[name], "data.limit=96", "data.global_batch=16", "model.name=local-dir:towers",
        "model.pretrained=towers", "train.freeze=towers", "optim.warmup_steps=0", "eval.tasks=[]",
    ]  # fmt: skip
    return load_config(CONFIG_FOLDER / "debug.toml", own)


def unpack(folder: Path, form: str, case: str) -> Path:
    """A run folder `out/OBJECTIVE` with the old checkpoint, and the towers that it was trained with."""
    with tarfile.open(FIXTURES / f"{form}.tar.xz") as archive:
        archive.extractall(folder, filter="data")
    towers = folder / "towers"
    towers.mkdir()
    normalising = {"mean": [0.5] * 3, "std": [0.5] * 3}
    description = {"model_cfg": ARCHITECTURE, "preprocess_cfg": normalising}
    (towers / "open_clip_config.json").write_text(json.dumps(description), encoding="utf-8")
    with contextlib.chdir(folder):
        torch.manual_seed(7)
        save_model(load_model("towers/open_clip_config.json"), towers, logit_scale=10.0)
    run = folder / "out" / case.partition("-")[0]
    shutil.copytree(towers, run / "checkpoints" / f"step-{STEP:08d}")
    shutil.copytree(folder / form / case, run / "checkpoints" / f"step-{STEP:08d}", dirs_exist_ok=True)
    return run


def go_on(folder: str, name: str) -> dict[str, Tensor]:
    """Resume and train to the end; this rank's tables as they were loaded."""
    # tables alone are trained in some of these runs: nothing worth a run, and all that a checkpoint is about
    with (
        contextlib.chdir(folder),
        mock.patch.object(module, "refuse_if_nothing_is_trained"),
        warnings.catch_warnings(),
    ):
        warnings.filterwarnings("ignore", ".*has no files.json")  # nor have these
        trainer = Trainer(config(name), torch.device("cpu"), "auto")
        loaded = {
            f"{place}.{column}": table.local(column).clone()
            for place, table in trainer.loss.named_modules()
            if isinstance(table, SampleState)
            for column in table.columns
        }
        assert trainer.step == STEP
        trainer.run()
    return loaded


def saved(run: Path, processes: int) -> list[dict[str, Tensor]]:
    """Each rank's tables by name; in the later format their names end in `:RANK-of-PROCESSES`."""
    folder = run / "checkpoints" / f"step-{STEP:08d}"
    names = [f"shard-{rank:05d}-of-{processes:05d}.pt" for rank in range(processes)]
    states = [torch.load(folder / name, weights_only=True)["state"] for name in names]
    return [{key.partition(":")[0]: value for key, value in state.items()} for state in states]


def expected_losses(folder: Path, form: str, case: str) -> dict[int, float]:
    table = json.loads((folder / form / case / "losses.json").read_text(encoding="utf-8"))
    return {step: table[str(step)] for step in range(STEP + 1, END + 1)}


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("case", ["isogclr-1", "isogclr-2", "sogclr-1"])
def test_one_process_goes_on(form: str, case: str, tmp_path: Path) -> None:
    run = unpack(tmp_path, form, case)
    name, _, processes = case.partition("-")
    shards = saved(run, int(processes))
    for key, values in go_on(str(tmp_path), name).items():
        for rank, shard in enumerate(shards):
            own = values[:, rank :: len(shards)]
            assert torch.equal(own, shard[key][:, : own.shape[1]]), key
            assert len(own.unique()) > 20, "something was learnt"
    assert losses(run) == pytest.approx(expected_losses(tmp_path, form, case), rel=GOLDEN_TOLERANCE)


@pytest.mark.parametrize("form", FORMATS)
def test_two_processes_go_on(form: str, gloo: Pools, tmp_path: Path) -> None:
    run = unpack(tmp_path, form, "tempnet-2")
    shards = saved(run, 2)
    for shard, loaded in zip(shards, gloo(2, go_on, str(tmp_path), "tempnet"), strict=True):
        assert loaded.keys() == {"state.log_u"}
        assert torch.equal(loaded["state.log_u"], shard["state.log_u"])
    assert losses(run) == pytest.approx(expected_losses(tmp_path, form, "tempnet-2"), rel=GOLDEN_TOLERANCE)
