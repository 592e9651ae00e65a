"""Groups of runs that differ only in the seed, with mean and standard deviation of every metric.

Keys that do not affect the result (data.workers, …) do not separate groups.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np

from disttempnet.config import defaults, flat
from disttempnet.config.identity import NO_EFFECT_ON_RESULT
from disttempnet.errors import UserError
from disttempnet.evaluation.results.averages import average_title, counted_tags
from disttempnet.evaluation.scores import metric_title
from disttempnet.evaluation.tasks import task_title
from disttempnet.losses import with_later_arguments
from disttempnet.report.compact import CompactResult

BATCH_LABEL = "global_batch"  # as names of runs call it
AVERAGES = "averages"  # stands for a task; its metrics are the tags of averages
HEAD_TO_TAIL = ("acc1_head", "acc1_middle", "acc1_tail")


class Column(NamedTuple):
    """A column of a table: a metric of a task, or an average over tasks (`AVERAGES`)."""

    task: str
    metric: str

    @property
    def head(self) -> str:
        """The heading below the title of the task."""
        if self.task != AVERAGES:
            return metric_title(self.metric)
        return average_title(self.metric, sum(self.metric in tags for tags in counted_tags().values()))

    @property
    def title(self) -> str:
        return self.head if self.task == AVERAGES else f"{task_title(self.task)}: {self.head}"


class Cell(NamedTuple):
    """A metric of a group, as shares in [0, 1].

    Attributes:
        std: sample standard deviation (n − 1); None for one seed.
        n: number of seeds.
        mark: "best" for the highest mean of a column, else "".
    """

    mean: float
    std: float | None
    n: int
    mark: str = ""


@dataclass(frozen=True)
class SeedGroup:
    """Runs of one config over several seeds.

    Attributes:
        title: the objective, and what distinguishes it from other groups of that objective.
        line: the title without the batch size and what follows it.
        run_title: the title without any varied key.
        run: the name of the run in its grid, without seed and varied keys.
        varied: the varied keys as they stand in the name, `lr-1e-3`.
        following: the keys among them that change one-to-one with the batch: `train.epochs`, for equal steps.
        results: in order of seeds.
    """

    title: str
    line: str
    run_title: str
    run: str
    varied: tuple[str, ...]
    following: tuple[str, ...]
    results: tuple[CompactResult, ...]

    @property
    def batch(self) -> int:
        return int(self.results[0].config["data"]["global_batch"])

    @property
    def seeds(self) -> list[int]:
        return [result.seed for result in self.results]

    def cell(self, column: Column) -> Cell | None:
        """Return the final metric over the seeds that measured it; None where none did."""
        return cell_of(self.values(column))

    def values(self, column: Column) -> list[float]:
        """Return the final metric of each seed that measured it."""
        values = [r.final[column.task].metrics.get(column.metric) for r in self.results if column.task in r.final]
        return [value for value in values if value is not None]


def cell_of(values: Sequence[float]) -> Cell | None:
    """Return mean and sample standard deviation of a value for each seed."""
    if not values:
        return None
    std = float(np.std(values, ddof=1)) if len(values) > 1 else None
    return Cell(float(np.mean(values)), std, len(values))


def families(groups: Sequence[SeedGroup]) -> list[list[SeedGroup]]:
    """Return families of two or more groups that differ only in the batch and what follows it, in order of batch."""
    found: dict[tuple[str, str], list[SeedGroup]] = {}
    for group in groups:
        key = _key(group.results[0], without_batch=True, following=group.following)
        found.setdefault((key, group.run if group.following else ""), []).append(group)
    return [sorted(family, key=lambda g: g.batch) for family in found.values() if len(family) > 1]


def batch_label(found: Sequence[Sequence[SeedGroup]]) -> str:
    """Return what changes along families: the global batch, and in brackets the keys that follow it."""
    keys = sorted({key for family in found for group in family for key in group.following})
    return f"global batch ({', '.join(keys)} with it)" if keys else "global batch"


def by_config(results: Sequence[CompactResult]) -> list[list[CompactResult]]:
    """Return runs grouped by config, in the order of the first run of each."""
    members: dict[str, list[CompactResult]] = {}
    for result in results:
        members.setdefault(_key(result), []).append(result)
    return list(members.values())


def group_by_seed(results: Sequence[CompactResult]) -> list[SeedGroup]:
    """Return the groups of finished runs, in the order of the first run of each.

    Raises:
        UserError: one seed twice in a group.
    """
    members = by_config(results)
    for same in members:
        seed, times = Counter(result.seed for result in same).most_common(1)[0]
        if times > 1:
            names = sorted({result.name for result in same if result.seed == seed})
            raise UserError(f"seed {seed} of {', '.join(names)} was given {times} times; give each run once")
    ordered = [tuple(sorted(same, key=lambda r: r.seed)) for same in members]
    return _named(ordered)


def _named(ordered: Sequence[tuple[CompactResult, ...]]) -> list[SeedGroup]:
    """Return groups with their titles: objective, name of the run where objectives repeat, varied keys."""
    firsts = [same[0] for same in ordered]
    parts = [name_parts(result.name) for result in firsts]
    names: dict[str, set[str]] = {}
    for result, (run, *_) in zip(firsts, parts, strict=True):
        names.setdefault(result.objective, set()).add(run)
    follow = _following(firsts)
    groups = []
    for same, (run, *varied), following in zip(ordered, parts, follow, strict=True):
        objective = same[0].objective
        own = f"{objective} ({run})" if len(names[objective]) > 1 else objective
        words = [(part, part.replace("-", " ", 1).replace("global_batch", "batch")) for part in varied]
        left_out = {BATCH_LABEL, *following, *(key.rpartition(".")[2] for key in following)}
        line = ", ".join([own, *(text for part, text in words if _label(part) not in left_out)])
        title = ", ".join([own, *(text for _, text in words)])
        groups.append(SeedGroup(title, line, own, run, tuple(varied), following, same))
    # one name, two configs: add the folder
    counts = Counter(group.title for group in groups)
    places = [f" [{first.config['out']}/{first.name}]" for first in firsts]
    return [
        replace(group, title=group.title + place) if counts[group.title] > 1 else group
        for group, place in zip(groups, places, strict=True)
    ]


def _following(firsts: Sequence[CompactResult]) -> list[tuple[str, ...]]:
    """Return the varied keys that change one-to-one with the batch among the groups of a run in its grid."""
    forms = []
    for result in firsts:
        run, *varied = name_parts(result.name)
        forms.append((result.objective, run, *map(_label, varied)))
    grids: dict[tuple[str, ...], list[dict[str, str]]] = {}
    for form, result in zip(forms, firsts, strict=True):
        values = {key: json.dumps(value, sort_keys=True) for key, value in flat(result.config).items()}
        grids.setdefault(form, []).append(values)

    def follows(key: str, grid: Sequence[dict[str, str]]) -> bool:
        pairs = {(values["data.global_batch"], values.get(key, "")) for values in grid}
        return len(pairs) > 1 and all(len(set(side)) == len(pairs) for side in zip(*pairs, strict=True))

    found = {}
    for form, grid in grids.items():
        labels = {label for label in form[2:] if BATCH_LABEL in form[2:] and label != BATCH_LABEL}
        keys = sorted(key for key in set().union(*grid) if labels & {key, key.rpartition(".")[2]})
        found[form] = tuple(key for key in keys if follows(key, grid))
    return [found[form] for form in forms]


def _label(part: str) -> str:
    """Return the varied key in a part of a run's name: `bias` of `bias--0.1`."""
    return part.partition("-")[0]


