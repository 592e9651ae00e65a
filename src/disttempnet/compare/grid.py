"""The grid of a comparison: a TOML file → one checked config a run, and the state of each run.

    config = "demo.toml"      base of all runs: a path relative to the file, or a shipped config
    out = "runs/compare"      folder of run folders
    baseline = "clip"         the run that the others are compared with (default: the first)
    seeds = [1, 2, 3]         train.seed; all runs of the first seed come first
    [common]                  overrides for every run
    [runs.NAME]               overrides of one run
    [vary]                    "section.key" = [values]: every run at each of them
                              together = [{ KEY = VALUE, … }, …]: keys that change together, every run at each table
    [tune]                    metric = "TASK/METRIC", by which each run's settings are chosen, for each value of vary
    [tune.values]             "section.key" = [values]: tried for every run
    [runs.NAME.tune]          "section.key" = [values]: tried for this run, beside those

Sections may be nested tables or dotted keys. Later wins, key by key: base, common, run, vary, command line. A varied
key is overridden in vary alone, as runs are named after its values. `loss` is special, since its arguments belong to an
objective: where common, run or vary give `loss.name`, the base's `loss` is dropped. The `loss` keys of common apply to
every run; an objective that does not know one of them is an error.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
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
from disttempnet.errors import UserError, unknown_name
from disttempnet.evaluation.tasks import VALIDATION_TASK, find_task
from disttempnet.io.ranges import SEEDS, integers
from disttempnet.training.model import as_trained, continued, resolved
from disttempnet.training.run_folder import list_checkpoints
from disttempnet.training.run_info import read_facts

MOST_RUNS = 10_000
TUNING = "tuning"  # folder of the trials, in `out`
SET_BY_GRID = {"name": "the table's own name", "out": "out at the top of the file", "train.seed": "seeds"}


class TuneSection(Section):
    """[tune]: settings that are chosen for each run, by one metric, on a seed that is not reported."""

    metric: str = Field(pattern=r"^.+/.+$")
    seed: Annotated[int, SEEDS] = 0
    values: dict[str, Any] = Field(default_factory=dict)
    widen: Annotated[int, integers(0, 10)] = 2


class GridFile(Section):
    """The keys of a comparison's file."""

    config: PathOrName
    out: PathOrName = "runs/compare"
    baseline: str = ""
    seeds: tuple[Annotated[int, SEEDS], ...] = Field(min_length=1)
    common: dict[str, Any] = Field(default_factory=dict)
    vary: dict[str, Any] = Field(default_factory=dict)
    tune: TuneSection | None = None
    runs: dict[str, dict[str, Any]] = Field(min_length=1)


@dataclass(frozen=True)
class GridCell:
    """A run of the file at one choice of the varied values, to be trained with several seeds.

    Attributes:
        name: of its runs, without the seed: RUN--KEY-VALUE.
        run: its name in the file.
        varied: key → value.
        table: its config as a plain table, without name, out and seed.
        tuned: key → values to try, in the order of the file; empty where nothing is tuned.
        where: the file, for messages.
    """

    name: str
    run: str
    varied: Mapping[str, Any]
    table: Mapping[str, Any]
    tuned: Mapping[str, tuple[Any, ...]]
    where: str

    def config(self, out: str, seed: int, setting: Sequence[Any] = (), trial: bool = False) -> Config:
        """Return the config of one of its runs.

        Args:
            out: folder of run folders.
            seed: of training.
            setting: a value for each key of `tuned`.
            trial: name the run after the setting.

        Raises:
            UserError: a value that its key cannot have.
        """
        table = copy.deepcopy(dict(self.table))
        chosen = dict(zip(self.tuned, setting, strict=True)) if setting else {}
        merge(table, _nested(chosen))
        name = _run_name(self.name, chosen if trial else {}, f"seed-{seed}")
        table |= {"name": name, "out": out}
        table.setdefault("train", {})["seed"] = seed
        return config_from_table(table, f"{self.where}: {name}")


