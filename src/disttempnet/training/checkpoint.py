"""Checkpoints that are whole or absent, and that continue at any world size.

    RUN/checkpoints/step-00000042/
        open_clip_model.safetensors, open_clip_config.json     the towers; open_clip opens the folder
        trainer.pt                                             objective, optimizers, position, config, data digest
        shard-00000-of-00002.pt                                a rank's part of the per-sample state, and its RNG
        moments/                                               of optimizers, where towers are shared out (train.shard)
        files.json                                             size and CRC-32 of each of them
    RUN/checkpoints/best.json                                  {"step": 42, "mean_recall": …}

A folder gets its name when every file in it is on disk (atomic_folder.py): a killed writer
    leaves only `.writing-…`, which the
next start removes. A resumed run examines the files. They are read with `weights_only=True`, the list of what is in
moments/ no less strictly.
"""

from __future__ import annotations

import pickle
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from disttempnet import distributed
from disttempnet.config import Config, config_from_table, public_table
from disttempnet.distributed import fsdp
from disttempnet.errors import UserError, notice
from disttempnet.losses import Objective
from disttempnet.losses.sample_state import SampleState, named_by_rank, reshard_sources
from disttempnet.models import Towers, load_model, save_model
from disttempnet.training import atomic_folder
from disttempnet.training.model import build_objective, values_out_of_bounds
from disttempnet.training.run_folder import (
    checkpoint_folder,
    chosen_checkpoint,
    list_checkpoints,
    refuse_damaged,
    write_best,
)

FORMAT = 1
# What trainer.pt and a shard must hold; of the counts the least.
TRAINER: dict[str, type] = {
    "step": int, "world_size": int, "num_samples": int, "index_digest": str, "config": dict, "objective": dict,
    "optimizers": list, "logit_scale": Tensor, "best": dict, "skipped": dict, "warmup_steps": int,
}  # fmt: skip
SHARD: dict[str, type] = {"state": dict, "rng": Tensor}
COUNTS = {"step": 0, "world_size": 1, "num_samples": 1, "warmup_steps": 0}
MAY_LACK = {"skipped", "warmup_steps"}  # older ones have none
MOMENTS = "moments"
# Keys that the result does not depend on, but for rounding: runs that differ in them only are the same run.
NOT_PART_OF_THE_RESULT = {
    "name", "out", "data.workers", "train.log_every", "train.checkpoint_every", "train.keep",
    "train.timeout_minutes", "train.compile", "train.accumulate", "train.shard", "eval.batch", "eval.data_root",
    "data.index",  # of runs before sources had indexes of their own
}  # fmt: skip
# What may also differ between the interrupted and the resumed run: the data may have moved (its digest is compared).
MAY_CHANGE = NOT_PART_OF_THE_RESULT | {"data.train", "train.stop_after_steps", "eval"}


class TrainState(NamedTuple):
    """The position of a run, as a checkpoint keeps it.

    Attributes:
        step: steps done.
        best: step and score of the best checkpoint; empty before the first evaluation.
        skipped: reason → int64 ids of the samples that could not be read so far; of earlier versions, their number.
        warmup_steps: of the learning rate of this run; None: not settled yet.
    """

    step: int = 0
    best: Mapping[str, float] = MappingProxyType({})
    skipped: Mapping[str, Tensor | int] = MappingProxyType({})
    warmup_steps: int | None = None