def name_parts(name: str) -> list[str]:
    """Return the parts of a run's name without its seed: the run in its grid, then the varied keys.

    They stand between `--`; not in bias--0.1, which means −0.1.
    """
    return re.split(r"--(?!\d)", name.partition("--seed-")[0])


def _key(result: CompactResult, without_batch: bool = False, following: Sequence[str] = ()) -> str:
    """Return the keys that affect the result, except the seed, as text.

    Keys that an old config lacks are defaults; arguments of its objective are as it was trained. Tuned keys count as
    tuned, whatever was chosen.
    """
    config, tuned = result.config, sorted(result.tuned.chosen) if result.tuned else []
    left_out = {*NO_EFFECT_ON_RESULT, "train.seed", *tuned} | ({"data.global_batch"} if without_batch else set())
    arguments = dict(config.get("loss", {}))  # an evaluation may know nothing of the training
    objective = arguments.pop("name", "")
    if objective:
        # an old ρ followed the batch: one for the family
        batch = 2 if without_batch else config["data"]["global_batch"]
        arguments = with_later_arguments(objective, arguments, batch)
    if arguments.get("tau_gradient") == "batch":
        left_out.add("loss.tau_gradient_limit")  # it bounds a part that only `fcco` adds
    table = defaults() | flat({**config, "loss": {"name": objective, **arguments}} if objective else config)
    kept = {key: value for key, value in table.items() if key not in {*left_out, *following}}
    return json.dumps([kept, tuned], sort_keys=True)
