"""The page about single runs: values from run folders and models, filled into a template."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from disttempnet.config import dump_config, public_table
from disttempnet.errors import UserError, unknown_name
from disttempnet.evaluation import tasks as readers
from disttempnet.evaluation.datasets.open import has_data
from disttempnet.evaluation.scores import compare, tasks_of
from disttempnet.evaluation.tasks import task_title
from disttempnet.losses import OBJECTIVES
from disttempnet.report.page import UNKNOWN, differing_keys, open_template, provenance_rows, publish, signed
from disttempnet.report.read import RunRecord, distinct_titles, read_run
from disttempnet.report.runs import examples, plots
from disttempnet.training.checkpoint import Run

FULL_BARS = (0.01, 0.02, 0.05, *(tenth / 10 for tenth in range(1, 11)))  # values at which bars may be full


def build_report(run_folders: Sequence[Path], out: Path) -> Path:
    """Write a self-contained HTML page that shows runs side by side, without JavaScript.

    Args:
        run_folders: folders that `disttempnet train` wrote; runs may be unfinished.
        out: file to write; its folder is made.

    Returns:
        `out`.

    Raises:
        UserError: a folder that is no run, or a damaged config.
    """
    return publish(out, runs_page([read_run(Path(folder)) for folder in run_folders]))


def runs_page(runs: Sequence[RunRecord], baseline: str = "") -> str:
    """Return the HTML page that shows runs side by side.

    Args:
        baseline: the name or title of the run that the others are compared with; empty = the first one.

    Raises:
        UserError: no run, or an unknown baseline.
    """
    if not runs:
        raise UserError("no run folder was given")
    titles = distinct_titles(runs)
    models = [examples.open_model(run) for run in runs]
    return open_template("runs.html").render(
        runs=[_run_facts(i, run, title) for i, (run, title) in enumerate(zip(runs, titles, strict=True))],
        **_results(runs, _place_of(baseline, runs, titles)),
        **_charts(runs, titles),
        galleries=_galleries(runs, titles, models),
        examples=_examples(runs, titles, models),
        provenance=_provenance(runs),
        differences=differing_keys([public_table(run.config) for run in runs], ("name", "out")),
        configs=[dump_config(run.config) for run in runs],
    )


def _run_facts(i: int, run: RunRecord, title: str) -> dict[str, Any]:
    last = run.steps[-1] if run.steps else {"step": 0, "epoch": 0.0}
    return {
        "title": title,
        "colour": plots.page_colour(i),
        "finished": run.finished,
        "step": last["step"],
        "epoch": last["epoch"],
        "epochs": run.config.train.epochs,
        "corrupt": [(task_title(task), scores.corrupt) for task, scores in run.final.items() if scores.corrupt],
    }


def _place_of(baseline: str, runs: Sequence[RunRecord], titles: Sequence[str]) -> int:
    """Return the place of the baseline among the runs."""
    names = [run.config.name for run in runs]
    for known in (names, titles):
        if baseline in known:
            return known.index(baseline)
    if baseline:
        raise UserError(unknown_name("baseline", baseline, names))
    return 0


def _results(runs: Sequence[RunRecord], base: int) -> dict[str, Any]:
    """Return the tables of results, the place of the baseline, and the value at which a bar is full."""
    final = [run.final for run in runs]
    tables: list[dict[str, Any]] = []
    for task in tasks_of(final):
        samples = max(scores[task].samples for scores in final if task in scores)
        about = readers.all_tasks()[task].about if task in readers.all_tasks() else ""
        rows = [(row, _differences(row.values, base)) for row in compare(final, task)]
        tables.append({"title": task_title(task), "about": about, "samples": samples, "rows": rows})
    shown = [value for table in tables for row, _ in table["rows"] for value in row.values if value is not None]
    full = next(step for step in FULL_BARS if step >= max(shown, default=1.0))
    return {"tables": tables, "base": base, "full": full}


def _differences(values: Sequence[float | None], base: int) -> list[str]:
    """Return value − baseline of each run in percentage points, with the decimals of the values."""
    first = values[base]
    known = [value for value in values if value is not None]
    digits = 2 if any(value < 0.01 for value in known) else 1
    return [UNKNOWN if first is None or value is None else signed(value - first, digits) for value in values]


def _charts(runs: Sequence[RunRecord], titles: Sequence[str]) -> dict[str, Any]:
    evaluated = any(run.evaluations for run in runs)
    logged = any(run.steps for run in runs)
    with_tau = [i for i, run in enumerate(runs) if len(run.series("tau/image_mean")[0])]
    own = [(title, run) for title, run in zip(titles, runs, strict=True) if run.has_own_temperatures]
    return {
        "quality_chart": plots.quality_chart(runs, titles) if evaluated else "",
        "training_chart": plots.training_chart(runs, titles) if logged else "",
        "temperature_chart": (
            plots.temperature_chart([runs[i] for i in with_tau], [titles[i] for i in with_tau]) if with_tau else ""
        ),
        "ridges": [(title, plots.ridge_chart(run.temperatures)) for title, run in own],
    }


def _galleries(runs: Sequence[RunRecord], titles: Sequence[str], models: Sequence[Run | None]) -> list[dict[str, Any]]:
    """Return a gallery for each run whose τ differ, or the reason why its training data cannot be read."""
    galleries: list[dict[str, Any]] = []
    for run, title, model in zip(runs, titles, models, strict=True):
        if model is None or not run.has_own_temperatures:
            continue
        try:
            gallery = examples.temperature_gallery(model, run.config.eval.batch)
        except UserError as error:
            galleries.append({"title": title, "missing": str(error)})
            continue
        if gallery is None:
            continue
        ranks = [np.argsort(np.argsort(tau, kind="stable")) for tau in (gallery.image_tau, gallery.text_tau)]
        galleries.append(
            {
                "title": title,
                "missing": "",
                "robust": getattr(model.loss, "robust", False),
                "network": OBJECTIVES[run.config.loss.name].temperature == "network",
                "extremes": gallery.extremes,
                "embedded": len(gallery.image_tau),
                "total": gallery.total,
                "quantiles": {
                    "image": np.quantile(gallery.image_tau, [0, 0.05, 0.5, 0.95, 1]).tolist(),
                    "text": np.quantile(gallery.text_tau, [0, 0.05, 0.5, 0.95, 1]).tolist(),
                },
                "correlation": float(np.asarray(np.corrcoef(ranks))[0, 1]),
                "scatter": plots.scatter_chart(gallery.image_tau, gallery.text_tau),
            }
        )
    return galleries


def _examples(runs: Sequence[RunRecord], titles: Sequence[str], models: Sequence[Run | None]) -> dict[str, Any]:
    """Return zero-shot and retrieval examples on the tasks that all runs with a checkpoint share."""
    opened = [(title, model) for title, model in zip(titles, models, strict=True) if model is not None]
    all_tasks = readers.all_tasks()  # examples need captions and local data
    known = [task for task in tasks_of([run.final for run in runs]) if task in all_tasks and has_data(all_tasks[task])]
    shared = [task for task in known if all(task in model.config.eval.tasks for _, model in opened)]
    if not opened or not shared:
        return {"titles": [], "steps": [], "tasks": [], "accuracy_chart": "", "by_tau": []}
    results = examples.evaluate_models([model for _, model in opened], shared, runs[0].config.eval.batch)
    by_tau = []
    for task in shared:
        for (title, model), result in zip(opened, results, strict=True):
            if sides := examples.accuracy_bins(model, result[task]):
                by_tau.append((f"{task_title(task)}: {title}", sides, result[task].chance.get("acc1", 0.0)))
    tasks = []
    for task in shared:
        of_task = [result[task] for result in results]
        tasks.append(
            {
                "title": task_title(task),
                "classes": len(of_task[0].class_names),
                "zero_shot": examples.zero_shot_examples(of_task, task, per_group=3),
                "to_image": examples.retrieval_examples(of_task, task, to_text=False, per_group=3),
                "to_text": examples.retrieval_examples(of_task, task, to_text=True, per_group=3),
            }
        )
    return {
        "titles": [title for title, _ in opened],
        "colours": [plots.page_colour(titles.index(title)) for title, _ in opened],
        "steps": [model.step for _, model in opened],
        "tasks": tasks,
        "accuracy_chart": plots.accuracy_chart(by_tau) if by_tau else "",
        "by_tau": by_tau,
    }


def _provenance(runs: Sequence[RunRecord]) -> list[tuple[str, list[str]]]:
    """Return what is needed to repeat the runs: (name, a value for each run)."""
    facts = [run.facts for run in runs]
    rows = {
        "objective": [str(fact["objective"]["formula"]) for fact in facts],
        "towers": [run.config.model.name for run in runs],
        "start": [run.config.model.pretrained or "random weights" for run in runs],
        "parameters": [f"{fact['parameters']:,}" if "parameters" in fact else UNKNOWN for fact in facts],
        "training data": [run.config.data.about for run in runs],
        "global batch": [f"{run.config.data.global_batch:,}" for run in runs],
        "seed": [str(run.config.train.seed) for run in runs],
        "steps": [f"{run.steps[-1]['step']:,}" if run.steps else "0" for run in runs],
        "samples/s (median)": [_median(run, "samples_per_second", "{:,.0f}") for run in runs],
        "duration": [_duration(fact) for fact in facts],
        "command": [str(fact.get("command") or UNKNOWN) for fact in facts],
    }
    return list((rows | provenance_rows(facts)).items())


def _median(run: RunRecord, key: str, form: str) -> str:
    values = run.series(key)[1]
    return form.format(median(values)) if len(values) else UNKNOWN


def _duration(facts: dict[str, Any]) -> str:
    """Return the time from the first start to the end, pauses included."""
    if "started" not in facts or "finished" not in facts:
        return UNKNOWN
    seconds = (datetime.fromisoformat(facts["finished"]) - datetime.fromisoformat(facts["started"])).total_seconds()
    return f"{seconds / 60:.1f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
