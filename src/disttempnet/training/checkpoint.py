"""Atomic checkpoints, which continue at any world size.

    RUN/checkpoints/step-00000042/
        open_clip_model.safetensors, open_clip_config.json     the towers; open_clip opens the folder
        lora.safetensors                                       adapters that are merged in those (lora.rank)
        trained_weights.safetensors                            if those are averages (train.ema): what is trained on
        trainer.pt                                             objective, optimizers, position, config, data digest
        shard-00000-of-00002.pt                                one rank's part of the per-sample state, and its RNG
        moments/                                               of the optimizers, if towers are sharded (train.shard)
        files.json                                             size and CRC-32 of each of them
    RUN/checkpoints/best.json                                  {"step": 42, "mean_recall": …}

A folder gets its name when all its files are on disk (atomic_folder.py). A killed writer leaves only `.writing-…`,
which the next start removes. A resumed run verifies the files first. They are read with `weights_only=True`, and the
metadata of moments/ just as strictly.
"""

from __future__ import annotations

import pickle
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from disttempnet import distributed
from disttempnet.config import Config, config_from_table, public_table
from disttempnet.config.identity import MAY_CHANGE_ON_RESUME, config_differences, value_at
from disttempnet.distributed import fsdp
from disttempnet.errors import UserError, notice
from disttempnet.losses import Objective
from disttempnet.losses.sample_state import SampleState, named_by_rank, reshard_sources
from disttempnet.models import Towers, load_model, save_model
from disttempnet.models.lora import Adapters
from disttempnet.models.weights import read_weights
from disttempnet.training import atomic_folder
from disttempnet.training.model import as_trained, build_objective, continued, values_out_of_bounds
from disttempnet.training.run_folder import (
    checkpoint_folder,
    chosen_checkpoint,
    list_checkpoints,
    refuse_damaged,
    write_best,
)
from disttempnet.training.weight_average import WeightAverage

CHECKPOINT_FORMAT = 1
# Types of what trainer.pt and a rank's file must hold; the smallest value of each count.
TRAINER_KEYS: dict[str, type] = {
    "step": int, "world_size": int, "num_samples": int, "index_digest": str, "config": dict, "objective": dict,
    "optimizers": list, "logit_scale": Tensor, "best": dict, "skipped": dict, "warmup_steps": int,
}  # fmt: skip
RANK_KEYS: dict[str, type] = {"state": dict, "rng": Tensor}
SMALLEST_COUNTS = {"step": 0, "world_size": 1, "num_samples": 1, "warmup_steps": 0}
OPTIONAL_KEYS = {"skipped", "warmup_steps"}  # older checkpoints have none
MOMENTS = "moments"
TRAINED_NAME = "trained_weights.safetensors"


