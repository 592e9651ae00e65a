"""The grid of a comparison: a TOML file → one checked config a run, and the state of each run.

    config = "demo.toml"      base of all runs: a path relative to the file, or a shipped config
    out = "runs/compare"      folder of run folders
    seeds = [1, 2, 3]         train.seed; all runs of the first seed come first
    [common]                  overrides for every run
    [runs.NAME]               overrides of one run
    [vary]                    "section.key" = [values]: every run at each of them

Sections may be nested tables or dotted keys. Later wins, key by key: base, common, run, vary, command line. `loss` is
special, since its arguments belong to an objective: where common, run or vary give `loss.name`, the base's `loss` is
dropped. The `loss` keys of common apply to every run; an objective that does not know one of them is an error.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from math import prod
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, ValidationError

from disttempnet.config import (
    Config,
    PathOrName,
    Section,
    config_from_table,
    explain,
    flat,
    is_text,
    load_config,
    public_table,
)
from disttempnet.config.identity import NO_EFFECT_ON_RESULT, config_differences
from disttempnet.config.toml import apply_override, base_path, find_config, merge, read_run_table, read_table
from disttempnet.errors import UserError
from disttempnet.evaluation.tasks import find_task
from disttempnet.io.ranges import SEEDS
from disttempnet.training.model import as_trained, continued, resolved
from disttempnet.training.run_folder import list_checkpoints
from disttempnet.training.run_info import read_facts

MOST_RUNS = 10_000
SET_BY_GRID = {"name": "the table's own name", "out": "out at the top of the file", "train.seed": "seeds"}


class GridFile(Section):
    """The keys of a comparison's file."""

    config: PathOrName
    out: PathOrName = "runs/compare"
    seeds: tuple[Annotated[int, SEEDS], ...] = Field(min_length=1)
    common: dict[str, Any] = Field(default_factory=dict)
    vary: dict[str, Any] = Field(default_factory=dict)
    runs: dict[str, dict[str, Any]] = Field(min_length=1)


@dataclass(frozen=True)
class Grid:
    """All runs of a comparison, in the order in which they are trained.

    Attributes:
        out: folder of the run folders.
        configs: checked, with [loss] as written. A default that changed since a run began is thus that of the run.
    """

    out: Path
    configs: tuple[Config, ...]


@dataclass(frozen=True)
class RunState:
    """The state of a run: `done`, `begun`, `new`, or `differs` (its folder holds another run: `why`)."""

    kind: str
    why: str = ""


def load_grid(path: str | Path, overrides: Sequence[str] = ()) -> Grid:
    """Read a comparison's file and check every config of it, the arguments of its objective included.

    Args:
        path: the TOML file, or the name of one that the package ships.
        overrides: `key=value`; keys of the file (`seeds`, `out`, `runs.clip.loss`, …), or else keys of every run.

    Raises:
        UserError: a mistake in the file or an override.
    """
    # the file, with the overrides of its own keys
    path = find_config(path)
    table = read_table(path)
    own = [override for override in overrides if re.split(r"[.=]", override)[0].strip() in GridFile.model_fields]
    for override in own:
        apply_override(table, override, {"config", "out"}.__contains__)
    try:
        file = GridFile.model_validate(table)
    except ValidationError as error:
        raise UserError(f"{path}: {explain(error, GridFile)}") from None
    if len(set(file.seeds)) < len(file.seeds):
        raise UserError(f"{path}: seeds holds a number twice")

    # the configs, with all other overrides
    rest = [override for override in overrides if override not in own]
    _refuse_set_by_grid("command line", {override.partition("=")[0].strip(): None for override in rest})
    configs = tuple(_configs(path, file, rest))
    names = [config.name for config in configs]
    if twice := {name for name in names if names.count(name) > 1}:
        raise UserError(f"{path}: two runs have the name {min(twice)}; rename one")
    _check(path, configs)
    return Grid(Path(file.out), configs)