def save_checkpoint(
    run: Path,
    *,
    towers: Towers,
    loss: Objective,
    optimizers: list[torch.optim.Optimizer],
    config: Config,
    index_digest: str,
    logit_scale: float,
    logit_bias: float | None,
    state: TrainState,
    keep: int,
) -> Path:
    """Write a checkpoint from all ranks at once; it appears whole, or not at all.

    Only then older ones than the last `keep` go, but for the best; and later ones: of a course that was given up.

    Raises:
        UserError: no room on the disk; every rank raises.
    """
    step, best, skipped, warmup_steps = state
    target = checkpoint_folder(run) / f"step-{step:08d}"
    own, shared = _split(loss)
    optimizer_states, moments = _split_moments(optimizers)
    module = fsdp.full_module(towers.module, torch.device("cpu"), everywhere=False)

    def write(writing: Path) -> list[Path]:
        if moments:  # first: in it every rank fails, or none
            fsdp.save_parts(moments, writing / MOMENTS)
        shard = writing / _shard_name(distributed.rank(), distributed.world_size())
        torch.save({"state": own, **_generators()}, shard)
        written = [shard, *(writing / MOMENTS).glob(f"__{distributed.rank()}_*")]
        if module is None or not distributed.is_main():
            return written
        save_model(replace(towers, module=module), writing, logit_scale, logit_bias)
        trainer = {
            "format": FORMAT,
            "step": step,
            "world_size": distributed.world_size(),
            "objective": shared,
            "optimizers": optimizer_states,
            "config": public_table(config),
            "index_digest": index_digest,
            "num_samples": _num_samples(loss),
            "logit_scale": towers.module.logit_scale.detach().cpu(),
            "best": dict(best),
            "skipped": dict(skipped),
            "warmup_steps": config.optim.warmup_steps if warmup_steps is None else warmup_steps,
        }
        torch.save(trainer, writing / "trainer.pt")
        written += (writing / MOMENTS).glob(".metadata")
        return written + [one for one in writing.iterdir() if one.is_file() and not one.name.startswith("shard-")]

    def make_room() -> None:
        if not distributed.is_main():
            return
        write_best(run, best)
        found = list_checkpoints(run)  # once: what it misses is not removed
        earlier = [one.name for one in found if one.name < target.name]
        kept = {target.name, *earlier[max(0, len(earlier) - keep + 1) :]}
        kept |= {f"step-{int(best['step']):08d}"} if best else set()
        for other in found:
            if other.name not in kept:
                atomic_folder.remove(other)

    atomic_folder.write_whole(target, write)
    distributed.together(make_room)
    return target


def load_checkpoint(
    checkpoint: Path,
    *,
    towers: Towers,
    loss: Objective,
    optimizers: list[torch.optim.Optimizer],
    config: Config,
    index_digest: str,
) -> TrainState:
    """Restore everything in place, re-dealing per-sample state and what is shared out of towers to this world size.

    Args:
        towers: opened from this checkpoint by `load_model`: they have its weights.

    Raises:
        UserError: another data set, another config, or a file that cannot be read.
    """
    trainer = _read(checkpoint / "trainer.pt")
    _same_run(checkpoint, trainer, config, index_digest)
    with torch.no_grad(), _misfit_named(checkpoint / "trainer.pt"):
        towers.module.logit_scale.copy_(trainer["logit_scale"])
    shard = _restore_objective(checkpoint, trainer, loss)
    _restore_optimizers(checkpoint, trainer["optimizers"], optimizers)
    if shard is not None:
        _restore_generators(shard)
    # older ones have neither; their warm-up was as the config says, however short the run
    warmup_steps = trainer.get("warmup_steps", config.optim.warmup_steps)
    return TrainState(trainer["step"], trainer["best"], trainer.get("skipped", {}), warmup_steps)


@dataclass(frozen=True)
class Run:
    """A trained run, opened for evaluation, temperatures or further training.

    `index_digest` names the training samples that ids and per-sample state belong to.
    """

    folder: Path
    config: Config
    towers: Towers
    loss: Objective
    step: int
    num_samples: int
    index_digest: str


def load_run(path: str | Path) -> Run:
    """Open a run folder (its best checkpoint, else its last) or one checkpoint folder; no data set is needed.

    In a process group all ranks call this: they share the examination of the files.

    Raises:
        UserError: no run, no checkpoint, a damaged or an unreadable file, by name.
    """
    path = Path(path)
    checkpoint = path if (path / "trainer.pt").is_file() else chosen_checkpoint(path)
    refuse_damaged(checkpoint)
    trainer = _read(checkpoint / "trainer.pt")
    config = _config_of(checkpoint, trainer)
    for fault in values_out_of_bounds(config).values():
        notice(f"{checkpoint}: {fault}: taken as it was trained with")
    towers = load_model(config.model.name, str(checkpoint))
    loss = build_objective(config, trainer["num_samples"], towers.embed_dim, bounds=False)
    _restore_objective(checkpoint, trainer, loss)
    towers.module.eval()
    loss.eval()
    folder, digest = checkpoint.parent.parent, trainer["index_digest"]
    return Run(folder, config, towers, loss, trainer["step"], trainer["num_samples"], digest)