class TrainState(NamedTuple):
    """The position of a run, as a checkpoint keeps it.

    Attributes:
        step: steps done.
        best: step and score of the best checkpoint; empty before the first evaluation.
        skipped: reason → int64 ids of the samples that could not be read so far; in older versions, their number.
        warmup_steps: of this run's learning rate; None = not fixed yet.
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
    average: WeightAverage | None = None,
    adapters: Adapters | None = None,
    config: Config,
    index_digest: str,
    logit_scale: float,
    logit_bias: float | None,
    state: TrainState,
    keep: int,
) -> Path:
    """Write an atomic checkpoint from all ranks, then remove old ones.

    The last `keep` checkpoints and the best one stay. Later ones, of a course that was given up, are removed.

    Args:
        run: the run folder.
        towers, loss, optimizers: what is trained, as the trainer holds it.
        average: of the towers' weights, which is saved as the towers; None = there is none.
        adapters: on the towers, which are saved with them merged; None = there are none.
        config, index_digest: identity of the run and of its data, compared when it is resumed.
        logit_scale, logit_bias: for open_clip, which reads the towers from here.
        state: position of the run.
        keep: number of checkpoints to keep, this one included.

    Returns:
        The folder of the checkpoint.

    Raises:
        UserError: no room on the disk; every rank raises.
    """
    target = checkpoint_folder(run) / f"step-{state.step:08d}"

    # Collect what this rank writes: its rows of the per-sample state [N / K], and its parts of sharded moments.
    own, shared = _split(loss)
    optimizer_states, moments = _split_moments(optimizers)

    # Describe the run for trainer.pt.
    warmup_steps = config.optim.warmup_steps if state.warmup_steps is None else state.warmup_steps
    trainer = {
        "format": CHECKPOINT_FORMAT,
        "step": state.step,
        "world_size": distributed.world_size(),
        "objective": shared,
        "optimizers": optimizer_states,
        "config": public_table(config),
        "index_digest": index_digest,
        "num_samples": _num_samples(loss),
        "logit_scale": towers.module.logit_scale.detach().cpu(),
        "best": dict(state.best),
        "skipped": dict(state.skipped),
        "warmup_steps": warmup_steps,
    }

    def write(folder: Path, module: nn.Module | None, trained: dict[str, Tensor]) -> list[Path]:
        # Every rank writes its own file; moments come first, as in them every rank fails or none does.
        if moments:
            fsdp.save_parts(moments, folder / MOMENTS)
        rank_file = folder / _rank_file(distributed.rank(), distributed.world_size())
        torch.save({"state": own, **_generators()}, rank_file)
        written = [rank_file, *(folder / MOMENTS).glob(f"__{distributed.rank()}_*")]

        # Rank 0 adds the towers, trainer.pt and the metadata of the moments.
        if module is not None and distributed.is_main():
            save_model(replace(towers, module=module), folder, logit_scale, logit_bias, ema=config.train.ema)
            if adapters is not None:
                adapters.save(folder)
            if trained:
                save_file(trained, folder / TRAINED_NAME)
            torch.save(trainer, folder / "trainer.pt")
            written += (folder / MOMENTS).glob(".metadata")
            written += [one for one in folder.iterdir() if one.is_file() and not one.name.startswith("shard-")]
        return written

    # Gather sharded towers into one plain module on rank 0; other ranks get None. Averaged weights are saved as the
    # towers', and the trained ones beside them.
    with average.in_place(towers.module) if average is not None else nullcontext(dict[str, Tensor]()) as weights:
        if adapters is not None:
            module: nn.Module | None = adapters.merged() if distributed.is_main() else None
        else:
            module = fsdp.full_module(towers.module, torch.device("cpu"), everywhere=False)
        trained = fsdp.full_state(weights)
        atomic_folder.write_folder(target, lambda folder: write(folder, module, trained))
    distributed.together(lambda: _remove_others(run, target, state.best, keep))
    return target


def _remove_others(run: Path, target: Path, best: Mapping[str, float], keep: int) -> None:
    """Name the best checkpoint, and remove those that are neither it, nor `target`, nor among the last to keep."""
    if not distributed.is_main():
        return
    write_best(run, best)
    found = list_checkpoints(run)  # listed once: what a slow file system does not show yet is not removed
    earlier = [one.name for one in found if one.name < target.name]
    kept = {target.name, *earlier[max(0, len(earlier) - keep + 1) :]}
    kept |= {f"step-{int(best['step']):08d}"} if best else set()
    for other in found:
        if other.name not in kept:
            atomic_folder.remove_folder(other)


def load_checkpoint(
    checkpoint: Path,
    *,
    towers: Towers,
    loss: Objective,
    optimizers: list[torch.optim.Optimizer],
    average: WeightAverage | None = None,
    config: Config,
    index_digest: str,
) -> TrainState:
    """Restore a run in place; per-sample state and sharded moments are resharded to this world size.

    Args:
        checkpoint: its folder.
        towers: opened from this checkpoint by `load_model`: they have its weights.
        loss, optimizers: built as for a new run.
        average: built from the towers, if the run has one: their weights are the average.
        config, index_digest: must be those of the checkpoint, except for MAY_CHANGE_ON_RESUME.

    Returns:
        The position of the run.

    Raises:
        UserError: another data set, another config, or a file that cannot be read.
    """
    trainer = _read(checkpoint / "trainer.pt")
    _refuse_other_run(checkpoint, trainer, config, index_digest)
    with torch.no_grad(), _misfit_named(checkpoint / "trainer.pt"):
        towers.module.logit_scale.copy_(trainer["logit_scale"])
    if average is not None:
        with average.in_place(towers.module) as trained, torch.no_grad(), _misfit_named(checkpoint / TRAINED_NAME):
            saved = read_weights(checkpoint / TRAINED_NAME)
            for name, value in trained.items():
                value.copy_(fsdp.sharded_like(saved[name], value))
    own = _restore_objective(checkpoint, trainer, loss)
    _restore_optimizers(checkpoint, trainer["optimizers"], optimizers)
    if own is not None:
        _restore_generators(own)
    # older checkpoints have neither key; their warm-up was as in the config, however short the run
    warmup_steps = trainer.get("warmup_steps", config.optim.warmup_steps)
    return TrainState(trainer["step"], trainer["best"], trainer.get("skipped", {}), warmup_steps)


@dataclass(frozen=True)
class Run:
    """A trained run, opened for evaluation, temperatures or further training.

    Attributes:
        folder: of the run.
        config: as it was trained with.
        towers, loss: in evaluation mode, on the CPU.
        step: of the checkpoint.
        num_samples: N of the training data.
        index_digest: identity of the training data that ids and per-sample state belong to.
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

    In a process group all ranks call this: they verify the files together.

    Args:
        path: `runs/NAME`, or `runs/NAME/checkpoints/step-…`.

    Raises:
        UserError: no run, no checkpoint, a damaged or an unreadable file, by name.

    Example:
        >>> run = disttempnet.load_run("runs/NAME")
        >>> features = disttempnet.encode_texts(run.towers, run.towers.tokenizer(["a photo of a cat"]))
    """
    path = Path(path)
    checkpoint = path if (path / "trainer.pt").is_file() else chosen_checkpoint(path)
    refuse_damaged(checkpoint)
    trainer = _read(checkpoint / "trainer.pt")
    config = _config_of(checkpoint, trainer)
    for fault in values_out_of_bounds(config).values():
        notice(f"{checkpoint}: {fault}: kept, as it was trained with this value")
    wanted = config.model
    towers = load_model(wanted.name, str(checkpoint), head=wanted.head, context_length=wanted.context_length)
    loss = build_objective(config, trainer["num_samples"], towers.embed_dim, bounds=False)
    _restore_objective(checkpoint, trainer, loss)
    towers.module.eval()
    loss.eval()
    folder, digest = checkpoint.parent.parent, trainer["index_digest"]
    return Run(folder, config, towers, loss, trainer["step"], trainer["num_samples"], digest)


def _split(loss: Objective) -> tuple[dict[str, Any], dict[str, Any]]:
    """Split the objective's state_dict into this rank's per-sample rows, and what is equal on all ranks."""
    sharded = tuple(f"{name}." for name, module in loss.named_modules() if isinstance(module, SampleState))
    own: dict[str, Any] = {}
    shared: dict[str, Any] = {}
    for key, value in loss.state_dict().items():
        (own if key.startswith(sharded) else shared)[key] = value
    return own, shared


def _num_samples(loss: Objective) -> int:
    return next((m.num_samples for m in loss.modules() if isinstance(m, SampleState)), 1)


def _generators() -> dict[str, torch.Tensor]:
    """Return the states of the random generators that towers draw from (dropout, dropped patches)."""
    states = {"rng": torch.get_rng_state()}
    if torch.cuda.is_initialized():
        states["cuda_rng"] = torch.cuda.get_rng_state()
    return states


def _restore_generators(states: dict[str, Any]) -> None:
    torch.set_rng_state(states["rng"])
    if "cuda_rng" in states and torch.cuda.is_initialized():
        torch.cuda.set_rng_state(states["cuda_rng"])


def _restore_objective(checkpoint: Path, trainer: dict[str, Any], loss: Objective) -> dict[str, Any] | None:
    """Load the objective, resharding its per-sample state to this world size.

    Returns this rank's file if the world size is the same; else None.
    """
    old, rank, world_size = trainer["world_size"], distributed.rank(), distributed.world_size()
    files = [_read(checkpoint / _rank_file(number, old)) for number in reshard_sources(old, rank, world_size)]
    state = trainer["objective"]
    with _misfit_named(checkpoint):
        for content in files:
            state = state | named_by_rank(content["state"])
        loss.load_state_dict(state)
    return files[0] if old == world_size else None


def _split_moments(optimizers: list[torch.optim.Optimizer]) -> tuple[list[dict[str, Any]], dict[str, torch.Tensor]]:
    """Return state dicts of the optimizers with None for sharded moments, and those by `OPTIMIZER.PARAMETER.NAME`.

    Parameters are numbered as in the optimizer, sharded or not: a run may continue with or without train.shard.
    """
    states: list[dict[str, Any]] = []
    moments: dict[str, torch.Tensor] = {}
    for number, optimizer in enumerate(optimizers):
        state = optimizer.state_dict()
        for index, entries in state["state"].items():
            parts = {name: value for name, value in entries.items() if fsdp.is_sharded(value)}
            moments |= {f"{number}.{index}.{name}": value for name, value in parts.items()}
            state["state"][index] = entries | dict.fromkeys(parts)
        states.append(state)
    return states, moments


def _restore_optimizers(
    checkpoint: Path, states: list[dict[str, Any]], optimizers: list[torch.optim.Optimizer]
) -> None:
    """Load what `_split_moments` returned, whether the optimizers' parameters were or are sharded."""
    # Put the moments into the state dicts; sharded ones are zeros here, to be filled from moments/.
    moments: dict[str, torch.Tensor] = {}
    with _misfit_named(checkpoint / "trainer.pt"):
        for number, (optimizer, state) in enumerate(zip(optimizers, states, strict=True)):
            parameters = [p for group in optimizer.param_groups for p in group["params"]]
            for index, entries in state["state"].items():
                for name, value in entries.items():
                    if value is None:
                        entries[name] = moments[f"{number}.{index}.{name}"] = torch.zeros_like(parameters[index])
                        continue
                    if not _is_state_of(parameters[index], value, optimizer):
                        raise TypeError(f"{name} of parameter {index} is no tensor of its shape")
                    if isinstance(value, Tensor):
                        entries[name] = fsdp.sharded_like(value, parameters[index])

    # Fill them: torch.distributed.checkpoint reads each rank's rows, from files of any world size.
    if moments:
        fsdp.load_parts(moments, checkpoint / MOMENTS)

    # Hand the state dicts to the optimizers.
    with _misfit_named(checkpoint / "trainer.pt"):
        for optimizer, state in zip(optimizers, states, strict=True):
            # groups are those of the config, which is the same; some optimizers count their steps there; the learning
            # rate is set at every step
            groups = [
                {**saved, **own}
                for saved, own in zip(state["param_groups"], optimizer.state_dict()["param_groups"], strict=True)
            ]
            optimizer.load_state_dict({"state": state["state"], "param_groups": groups})