def run_state(config: Config) -> RunState:
    """Return the state of a run, from its folder.

    Args:
        config: of a grid. Arguments that it leaves out are those that `train --resume auto` would give the run.
    """
    folder = config.folder
    if not (folder / "config.toml").is_file():
        return RunState("new")
    try:
        saved = load_config(folder / "config.toml", bounds=False)
        was, now = as_trained(saved), resolved(continued(config, saved), bounds=False)
    except UserError as error:
        return RunState("differs", str(error))
    for key, old, new in config_differences(public_table(was), public_table(now), NO_EFFECT_ON_RESULT):
        return RunState("differs", f"{folder}: {key} was {old!r} and is {new!r} now: give another out, or remove it")
    if "finished" in read_facts(folder):
        return RunState("done")
    found = list_checkpoints(folder)
    return RunState(
        "begun", f"saved at step {int(found[-1].name.removeprefix('step-'))}" if found else "nothing saved yet"
    )


def _configs(path: Path, file: GridFile, overrides: Sequence[str]) -> Iterator[Config]:
    # base, common keys and varied keys, each checked
    base = read_run_table(base_path(path, file.config))
    config_from_table(base, file.config)  # errors of the base name the base
    common, vary = _nested(file.common), flat(_nested(file.vary))
    _refuse_set_by_grid(f"{path}: common", flat(common))
    _refuse_set_by_grid(f"{path}: vary", vary)
    for key, values in vary.items():
        if not isinstance(values, list) or not values:
            raise UserError(f"{path}: vary: '{key}' is not a list of values")
    count = len(file.seeds) * len(file.runs) * prod(map(len, vary.values()))
    if count > MOST_RUNS:
        raise UserError(f"{path}: {count:,} runs, over {MOST_RUNS:,}: give fewer seeds, runs or values in vary")

    # one config for each seed, choice of values and run; later layers win
    labels = _labels(list(vary))
    for seed, values, (run, own) in product(file.seeds, product(*vary.values()), file.runs.items()):
        changes = _nested(own)
        _refuse_set_by_grid(f"{path}: runs.{run}", flat(changes))
        table = copy.deepcopy(base)
        layers = [common, changes, _nested(dict(zip(vary, values, strict=True)))]
        if any("loss.name" in flat(layer) for layer in layers):
            table.pop("loss", None)
        for layer in layers:
            merge(table, layer)
        for override in overrides:
            apply_override(table, override, is_text)
        varied = [f"{label}-{_word(value)}" for label, value in zip(labels, values, strict=True)]
        table["name"] = re.sub(r"[^A-Za-z0-9._-]+", "-", "--".join([run, *varied, f"seed-{seed}"]))
        table["out"] = file.out
        table.setdefault("train", {})["seed"] = seed
        yield config_from_table(table, f"{path}: {table['name']}")


def _check(path: Path, configs: Sequence[Config]) -> None:
    """Raise UserError for a wrong [loss] or an unknown task, before the first run starts."""
    for config in configs:
        try:
            for task in config.eval.tasks:
                find_task(task)
            resolved(config)
        except UserError as error:
            raise UserError(f"{path}: {config.name}: {error}") from None


def _refuse_set_by_grid(where: str, flat: dict[str, Any]) -> None:
    for key in flat.keys() & SET_BY_GRID.keys():
        raise UserError(f"{where}: '{key}' cannot be set there; it comes from {SET_BY_GRID[key]}")


def _word(value: Any) -> str:
    """Return a value as part of a run name. Dashes separate the words of a name, so only a sign leads with one."""
    sign = "-" if isinstance(value, (int, float)) and value < 0 else ""
    return sign + re.sub(r"[^A-Za-z0-9._]+", "-", str(value)).strip("-")


def _labels(keys: list[str]) -> list[str]:
    """Return the last part of each varied key, or the whole key where last parts repeat."""
    last = [key.rpartition(".")[2] for key in keys]
    return last if len(set(last)) == len(last) else keys


def _nested(table: dict[str, Any]) -> dict[str, Any]:
    """Return dotted keys as nested tables."""
    result: dict[str, Any] = {}
    for key, value in table.items():
        *sections, last = key.split(".")
        inner = {last: _nested(value) if isinstance(value, dict) else value}
        for section in reversed(sections):
            inner = {section: inner}
        merge(result, inner)
    return result
