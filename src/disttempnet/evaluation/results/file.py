"""results.json: scores of one checkpoint on tasks without a data root. A second command adds its tasks to them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from disttempnet.errors import UserError
from disttempnet.evaluation.results.summary import Subject
from disttempnet.evaluation.scores import Scores, from_record, to_record
from disttempnet.io.files import is_device, read_regular, refuse_unwritable, write_output

RESULTS = "results.json"
UNFINISHED = "unfinished"  # key of the tasks that are left while a command is at work


def refuse_other(path: Path, subject: Subject) -> None:
    """Raise UserError where a file cannot be written, or holds anything but results of this checkpoint."""
    refuse_unwritable(path)
    if _holds(path) and _known(path, subject) is None:
        raise UserError(f"{path}: holds {_of_what(path)}: give another --out, or delete it")


def default_place(run: Path, name: str, step: str, subject: Subject) -> Path:
    """Return the default file of a run's results.

    RUN/results.json; RUN/results-STEP.json where that is of another checkpoint; evaluation/NAME-STEP.json where the run
    cannot be written to, such as a colleague's.

    Raises:
        UserError: none of them can be written, or is of this checkpoint.
    """
    places = [run / RESULTS, run / f"results-{step}.json"]
    try:
        refuse_unwritable(places[0])
    except UserError:
        places = [Path("evaluation") / f"{name}-{step}.json"]
    for place in places[:-1]:
        if not place.is_file() or _known(place, subject) is not None:
            return place
    refuse_other(places[-1], subject)
    return places[-1]


def write_results(path: Path, subject: Subject, results: Mapping[str, Scores], left: Sequence[str] = ()) -> None:
    """Write scores, beside those of other tasks that the file has.

    Args:
        path: of the file.
        subject: what was evaluated.
        results: scores by task.
        left: tasks that the command has not finished; see `finished_results`.

    Raises:
        UserError: it cannot be written.
    """
    known = _known(path, subject) if _holds(path) else None
    head: dict[str, Any] = {"model": subject.title, "checkpoint": subject.checkpoint, "notes": list(subject.notes)}
    if left:
        head[UNFINISHED] = list(left)
    write_output(path, json.dumps({**head, **to_record({**(known or {}), **results})}, indent=2) + "\n")


def finished_results(path: Path, subject: Subject) -> dict[str, Scores]:
    """Return what a command that did not reach its end has finished, with all samples seen; else nothing."""
    left = _read(path).get(UNFINISHED) if _holds(path) else None
    if not isinstance(left, list):
        return {}
    known = _known(path, subject) or {}
    return {task: scores for task, scores in known.items() if scores.complete and task not in left}


def _holds(path: Path) -> bool:
    """Return whether there is a file that results would be added to; /dev/stdout is none, wherever it leads."""
    return path.is_file() and not is_device(path)


def _known(path: Path, subject: Subject) -> dict[str, Scores] | None:
    """Return scores of the same checkpoint; None where the file holds something else. Old files without a hash are
    distinguished by their titles."""
    table = _read(path)
    same = table.get("checkpoint", subject.checkpoint) == subject.checkpoint and table.get("model") == subject.title
    try:
        return from_record(table) if same else None
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError):
        return None


def _read(path: Path) -> dict[str, Any]:
    try:
        table = json.loads(read_regular(path).decode("utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return table if isinstance(table, dict) else {}


def _of_what(path: Path) -> str:
    table = _read(path)
    if not {"model", "results"} <= table.keys():
        return "something other than results of an evaluation"
    return f"the results of {table['model']}" + (", of other weights" if "checkpoint" in table else "")