def _is_state_of(parameter: Tensor, value: Any, optimizer: torch.optim.Optimizer) -> bool:
    """Return whether a saved value can be an optimizer's state of a parameter; not whether it is the right one."""
    if isinstance(value, Tensor) and value.shape in (torch.Size(), parameter.shape):
        return True
    if isinstance(optimizer, (torch.optim.AdamW, torch.optim.Adam)):
        return False
    # timm's: counts and flags as numbers; moments that are factored into rows and columns
    return isinstance(value, (bool, int, float)) or (isinstance(value, Tensor) and value.numel() < parameter.numel())


def _refuse_other_run(checkpoint: Path, trainer: dict[str, Any], config: Config, index_digest: str) -> None:
    """Raise UserError if the checkpoint belongs to another data set or config."""
    if trainer["index_digest"] != index_digest:
        raise UserError(
            f"{checkpoint}: was trained on another data set (index {trainer['index_digest'][:12]}, "
            f"{trainer['num_samples']} samples; now {index_digest[:12]}): its per-sample state does not apply. "
            "Restore the old data, or start a new run with another name"
        )
    old = _config_of(checkpoint, trainer)
    for key, was, now in config_differences(public_table(old), public_table(config), MAY_CHANGE_ON_RESUME):
        raise UserError(
            f"{checkpoint}: {key} was {was!r} and is {now!r} now: resume with the old value, "
            "or start a new run with another name"
        )


