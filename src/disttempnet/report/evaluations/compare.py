"""Evaluations on many tasks: reading, tables over groups of seeds, and pairwise differences."""

from __future__ import annotations

import json
import os
import tomllib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from disttempnet.errors import UserError
from disttempnet.evaluation.results.averages import GROUPS, Average, averages, counted_tags
from disttempnet.evaluation.results.records import PROBE_FILE, PROBE_PREFIX, RESULTS_FILE, TaskRecord, read_records
from disttempnet.evaluation.results.summary import SUMMARY_FILE, Subject, read_subject
from disttempnet.evaluation.results.tables import notes
from disttempnet.evaluation.scores import Scores
from disttempnet.evaluation.tasks import all_tasks
from disttempnet.io.files import open_regular
from disttempnet.report.compact import CompactResult
from disttempnet.report.read import Evaluation
from disttempnet.report.seeds.comparison import GroupComparison, Published, compare_groups, group_difference
from disttempnet.report.seeds.groups import AVERAGES, Cell, Column, SeedGroup
from disttempnet.report.seeds.intervals import PairedDifference

PUBLISHED_FILE = Path(__file__).with_name("published.toml")
HEADLINES = ("datacomp", "imagenet", "retrieval", "shifts", "vtab")
DIGITS = 2  # decimals, as published tables have
PROBE_SECTION = "linear probes"  # stands for a tag
SECTIONS = {
    "imagenet": "ImageNet & variants",
    "vtab": "VTAB",
    "": "Other",
    "retrieval": "Retrieval",
    "wilds": "WILDS",
    "fairness": "Fairness",
    PROBE_SECTION: "Linear probes",
}


class EvaluatedModel(NamedTuple):
    """An evaluation of one model.

    Attributes:
        result: as a run of a comparison: tasks that ran completely, and complete averages.
        subject: None where only the lines of results exist.
    """

    result: CompactResult
    subject: Subject | None
    records: dict[str, TaskRecord]
    averages: dict[str, Average]


class Difference(NamedTuple):
    """The difference of two groups in a column, other − base.

    Attributes:
        paired: over shared seeds; of groups that share none, the difference of the means, without an interval.
    """

    column: Column
    base: Cell
    other: Cell
    paired: PairedDifference


def holds_evaluations(path: Path) -> bool:
    """Return whether a path is an evaluation folder, its eval_results.jsonl, or a folder of evaluation folders."""
    if path.suffix == ".jsonl":
        try:
            with os.fdopen(open_regular(path), encoding="utf-8") as file:
                line = json.loads(file.readline())
        except (OSError, ValueError):
            return False
        return isinstance(line, dict) and {"dataset", "metrics"} <= line.keys()
    return bool(_folders(path))


def read_evaluations(paths: Sequence[Path]) -> list[EvaluatedModel]:
    """Read evaluations, in the order of the paths.

    Raises:
        UserError: a path that is no evaluation, a damaged file, or one without results.
    """
    for path in paths:
        if not holds_evaluations(path):
            raise UserError(f"{path}: no evaluation (a folder with {RESULTS_FILE}); runs have a report of their own")
    every = [path for given in paths for path in (_folders(given) or [given])]
    return [_read(path) for path in every]


def _folders(path: Path) -> list[Path]:
    if (path / RESULTS_FILE).is_file():
        return [path]
    return sorted(found.parent for found in path.glob(f"*/{RESULTS_FILE}")) if path.is_dir() else []


def _read(path: Path) -> EvaluatedModel:
    file = path / RESULTS_FILE if path.is_dir() else path
    found = read_records(file)
    if not found:
        raise UserError(f"{file}: holds no result of a task")
    places = {key: place for place, key in enumerate(all_tasks())}
    records = {key: found[key] for key in sorted(found, key=lambda key: places.get(key, len(places)))}
    subject = read_subject(path if path.is_dir() else path.parent)
    every = averages(records, counted_tags())
    probes = read_records((path if path.is_dir() else path.parent) / PROBE_FILE)
    scores = {key: _scores(key, record) for key, record in records.items() if record.counts}
    for key, record in probes.items():
        if record.counts and record.value is not None:
            scores.setdefault(key, Scores(samples=record.samples)).metrics[record.main_metric_name] = record.value
    complete = {tag: average.mean for tag, average in every.items() if average.complete and average.mean is not None}
    scores[AVERAGES] = Scores(metrics=dict(complete))
    return EvaluatedModel(_result(path, subject, records, scores), subject, records, every)


def _scores(key: str, record: TaskRecord) -> Scores:
    value = record.value
    metric = record.main_metric_name or (all_tasks()[key].main if key in all_tasks() else "main_metric")
    return Scores({} if value is None else {metric: value}, samples=record.samples)


def _result(
    path: Path, subject: Subject | None, records: Mapping[str, TaskRecord], scores: dict[str, Scores]
) -> CompactResult:
    """Return an evaluation as a run of a comparison. A model without a run folder is a group of its own."""
    subject = subject or Subject(str(path.parent if path.name == RESULTS_FILE else path))
    config: dict[str, Any] = dict(subject.run.get("config") or {"name": subject.title, "train": {"seed": 0}})
    if not subject.run:
        config["model"] = {"name": subject.model, "pretrained": subject.pretrained, "checkpoint": subject.checkpoint}
    config["out"] = str(path)
    config["evaluation"] = {"precision": subject.precision, "compat": subject.compat}
    objective = subject.run.get("objective") or {"title": subject.title}
    facts = {"objective": objective, "versions": dict(subject.versions), "finished": ""}
    seconds = sum(record.seconds for record in records.values())
    last = Evaluation(int(subject.run.get("step", 0)), 0.0, scores)
    try:
        result = CompactResult(str(config["name"]), config, facts, seconds, (last,), {}, {}, {})
        if result.objective and result.seed >= 0:  # checked here, since both are read from the config
            return result
    except (KeyError, TypeError, ValueError):
        pass
    raise UserError(f"{path}: {SUMMARY_FILE} does not hold a run's config and objective")


