"""Sinks of `disttempnet evaluate`: a folder of results that a second command completes, or one JSON file."""

from __future__ import annotations

import traceback
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch

from disttempnet import distributed
from disttempnet.errors import Preempted, UserError
from disttempnet.evaluation.datasets.open import has_data, load_task, sizes_of, where_to_get
from disttempnet.evaluation.evaluator import TaskOutcome, load_tasks, reported_scores
from disttempnet.evaluation.progress import EvaluationProgress
from disttempnet.evaluation.results.averages import counted_tags
from disttempnet.evaluation.results.file import finished_results, refuse_other, write_results
from disttempnet.evaluation.results.records import MAIN, RESULTS_FILE, TaskRecord, append_record, read_records
from disttempnet.evaluation.results.summary import SUMMARY_FILE, Subject, read_subject, write_summary
from disttempnet.evaluation.results.tables import records_table, results_table
from disttempnet.evaluation.scores import Scores
from disttempnet.evaluation.tasks import Task, TaskData, all_tasks
from disttempnet.io.files import is_device
from disttempnet.terminal import console, say

SAMPLES_SHOWN = 5  # unreadable samples that an error line names
SAME_IN_A_FOLDER = ("checkpoint", "precision", "compat")  # attributes of a Subject that all results of a folder share