def _split(loss: Objective) -> tuple[dict[str, Any], dict[str, Any]]:
    """The objective's state_dict as (this rank's per-sample part, what all ranks share)."""
    sharded = tuple(f"{name}." for name, module in loss.named_modules() if isinstance(module, SampleState))
    own: dict[str, Any] = {}
    shared: dict[str, Any] = {}
    for key, value in loss.state_dict().items():
        (own if key.startswith(sharded) else shared)[key] = value
    return own, shared


def _num_samples(loss: Objective) -> int:
    return next((m.num_samples for m in loss.modules() if isinstance(m, SampleState)), 1)


def _generators() -> dict[str, torch.Tensor]:
    """States of the random generators that towers draw from (dropout, dropped patches)."""
    states = {"rng": torch.get_rng_state()}
    if torch.cuda.is_initialized():
        states["cuda_rng"] = torch.cuda.get_rng_state()
    return states


def _restore_generators(shard: dict[str, Any]) -> None:
    torch.set_rng_state(shard["rng"])
    if "cuda_rng" in shard and torch.cuda.is_initialized():
        torch.cuda.set_rng_state(shard["cuda_rng"])


def _restore_objective(checkpoint: Path, trainer: dict[str, Any], loss: Objective) -> dict[str, Any] | None:
    """Load the objective; its shards are taken as they are or re-dealt. Returns this rank's shard, if it is one."""
    old, rank, world_size = trainer["world_size"], distributed.rank(), distributed.world_size()
    shards = [_read(checkpoint / _shard_name(r, old)) for r in reshard_sources(old, rank, world_size)]
    state = trainer["objective"]
    with _misfit_named(checkpoint):
        for shard in shards:
            state = state | named_by_rank(shard["state"])
        loss.load_state_dict(state)
    return shards[0] if old == world_size else None


def _split_moments(optimizers: list[torch.optim.Optimizer]) -> tuple[list[dict[str, Any]], dict[str, torch.Tensor]]:
    """State dicts of the optimizers with None for what is shared out, and that by `OPTIMIZER.PARAMETER.NAME`.

    Parameters count as in the optimizer, whether shared out or not: a run may go on in the other way.
    """
    states: list[dict[str, Any]] = []
    moments: dict[str, torch.Tensor] = {}
    for number, optimizer in enumerate(optimizers):
        state = optimizer.state_dict()
        for index, entries in state["state"].items():
            parts = {name: value for name, value in entries.items() if fsdp.is_part(value)}
            moments |= {f"{number}.{index}.{name}": value for name, value in parts.items()}
            state["state"][index] = entries | dict.fromkeys(parts)
        states.append(state)
    return states, moments


def _restore_optimizers(
    checkpoint: Path, states: list[dict[str, Any]], optimizers: list[torch.optim.Optimizer]
) -> None:
    """Load what `_split_moments` gave into optimizers whose parameters are shared out as they are now."""
    moments: dict[str, torch.Tensor] = {}
    with _misfit_named(checkpoint / "trainer.pt"):
        for number, (optimizer, state) in enumerate(zip(optimizers, states, strict=True)):
            parameters = [p for group in optimizer.param_groups for p in group["params"]]
            for index, entries in state["state"].items():
                for name, value in entries.items():
                    if value is None:
                        entries[name] = moments[f"{number}.{index}.{name}"] = torch.zeros_like(parameters[index])
                        continue
                    if not isinstance(value, Tensor) or value.shape not in (torch.Size(), parameters[index].shape):
                        raise TypeError(f"{name} of parameter {index} is no tensor of its shape")
                    entries[name] = fsdp.as_parameter(value, parameters[index])
    if moments:
        fsdp.load_parts(moments, checkpoint / MOMENTS)
    with _misfit_named(checkpoint / "trainer.pt"):
        for optimizer, state in zip(optimizers, states, strict=True):
            # groups are those of the config, which is the same; the learning rate is set at every step
            optimizer.load_state_dict({"state": state["state"], "param_groups": optimizer.state_dict()["param_groups"]})