@dataclass(frozen=True)
class Grid:
    """All runs of a comparison.

    Attributes:
        out: folder of the run folders.
        seeds: of the runs that are reported.
        cells: of the grid, in the order of the file.
        baseline: the run that the others are compared with, as it stands in names of runs.
        tune: how settings are chosen; None where nothing is tuned.
        settings: name of a cell → its chosen setting.
    """

    out: Path
    seeds: tuple[int, ...]
    cells: tuple[GridCell, ...]
    baseline: str
    tune: TuneSection | None = None
    settings: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)

    @property
    def untuned(self) -> tuple[GridCell, ...]:
        """The cells whose setting is yet to be chosen."""
        return tuple(cell for cell in self.cells if cell.tuned and cell.name not in self.settings)

    @cached_property
    def configs(self) -> tuple[Config, ...]:
        """A config for each run, in the order in which they are trained; none of `untuned` cells.

        They are checked, with [loss] as written. A default that changed since a run began is thus that of the run.
        """
        ready = [cell for cell in self.cells if not cell.tuned or cell.name in self.settings]
        return tuple(
            cell.config(str(self.out), seed, self.settings.get(cell.name, ())) for seed in self.seeds for cell in ready
        )

    def chosen(self, settings: Mapping[str, tuple[Any, ...]]) -> Grid:
        """Return the grid with these settings."""
        return replace(self, settings=settings)


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
        apply_override(table, override, {"config", "out", "baseline"}.__contains__)
    try:
        file = GridFile.model_validate(table)
    except ValidationError as error:
        raise UserError(f"{path}: {explain(error, GridFile)}") from None
    if len(set(file.seeds)) < len(file.seeds):
        raise UserError(f"{path}: seeds holds a number twice")
    baseline = file.baseline or next(iter(file.runs))
    if baseline not in file.runs:
        raise UserError(f"{path}: {unknown_name('baseline', baseline, file.runs)}")

    # the configs, with all other overrides
    rest = [override for override in overrides if override not in own]
    _refuse_set_by_grid("command line", {override.partition("=")[0].strip(): None for override in rest})
    grid = Grid(Path(file.out), file.seeds, tuple(_cells(path, file, rest)), _run_name(baseline, {}), file.tune)
    names = [cell.name for cell in grid.cells]
    if twice := {name for name in names if names.count(name) > 1}:
        raise UserError(f"{path}: two runs have the name {min(twice)}--seed-{file.seeds[0]}; rename one")
    _check(path, grid)
    return grid


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


def _cells(path: Path, file: GridFile, overrides: Sequence[str]) -> Iterator[GridCell]:
    # base, common keys and varied keys, each checked
    base = read_run_table(base_path(path, file.config))
    config_from_table(base, file.config)  # errors of the base name the base
    common, choices = _nested(file.common), _varied(path, file)
    _refuse_varied(file, flat(_nested(choices[0])), overrides)
    _refuse_set_by_grid(f"{path}: common", flat(common))
    count = len(file.seeds) * len(file.runs) * len(choices)
    if count > MOST_RUNS:
        raise UserError(f"{path}: {count:,} runs, over {MOST_RUNS:,}: give fewer seeds, runs or values in vary")

    # one cell for each choice of values and run; later layers win
    for varied, (run, own) in product(choices, file.runs.items()):
        changes = _nested({key: value for key, value in own.items() if key != "tune"})
        _refuse_set_by_grid(f"{path}: runs.{run}", flat(changes))
        table = copy.deepcopy(base)
        layers = [common, changes, _nested(varied)]
        if any("loss.name" in flat(layer) for layer in layers):
            table.pop("loss", None)
        for layer in layers:
            merge(table, layer)
        for override in overrides:
            apply_override(table, override, is_text)
        tuned = _tuned(path, file, run, [*varied, *(override.partition("=")[0].strip() for override in overrides)])
        yield GridCell(_run_name(run, varied), run, varied, table, tuned, str(path))


def _varied(path: Path, file: GridFile) -> list[dict[str, Any]]:
    """Return the choices of varied values, key → value: the product of all lists and the tables of `together`."""
    where = f"{path}: vary"
    alone = {key: values for key, values in file.vary.items() if key != "together"}
    lists = flat(_nested(alone))
    _refuse_set_by_grid(where, lists)
    _refuse_no_list(where, lists)
    if prod(map(len, lists.values())) > MOST_RUNS:
        raise UserError(f"{where}: over {MOST_RUNS:,} choices: give fewer values")
    tables = file.vary.get("together", [{}])
    if not isinstance(tables, list) or not tables or not all(isinstance(table, dict) for table in tables):
        raise UserError(f"{where}: 'together' is not a list of tables of keys")
    together = [flat(_nested(table)) for table in tables]
    for table in together:
        _refuse_set_by_grid(f"{where}.together", table)
        if table.keys() != together[0].keys():
            raise UserError(f"{where}.together: its tables have different keys: {list(together[0])} and {list(table)}")
        if both := lists.keys() & table.keys():
            raise UserError(f"{where}: '{min(both)}' is varied alone and in together: leave one of them out")
    return [
        dict(zip(lists, values, strict=True)) | {key: table[key] for key in together[0]}
        for values, table in product(product(*lists.values()), together)
    ]