def _config_of(checkpoint: Path, trainer: dict[str, Any]) -> Config:
    """Return the config of a checkpoint as it was trained. Only its types are checked."""
    return as_trained(_saved_config(checkpoint, trainer))


def _saved_config(checkpoint: Path, trainer: dict[str, Any]) -> Config:
    return config_from_table(trainer["config"], f"{checkpoint / 'trainer.pt'}: config", bounds=False)


def continued_from(checkpoint: Path, config: Config) -> Config:
    """Return a run's config, in which defaults that changed since its checkpoint was begun are those of then."""
    return continued(config, _saved_config(checkpoint, _read(checkpoint / "trainer.pt", mapped=True)))


def refuse_out_of_bounds(config: Config, checkpoint: Path | None) -> None:
    """Raise UserError if a config has a value out of range, unless the checkpoint has it too: then give a notice."""
    faults = values_out_of_bounds(config)
    if not faults:
        return
    if checkpoint is None:
        raise UserError(next(iter(faults.values())))
    old = public_table(_config_of(checkpoint, _read(checkpoint / "trainer.pt")))
    new = public_table(config)
    for key, fault in faults.items():
        # a rule between sections has no key: the whole config counts
        was, now = (value_at(table, key) if key else {} for table in (old, new))
        if was != now or (not key and config_differences(old, new, MAY_CHANGE_ON_RESUME)):
            raise UserError(fault)
        notice(f"{checkpoint}: {fault}: kept, as the run began with this value")


