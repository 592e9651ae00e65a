"""Scores with their chance levels: as JSON, and compared over runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

BETTER_RULE = "ahead of every other run by more than one binomial standard error of the difference"


@dataclass
class Scores:
    """Scores of a task.

    Attributes:
        metrics: shares in [0, 1], and counts of groups.
        chance: what a uniformly random order of the answers gives, exactly; not of every metric.
        trials: how many queries each metric is a share of.
        samples: how many images were scored.
        corrupt: keys of images that could not be decoded and are left out.
        undefined: metrics without a value here: accuracy in an empty group, top-5 of four classes.
        notes: for the reader of the numbers.
        errors: standard error of a metric, over the draw of images; not of every metric.
    """

    metrics: dict[str, float] = field(default_factory=dict)
    chance: dict[str, float] = field(default_factory=dict)
    trials: dict[str, int] = field(default_factory=dict)
    samples: int = 0
    corrupt: tuple[str, ...] = ()
    undefined: list[str] = field(default_factory=list)
    notes: tuple[str, ...] = ()
    errors: dict[str, float] = field(default_factory=dict)

    @property
    def complete(self) -> bool:
        return not self.corrupt

    def add(self, key: str, value: float | None, chance: float | None, trials: int, error: float | None = None) -> None:
        if value is None:
            self.undefined.append(key)
            return
        self.metrics[key], self.trials[key] = value, trials
        if chance is not None:
            self.chance[key] = chance
        if error is not None:
            self.errors[key] = error

    @property
    def headline(self) -> float:
        """Headline of a task: mean recall where captions are shared, else its first metric."""
        return self.metrics.get("mean_recall", next(iter(self.metrics.values())))


def to_record(results: Mapping[str, Scores]) -> dict[str, Any]:
    """Return scores by task as plain values for a line of eval.jsonl, which also holds `step` and `epoch`."""
    return {
        "results": {task: scores.metrics for task, scores in results.items()},
        "chance": {task: scores.chance for task, scores in results.items()},
        "trials": {task: scores.trials for task, scores in results.items()},
        "standard_errors": {task: scores.errors for task, scores in results.items()},
        "samples": {task: scores.samples for task, scores in results.items()},
        "corrupt": {task: list(scores.corrupt) for task, scores in results.items() if scores.corrupt},
        "task_notes": {task: list(scores.notes) for task, scores in results.items() if scores.notes},
    }


def from_record(record: Mapping[str, Any]) -> dict[str, Scores]:
    """Return scores by task of what `to_record` gave; trials that a record lacks are taken to be the samples."""
    results = {}
    for task, metrics in record["results"].items():
        samples = int(record["samples"][task])
        trials = record.get("trials", {}).get(task, {})
        results[task] = Scores(
            metrics=dict(metrics),
            chance=dict(record["chance"][task]),
            trials={key: int(trials.get(key, samples)) for key in metrics},
            errors=dict(record.get("standard_errors", {}).get(task, {})),
            samples=samples,
            corrupt=tuple(record.get("corrupt", {}).get(task, ())),
            notes=tuple(record.get("task_notes", {}).get(task, ())),
        )
    return results


class MetricRow(NamedTuple):
    """One metric of one task over several runs; `best` is the index of a clear winner."""

    metric: str
    chance: float | None
    values: tuple[float | None, ...]
    best: int | None


def tasks_of(runs: Sequence[Mapping[str, Scores]]) -> list[str]:
    """Return the tasks that at least one run was evaluated on, in their order."""
    return list(dict.fromkeys(task for results in runs for task in results))


def compare(runs: Sequence[Mapping[str, Scores]], task: str) -> list[MetricRow]:
    """Return each metric of a task, in the order in which the runs report them, and its clear winner if any."""
    scores = [run.get(task, Scores()) for run in runs]
    rows = []
    for metric in dict.fromkeys(key for one in scores for key in one.metrics):
        values = tuple(one.metrics.get(metric) for one in scores)
        chance = next((one.chance[metric] for one in scores if metric in one.chance), None)
        trials = min(one.trials[metric] for one in scores if metric in one.trials)
        rows.append(MetricRow(metric, chance, values, clearly_best(values, trials)))
    return rows


def clearly_best(values: Sequence[float | None], trials: int) -> int | None:
    """Return the index of the value ahead of all others beyond the noise of the sample, or None.

    Args:
        values: shares in [0, 1], each of the same `trials` queries; None where a run lacks the metric.

    The bound is one standard error of the difference between the best and the second best, as if independent:
    sqrt(p(1−p)/n + q(1−q)/n). It does not cover the variation between seeds, which is often larger.
    """
    known = sorted(((value, i) for i, value in enumerate(values) if value is not None), reverse=True)
    if len(known) < 2 or trials < 1:
        return None
    (best, index), (second, _) = known[:2]
    error = ((best * (1 - best) + second * (1 - second)) / trials) ** 0.5
    return index if best - second > error else None


def percent(value: float | None) -> str:
    """Return a share as per cent, with two decimals below 1 %, where chance levels are."""
    if value is None:
        return "–"
    return f"{100 * value:.2f}" if value < 0.01 else f"{100 * value:.1f}"


def metric_title(key: str) -> str:
    """Return a metric's title: `image_to_text_recall@5` → `image → text R@5`; unknown keys stay as they are."""
    titles = {
        "acc1": "zero-shot top-1",
        "acc5": "zero-shot top-5",
        "mean_recall": "mean recall",
        "mean_per_class_recall": "per-class recall",
        "acc_worst_region": "top-1, worst region",
        "acc_wg": "top-1, worst group",
        "acc_top5_wg": "top-5, worst group",
        "F1-macro_all": "macro F1",
        "jaccard_score_10-12": "Jaccard, 10–12",
        "acc1_head": "top-1, head",
        "acc1_middle": "top-1, middle",
        "acc1_tail": "top-1, tail",
    }
    if key.startswith("probe_"):
        return f"linear probe {metric_title(key.removeprefix('probe_')).removeprefix('zero-shot ')}"
    return titles.get(key, key.replace("_to_", " → ").replace("_recall@", " R@").replace("_", " "))