def compare_columns(
    every: Sequence[EvaluatedModel], columns: Sequence[Column | str], baseline: str = ""
) -> GroupComparison:
    """Return a table of columns, given as such or as `TASK/METRIC` and `averages/TAG`, with published averages below.

    Raises:
        UserError: an unknown column or baseline, or one seed of a config twice.
    """
    names = [column if isinstance(column, str) else "/".join(column) for column in columns]
    table = compare_groups([one.result for one in every], names, baseline)
    shown = {column for column in table.columns if column.task == AVERAGES}
    rows = tuple(row for row in read_published() if shown & row.values.keys())
    return replace(table, digits=DIGITS, published=rows)


def headline_tables(every: Sequence[EvaluatedModel], baseline: str = "") -> list[tuple[str, GroupComparison]]:
    """Return (heading, table) of averages, ImageNet & variants and retrieval, where there are columns."""
    known = known_columns(every)
    means = [column for column in known if column.task == AVERAGES]
    tables = [("Averages", compare_columns(every, means, baseline))] if means else []
    for tag in ("imagenet", "retrieval"):
        columns = [column for column in known if column == Column(AVERAGES, tag) or tag in _tags(column)]
        if columns:
            table = replace(compare_columns(every, columns, baseline), published=())  # the first table has them
            tables.append((GROUPS[tag], table))
    return tables


def known_columns(every: Sequence[EvaluatedModel]) -> list[Column]:
    """Return averages that at least one model has, then the main metrics of tasks in the order of tasks.toml."""
    found = {Column(task, m) for one in every for task, s in one.result.final.items() for m in s.metrics}
    heads = [Column(AVERAGES, tag) for tag in HEADLINES]
    places = {key: place for place, key in enumerate(all_tasks())}
    tasks = sorted((c for c in found if c.task != AVERAGES), key=lambda c: (places.get(c.task, len(places)), *c))
    return [column for column in heads if column in found] + tasks


def sections(columns: Iterable[Column]) -> list[tuple[str, list[Column]]]:
    """Return tasks by kind as (heading, columns), each task once; linear probes are a kind of their own."""
    members: dict[str, list[Column]] = {tag: [] for tag in SECTIONS}
    for column in columns:
        members[next((tag for tag in SECTIONS if tag in _tags(column)), "")].append(column)
    return [(SECTIONS[tag], found) for tag, found in members.items() if found]


def score_differences(base: SeedGroup, other: SeedGroup, columns: Sequence[Column]) -> list[Difference]:
    """Return other − base for the columns that both have, the greatest gain first."""
    found = []
    for column in columns:
        a, b = base.cell(column), other.cell(column)
        if a is not None and b is not None:
            paired = group_difference(other, base, column) or PairedDifference(b.mean - a.mean, None, 0)
            found.append(Difference(column, a, b, paired))
    return sorted(found, key=lambda difference: -difference.paired.mean)


def warnings(every: Sequence[EvaluatedModel]) -> list[str]:
    """Return a line for each model with an incomplete average, and the notes on tasks."""
    lines = []
    for one, name in zip(every, model_names(every), strict=True):
        average = one.averages["datacomp"]
        lines += [f"{name}: {note}" for note in (one.subject.notes if one.subject else ())]
        if noted := notes(one.records):
            lines.append(f"{name}: may not compare with others. {'; '.join(noted)}")
        if not average.complete:
            lacking = "; ".join(average.lacking)
            lines.append(f"{name}: partial, {partial_mean(average)}. Left out: {lacking}")
    return lines


def partial_mean(average: Average) -> str:
    """Return how many tasks an incomplete average has, and their plain mean."""
    mean = "" if average.mean is None else f" with a plain mean of {100 * average.mean:.{DIGITS}f}"
    return f"{average.coverage} tasks{mean}"


def model_names(every: Sequence[EvaluatedModel]) -> list[str]:
    """Return a name for each evaluation: that of its run or model, its folder where another one has that name."""
    counts = Counter(one.result.name for one in every)
    return [one.result.name if counts[one.result.name] == 1 else str(one.result.config["out"]) for one in every]


def read_published() -> tuple[Published, ...]:
    """Return the rows of published.toml."""
    table = tomllib.loads(PUBLISHED_FILE.read_text(encoding="utf-8"))

    def cell(values: Sequence[float]) -> Cell:
        mean, *std = (round(value / 100, 6) for value in values)
        return Cell(mean, std[0] if std else None, 0)

    return tuple(
        Published(
            f"{row['title']} ({row['setting']})",
            tuple(table["notes"][key] for key in (row["source"], *row.get("notes", ()))),
            {Column(AVERAGES, tag): cell(row[tag]) for tag in HEADLINES if tag in row},
        )
        for row in table["rows"]
    )


def _tags(column: Column) -> tuple[str, ...]:
    if column.metric.startswith(PROBE_PREFIX):
        return (PROBE_SECTION,)
    return all_tasks()[column.task].tags if column.task in all_tasks() else ()