def _same_run(checkpoint: Path, trainer: dict[str, Any], config: Config, index_digest: str) -> None:
    if trainer["index_digest"] != index_digest:
        raise UserError(
            f"{checkpoint}: was trained on another data set (index {trainer['index_digest'][:12]}, "
            f"{trainer['num_samples']} samples; now {index_digest[:12]}): per-sample state cannot be applied to it. "
            "Give back the old data, or start a new run with another name"
        )
    old = _config_of(checkpoint, trainer)
    for key, was, now in differences(public_table(old), public_table(config), MAY_CHANGE):
        raise UserError(
            f"{checkpoint}: {key} was {was!r} and is {now!r} now: resume with the old value, "
            "or start a new run with another name"
        )


def _config_of(checkpoint: Path, trainer: dict[str, Any]) -> Config:
    """Its types are checked alone; keys that it lacks have their defaults."""
    return config_from_table(trainer["config"], f"{checkpoint / 'trainer.pt'}: config", bounds=False)


def refuse_out_of_bounds(config: Config, checkpoint: Path | None) -> None:
    """Raise UserError where a config has values that no run may have, but for those of the run that goes on from this
    checkpoint: they are told of."""
    faults = values_out_of_bounds(config)
    if not faults:
        return
    if checkpoint is None:
        raise UserError(next(iter(faults.values())))
    old = public_table(_config_of(checkpoint, _read(checkpoint / "trainer.pt")))
    new = public_table(config)
    for key, fault in faults.items():
        if _value_at(old, key) != _value_at(new, key):
            raise UserError(fault)
        notice(f"{checkpoint}: {fault}: taken as the run began with it")


def _value_at(table: dict[str, Any], key: str) -> Any:
    value: Any = table
    for part in key.split("."):
        value = value[part]
    return value


def differences(
    old: dict[str, Any], new: dict[str, Any], but: Collection[str] = (), prefix: str = ""
) -> list[tuple[str, Any, Any]]:
    """(section.key, old value, new value) of all that two configs as tables differ in, but for the keys in `but`."""
    found = []
    for key in sorted(old.keys() | new.keys()):
        name, was, now = prefix + key, old.get(key), new.get(key)
        if name in but:
            continue
        if isinstance(was, dict) and isinstance(now, dict):
            found += differences(was, now, but, name + ".")
        elif was != now:
            found.append((name, was, now))
    return found


def _shard_name(rank: int, world_size: int) -> str:
    return f"shard-{rank:05d}-of-{world_size:05d}.pt"


def _read(path: Path) -> dict[str, Any]:
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"{path}: missing; the checkpoint is not whole") from None
    except (RuntimeError, pickle.UnpicklingError, EOFError, OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read as a checkpoint: {str(error).splitlines()[0][:160]}") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: holds a {type(content).__name__}, not the state of a checkpoint")
    if content.get("format", FORMAT) != FORMAT:
        raise UserError(f"{path}: checkpoint format {content['format']}, this version reads {FORMAT}")
    for key, kind in (TRAINER if path.name == "trainer.pt" else SHARD).items():
        if key in MAY_LACK and key not in content:
            continue
        value: Any = content.get(key)
        few = key in COUNTS and isinstance(value, int) and value < COUNTS[key]
        if few or not isinstance(value, kind) or isinstance(value, bool):
            shown = repr(value)[:40] if isinstance(value, (int, str)) else f"of type {type(value).__name__}"
            raise UserError(f"{path}: not the state of a checkpoint: its {key} is {shown}")
    return content


@contextmanager
def _misfit_named(path: Path) -> Iterator[None]:
    """Turn what loading a state says of odd content into one line. Nothing else may be inside: a fault of the program
    must not hide here."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
        why = " ".join(str(error).split())[:200]
        raise UserError(f"{path}: its state does not fit this run: {type(error).__name__}: {why}") from None