def _refuse_varied(file: GridFile, varied: Mapping[str, Any], overrides: Sequence[str]) -> None:
    """Raise UserError for an override of a varied key, or of a section with one: names would say another value."""
    together = {key for table in file.vary.get("together", []) for key in flat(_nested(table))}
    for override in overrides:
        given = override.partition("=")[0].strip()
        for key in varied:
            if f"{key}.".startswith(f"{given}."):
                whole = "vary.together" if key in together else f"vary.{key}"
                raise UserError(f"command line: '{key}' is varied: override {whole} instead, or leave {given} out")


def _tuned(path: Path, file: GridFile, run: str, given: Sequence[str]) -> dict[str, tuple[Any, ...]]:
    """Return the keys that are tuned for a run with the values to try; `given` keys have a value already."""
    own = file.runs[run].get("tune", {})
    where = f"{path}: runs.{run}.tune"
    if not isinstance(own, dict):
        raise UserError(f"{where} is not a table of keys")
    if own and file.tune is None:
        raise UserError(f"{where}: tuning needs a [tune] with metric, the TASK/METRIC to choose by")
    tuned = flat(_nested(file.tune.values if file.tune else {})) | flat(_nested(own))
    _refuse_set_by_grid(where, tuned)
    _refuse_no_list(where, tuned)
    for key in tuned:
        if key in given:
            raise UserError(f"{where}: '{key}' is tuned, and given a value too: leave one of them out")
    if file.tune and prod(map(len, tuned.values())) > MOST_RUNS:
        raise UserError(f"{where}: over {MOST_RUNS:,} trials: give fewer values")
    return {key: tuple(values) for key, values in tuned.items()}


def _check(path: Path, grid: Grid) -> None:
    """Raise UserError for a wrong [loss], an unknown task or metric, before the first run starts."""
    if grid.tune and grid.tune.seed in grid.seeds:
        raise UserError(f"{path}: tune.seed = {grid.tune.seed} is one of seeds: settings are chosen on another one")
    for cell in grid.cells:
        trials = list(product(*cell.tuned.values()))
        for seed, setting in (
            [(grid.tune.seed, trial) for trial in trials]
            if cell.tuned and grid.tune
            else [(seed, ()) for seed in grid.seeds]
        ):
            config = cell.config(str(grid.out), seed, setting, trial=bool(setting))
            try:
                for task in config.eval.tasks:
                    find_task(task)
                resolved(config)
            except UserError as error:
                raise UserError(f"{path}: {config.name}: {error}") from None
            if setting and grid.tune and not _measures(config, grid.tune.metric):
                task = grid.tune.metric.rpartition("/")[0]
                raise UserError(
                    f"{path}: tune.metric: no run evaluates '{task}': add it to eval.tasks"
                    + (", or give data.validation a share" if task == VALIDATION_TASK else "")
                )


def _measures(config: Config, metric: str) -> bool:
    task = metric.rpartition("/")[0]
    return task in config.eval.tasks or (task == VALIDATION_TASK and bool(config.data.validation))


def _refuse_no_list(where: str, table: Mapping[str, Any]) -> None:
    for key, values in table.items():
        if not isinstance(values, list) or not values:
            raise UserError(f"{where}: '{key}' is not a list of values")


def _run_name(run: str, values: Mapping[str, Any], *last: str) -> str:
    """Return RUN--KEY-VALUE, as the name of a folder."""
    varied = [f"{label}-{_word(value)}" for label, value in zip(_labels(list(values)), values.values(), strict=True)]
    return re.sub(r"[^A-Za-z0-9._-]+", "-", "--".join([run, *varied, *last]))


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