class ResultsOutput(ABC):
    """Sink that shows progress, stops where it is told to, and prints what it holds at the end.

    Call on every rank, in this order: `claim` (rank 0 alone), `unfinished`, then as a sink inside a `with`, `show`
    (rank 0 alone).

    Args:
        subject: what is evaluated.
        device: of the evaluation.
        batch: images of a batch on each rank, for the rate that is shown.
        stopped: asked after every batch; where it is true on any rank, all end, and the task is not kept.

    Attributes:
        failed: whether a task failed, or was not seen as a whole.
        keeps: whether the same command goes on after a stop.
        line: made by `unfinished`.
    """

    keeps = True
    after_stop = "stopped: the same command goes on with the task that was cut off"
    line: EvaluationProgress

    def __init__(
        self, subject: Subject, device: torch.device, batch: int = 256, stopped: Callable[[], object] = bool
    ) -> None:
        self.subject, self.device, self.batch, self.stopped = subject, device, batch, stopped
        self.failed = False

    @abstractmethod
    def claim(self) -> None:
        """Raise UserError where results cannot be written, or are of something else."""

    @abstractmethod
    def unfinished(self) -> list[Task]:
        """Return the tasks that are to be evaluated."""

    @abstractmethod
    def load(self, task: Task) -> TaskData:
        """Read the data of one of them."""

    @abstractmethod
    def add(self, outcome: TaskOutcome) -> None:
        """Keep a task's result. Raises Preempted where any rank was told to stop."""

    @abstractmethod
    def show(self, title: str) -> None:
        """Print the results under the name of the model, and write what is not written yet."""

    def __enter__(self) -> ResultsOutput:
        self.line.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        self.line.__exit__()

    def begin(self, task: Task) -> None:
        self.line.begin(task)

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Take the line away inside, where another progress is shown."""
        self.line.stop()
        try:
            yield
        finally:
            self.line.start()

    def progress(self, what: str, done: int, of: int) -> None:
        """Show a batch more. Raises Preempted where this rank was told to stop: here no rank waits for it in vain."""
        self.line.advance(what, done, of)
        if self.stopped():
            raise Preempted("told to stop")

    def told_to_stop(self) -> bool:
        """Return whether any rank was; every rank calls this."""
        return bool(distributed.largest(int(bool(self.stopped())), self.device))


class ResultsFolder(ResultsOutput):
    """FOLDER/eval_results.jsonl, a line a finished task, and FOLDER/summary.json.

    Each task is evaluated once: the same command goes on where it was stopped. What fails or is missing ends nothing.

    Args:
        folder: made if it is not there.
        root: the data root.
        tasks: those that are wanted; what is not below the root is reported.
        subject: its `compat` is as for `load_task`.
    """

    def __init__(
        self,
        folder: Path,
        root: Path,
        tasks: Sequence[Task],
        subject: Subject,
        device: torch.device,
        batch: int = 256,
        stopped: Callable[[], object] = bool,
    ) -> None:
        super().__init__(subject, device, batch, stopped)
        self.folder, self.root, self.tasks = folder, root, tasks
        self.done: dict[str, TaskRecord] = {}

    def claim(self) -> None:
        before, records = read_subject(self.folder), read_records(self.folder / RESULTS_FILE)
        if before is None and records:
            raise UserError(
                f"{self.folder}: holds results, but no {SUMMARY_FILE} that says of what: give another --out"
            )
        for key in SAME_IN_A_FOLDER if before is not None else ():
            was, now = getattr(before, key), getattr(self.subject, key)
            if was != now:
                what = f"results of another {key} ({was or 'none'}; now {now or 'none'})"
                raise UserError(f"{self.folder}: holds {what}: give --out")
        write_summary(self.folder, self.subject, records, counted_tags())

    def unfinished(self) -> list[Task]:
        """Return the tasks that are there and not finished, the longest first; every rank calls this.

        A task that failed, or lacked samples, is evaluated again: its data may be complete by now. So is one that was
        measured on another number of samples, of a data root that held a part.
        """
        # Rank 0's files decide: other ranks may see them later.
        found = distributed.gather_objects(self._records() if distributed.is_main() else {})[0]
        sizes = distributed.together(lambda: sizes_of(self.root))
        expected = {task.name: sizes.get(task.name, task.size) for task in self.tasks}
        self.done = {
            key: record for key, record in found.items() if record.whole and (record.expected or 0) == expected.get(key)
        }
        present = distributed.gather_objects([task for task in self.tasks if has_data(task, self.root)])[0]
        finished = {task.name: _counted(self.done[task.name]) for task in present if task.name in self.done}
        self.line = EvaluationProgress(present, finished, self.batch)
        return sorted((task for task in present if task.name not in self.done), key=lambda task: -task.seconds)

    def load(self, task: Task) -> TaskData:
        return load_task(task, self.root, self.subject.compat)

    def add(self, outcome: TaskOutcome) -> None:
        record = record_of(outcome)
        if outcome.error is not None and not _is_expected(outcome.error):
            traceback.print_exception(outcome.error)  # a fault of the program
        stop = self.told_to_stop()
        if not (stop and record.error):
            path = self.folder / RESULTS_FILE
            distributed.together(lambda: append_record(path, record) if distributed.is_main() else None)
            value = "–" if record.value is None else f"{100 * record.value:.2f}"
            result = record.error or f"{record.main_metric_name or 'done'} {value}"
            self.line.finish(outcome.task, _counted(record), result)
            self.done[record.key] = record
            self.failed |= bool(record.error)
        if stop:
            raise Preempted

    def __exit__(self, *_: object) -> None:
        super().__exit__()
        if distributed.is_main():  # a summary of what there is, after Ctrl-C too
            write_summary(self.folder, self.subject, self._records(), counted_tags())

    def show(self, title: str) -> None:
        """Print the table of all tasks in the folder, the averages, and where to get what is missing."""
        places = {key: place for place, key in enumerate(all_tasks())}
        found = self._records()
        by_key = {key: found[key] for key in sorted(found, key=lambda key: places.get(key, len(places)))}
        console().print(records_table(title, by_key, counted_tags()))
        for task in self.tasks:
            if task.name not in by_key:
                say(f"missing: {task.display} ({where_to_get(task, self.root)})")
        _print_notes(self.subject)
        say(f"results: {self.folder / RESULTS_FILE}")

    def _records(self) -> dict[str, TaskRecord]:
        return read_records(self.folder / RESULTS_FILE)


class ResultsFile(ResultsOutput):
    """One JSON file with the scores of a few tasks, beside those of other tasks that it has. An error ends the command.

    After a stop or an error the same command goes on: until all tasks are finished, the file names those that are left.

    Args:
        path: None = only print the table.
        tasks: names or data, in the order of the table; called on every rank.
        data_root: where the data of tasks lies that does not ship with the package.
    """

    def __init__(
        self,
        path: Path | None,
        tasks: Callable[[], Sequence[str | TaskData]],
        data_root: Path | None,
        subject: Subject,
        device: torch.device,
        batch: int = 256,
        stopped: Callable[[], object] = bool,
    ) -> None:
        super().__init__(subject, device, batch, stopped)
        self.path, self.data_root, self._tasks = path, data_root, tasks
        self.keeps = path is not None and not is_device(path)
        if not self.keeps:
            self.after_stop = "stopped: nothing is kept; with --out FILE the same command would go on"
        self.results: dict[str, Scores] = {}
        self._data: dict[Task, TaskData] = {}

    def claim(self) -> None:
        if self.path is not None:
            refuse_other(self.path, self.subject)

    def unfinished(self) -> list[Task]:
        self._data = {data.task: data for data in load_tasks(self._tasks(), self.data_root)}
        # Rank 0's file decides: other ranks may see it later.
        kept = finished_results(self.path, self.subject) if self.path and self.keeps and distributed.is_main() else {}
        found = distributed.gather_objects(kept)[0]
        self.results = {task.name: found[task.name] for task in self._data if task.name in found}
        if self.results and distributed.is_main():
            say(f"{self.path}: {', '.join(self.results)} finished before the stop: goes on with the others")
        self.failed = not all(scores.complete for scores in self.results.values())
        self.line = EvaluationProgress(list(self._data), dict.fromkeys(self.results), self.batch, lines=False)
        return self._left()

    def _left(self) -> list[Task]:
        return [task for task in self._data if task.name not in self.results]

    def load(self, task: Task) -> TaskData:
        return self._data[task]

    def add(self, outcome: TaskOutcome) -> None:
        stop = self.told_to_stop()
        if outcome.error is None:
            self._keep(outcome)
        elif not stop:
            raise outcome.error
        if stop and self._left():
            raise Preempted

    def _keep(self, outcome: TaskOutcome) -> None:
        scores = self.results[outcome.task.name] = reported_scores(outcome)
        self.line.finish(outcome.task, None, "done")
        self.failed |= not scores.complete
        left = [task.name for task in self._left()]
        if left and self.keeps:
            distributed.together(lambda: self._write(left) if distributed.is_main() else None)

    def _write(self, left: Sequence[str] = ()) -> None:
        assert self.path is not None
        in_order = {task.name: self.results[task.name] for task in self._data if task.name in self.results}
        write_results(self.path, self.subject, in_order, left)

    def show(self, title: str) -> None:
        """Print the table, and write the file."""
        console().print(results_table({title: {task.name: self.results[task.name] for task in self._data}}))
        _print_notes(self.subject)
        if self.path is not None:
            self._write()
            say(f"results: {self.path}")


def record_of(outcome: TaskOutcome) -> TaskRecord:
    """Return a task's result as a line of eval_results.jsonl; what it lacks is said in `error`."""
    if outcome.error is not None:
        return record_of_error(outcome.task, outcome.error, outcome.task.main, outcome.seconds)
    assert outcome.data is not None
    assert outcome.scored is not None
    data, task, scores = outcome.data, outcome.data.task, outcome.scored.scores

    # What was not seen: unreadable samples by name and reason, and another number than the task has.
    unreadable = [f"{key}: {why}" for key, why in zip(scores.corrupt, outcome.scored.reasons, strict=True)]
    unreadable += data.broken
    wrong = []
    if unreadable:
        more = f" and {len(unreadable) - SAMPLES_SHOWN:,} more" if len(unreadable) > SAMPLES_SHOWN else ""
        wrong.append(f"{len(unreadable):,} unreadable: {'; '.join(unreadable[:SAMPLES_SHOWN])}{more}")
    if data.size and scores.samples != data.size:
        wrong.append(f"{scores.samples:,} samples of {data.size:,} were seen")

    # Metrics as DataComp's scripts read them: all of them, or those that the task's row names; the main one again.
    known = {**scores.metrics, **dict.fromkeys(scores.undefined)}
    main = task.main or (task.metrics[0] if task.metrics else "")
    metrics = {name: known[name] for name in task.metrics or known}
    metrics[MAIN] = metrics[main] if main else None
    return TaskRecord(
        key=task.name,
        dataset=task.display,
        metrics=metrics,
        main_metric_name=main,
        samples=scores.samples,
        expected=data.size or None,
        corrupt=tuple(unreadable),
        seconds=outcome.seconds,
        complete=not wrong,
        error=". ".join(wrong),
        notes=data.notes,
        standard_errors={name: error for name, error in scores.errors.items() if name in metrics},
    )


def record_of_error(task: Task, error: Exception, main: str, seconds: float) -> TaskRecord:
    """Return the record of a task that an error ended; `main` names the metric that it would have had."""
    text = str(error) if _is_expected(error) else f"{type(error).__name__}: {error}"
    return TaskRecord(
        task.name,
        task.display,
        main_metric_name=main,
        expected=task.size or None,
        seconds=seconds,
        complete=False,
        error=" ".join(text.split()),
    )


def _is_expected(error: Exception) -> bool:
    """Return whether an error is said in its own words; any other is a fault of the program."""
    return isinstance(error, UserError | Preempted | distributed.OtherRankFailed)


def _counted(record: TaskRecord) -> float | None:
    """Return the main metric of a task that counts for an average."""
    return record.value if record.counts else None


def _print_notes(subject: Subject) -> None:
    for note in subject.notes:
        say(f"note: {note}")
