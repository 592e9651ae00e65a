"""A run of four processes goes on with one, two or eight: the same samples in the same order, the same curve."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor

from disttempnet import distributed
from disttempnet.config import CONFIG_FOLDER, load_config
from disttempnet.data import Batch
from disttempnet.losses import LossOutput
from disttempnet.losses.sample_state import SampleState
from disttempnet.training.run_folder import list_checkpoints
from disttempnet.training.trainer import Trainer
from tests.gloo import Pools, WorkerError

STEP, END = 13, 20  # the second epoch begins after step 10
TOLERANCE = 2e-4  # relative, float32: sums come in another order
PER_SAMPLE = 'loss={name="isogclr", rho=2.0, tau_max=0.15}'  # τ and its momentum in the table, beside log u


class Continued(NamedTuple):
    """What one rank has after loading, and the ids [b] of each of its batches from then on."""

    towers: dict[str, Tensor]
    optimizers: list[dict[str, Any]]
    objective: dict[str, Any]  # the same on every rank: parameters, schedules
    tables: dict[str, Tensor]  # this rank's shard of every column, [2, ceil(N / K)]
    ids: list[Tensor]


def go(out: str, stop: int, overrides: tuple[str, ...] = ()) -> Continued:
    """Train, or go on, up to a step in the process group that there is."""
    own = [f"out={json.dumps(out)}", "eval.tasks=[]", f"train.stop_after_steps={stop}", *overrides]
    trainer = Trainer(load_config(CONFIG_FOLDER / "debug.toml", own), torch.device("cpu"), "auto")
    tables = {
        f"{name}.{column}": module.local(column).clone()
        for name, module in trainer.loss.named_modules()
        if isinstance(module, SampleState)
        for column in module.columns
    }
    towers = {name: value.clone() for name, value in trainer.towers.module.state_dict().items()}
    moments = [copy.deepcopy(one.state_dict()) for one in trainer.optimizers]
    loaded = Continued(towers, moments, copy.deepcopy(trainer.loss.state_dict()), tables, [])
    step = trainer.train_step

    def train_step(batch: Batch) -> LossOutput:
        loaded.ids.append(batch.ids)
        return step(batch)

    trainer.train_step = train_step  # type: ignore[method-assign]
    trainer.run()
    return loaded if distributed.rank() == 0 else loaded._replace(towers={}, optimizers=[])


def of_all(shards: list[Tensor], samples: int) -> Tensor:
    """A column [2, N] from all ranks' shards: sample id is slot id div K of rank id mod K."""
    column = torch.empty(2, samples)
    for rank, shard in enumerate(shards):
        own = torch.arange(rank, samples, len(shards))
        column[:, own] = shard[:, : len(own)]
    return column


def losses(out: Path) -> list[float]:
    lines = (out / "debug" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["step"] for line in lines] == list(range(1, END + 1))
    return [json.loads(line)["loss"] for line in lines]


def check(pools: Pools, processes: int, folder: Path, overrides: tuple[str, ...] = ()) -> None:
    """Four processes up to step 13, `processes` from there; against one process all the way."""
    straight = go(str(folder / "straight"), END, overrides)
    pools(4, go, str(folder / "elastic"), STEP, overrides)
    saved = list_checkpoints(folder / "elastic" / "debug")[-1]
    if processes == 1:
        ranks = [go(str(folder / "elastic"), END, overrides)]
    else:
        ranks = pools(processes, go, str(folder / "elastic"), END, overrides)

    # what was saved is what every rank goes on with, bit for bit
    trainer = torch.load(saved / "trainer.pt", weights_only=True)
    shards = [torch.load(saved / f"shard-{r:05d}-of-00004.pt", weights_only=True)["state"] for r in range(4)]
    assert trainer["step"] == STEP
    tables = set(ranks[0].tables)
    for rank, shard in enumerate(shards):
        counts = {f"{name.rpartition('.')[0]}.num_samples" for name in tables}
        assert set(shard) == {f"{name}:{rank}-of-4" for name in tables} | counts
    for name in tables:
        old = of_all([shard[f"{name}:{rank}-of-4"] for rank, shard in enumerate(shards)], trainer["num_samples"])
        assert torch.equal(of_all([rank.tables[name] for rank in ranks], trainer["num_samples"]), old), name
        assert len(old.unique()) > 100, "something was learnt of many samples"
    shared = trainer["objective"]
    learnt = [name for name in shared if not name.endswith("_extra_state")]
    assert bool(learnt) == (PER_SAMPLE not in overrides), "temperature networks, but where each sample has its own τ"
    for rank in ranks:
        for name, value in shared.items():
            ours = rank.objective[name]
            assert torch.equal(ours, value) if isinstance(value, Tensor) else ours == value, name
    for ours, theirs in zip(ranks[0].optimizers, trainer["optimizers"], strict=True):
        assert ours["state"].keys() == theirs["state"].keys()
        for number, moments in theirs["state"].items():
            for name, value in moments.items():
                assert torch.equal(ours["state"][number][name], value), (number, name)
    from safetensors.torch import load_file

    weights = load_file(saved / "open_clip_model.safetensors")
    assert weights.keys() == ranks[0].towers.keys()
    for name, value in weights.items():
        assert name == "logit_scale" or torch.equal(ranks[0].towers[name], value), name

    # the same samples in the same places of the same batches, and the same curve
    for number, expected in enumerate(straight.ids[STEP:]):
        assert torch.equal(torch.cat([rank.ids[number] for rank in ranks]), expected), number
    np.testing.assert_allclose(losses(folder / "elastic"), losses(folder / "straight"), rtol=TOLERANCE, atol=1e-5)


@pytest.mark.parametrize("processes", [1, 2])
def test_four_processes_go_on_as_fewer(gloo: Pools, processes: int, tmp_path: Path) -> None:
    check(gloo, processes, tmp_path)


def test_temperatures_of_samples_are_dealt_again_with_their_momenta(gloo: Pools, tmp_path: Path) -> None:
    check(gloo, 2, tmp_path, (PER_SAMPLE,))


@pytest.mark.slow
def test_four_processes_go_on_as_eight(gloo: Pools, tmp_path: Path) -> None:
    check(gloo, 8, tmp_path)


@pytest.mark.slow
def test_three_processes_are_refused_with_the_reason(gloo: Pools, tmp_path: Path) -> None:
    gloo(4, go, str(tmp_path), STEP)
    before = sorted(path.name for path in tmp_path.rglob("*"))
    reason = (
        "3 processes cannot share data.lanes = 8 evenly; set data.lanes to a multiple of 3 that divides global_batch 32"
    )
    with pytest.raises(WorkerError, match=reason):
        gloo(3, go, str(tmp_path), END)
    assert sorted(path.name for path in tmp_path.rglob("*")) == before, "nothing was touched"