def _rank_file(rank: int, world_size: int) -> str:
    return f"shard-{rank:05d}-of-{world_size:05d}.pt"


def _read(path: Path, mapped: bool = False) -> dict[str, Any]:
    """Read trainer.pt or a rank's file, and check its keys; where `mapped`, tensors stay on the disk until used.

    Raises:
        UserError: it is missing, damaged, or of another format.
    """
    # Read it; nothing but tensors and plain containers is unpickled.
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except FileNotFoundError:
        raise UserError(f"{path}: missing; the checkpoint is incomplete") from None
    except (RuntimeError, pickle.UnpicklingError, EOFError, OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read as a checkpoint: {str(error).splitlines()[0][:160]}") from None

    # Check the format, then the type of each key, and that counts are not too small.
    if not isinstance(content, dict):
        raise UserError(f"{path}: holds a {type(content).__name__}, not the state of a checkpoint")
    if content.get("format", CHECKPOINT_FORMAT) != CHECKPOINT_FORMAT:
        raise UserError(f"{path}: checkpoint format {content['format']}, this version reads {CHECKPOINT_FORMAT}")
    for key, kind in (TRAINER_KEYS if path.name == "trainer.pt" else RANK_KEYS).items():
        if key in OPTIONAL_KEYS and key not in content:
            continue
        value: Any = content.get(key)
        too_small = key in SMALLEST_COUNTS and isinstance(value, int) and value < SMALLEST_COUNTS[key]
        if too_small or not isinstance(value, kind) or isinstance(value, bool):
            shown = repr(value)[:40] if isinstance(value, (int, str)) else f"of type {type(value).__name__}"
            raise UserError(f"{path}: not the state of a checkpoint: its {key} is {shown}")
    return content


@contextmanager
def _misfit_named(path: Path) -> Iterator[None]:
    """Turn an error of loading a state that does not fit into a UserError of one line.

    Only the loading itself may stand inside: bugs must not be hidden here.
    """
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
        why = " ".join(str(error).split())[:200]
        raise UserError(f"{path}: its state does not fit this run: {type(error).__name__}: {why}") from None
