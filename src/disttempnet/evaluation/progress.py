"""One line about an evaluation over many tasks: which task, images a second, time left, the average so far."""

from __future__ import annotations

import datetime
import time
from collections.abc import Sequence

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from disttempnet import distributed
from disttempnet.evaluation.results.records import TaskRecord
from disttempnet.evaluation.tasks import Task, task_title
from disttempnet.terminal import console


class SuiteProgress:
    """Follows a suite on rank 0: a live line in a terminal, else a line a finished task.

    Args:
        tasks: those that are there, finished ones too.
        finished: records of an earlier start.
        batch: images of a batch, on each rank.
    """

    def __init__(self, tasks: Sequence[Task], finished: Sequence[TaskRecord], batch: int) -> None:
        self.console = console()
        self.records = list(finished)
        self._total = len(tasks)
        self._averaged = sum(bool(task.main) for task in tasks)
        self._cost = {task.name: task.seconds or 1.0 for task in tasks}
        self._to_do = sum(self._cost.values()) - sum(self._cost.get(record.key, 0.0) for record in finished)
        self._done, self._begun, self._images = 0.0, time.monotonic(), 0.0
        self._batch = batch * distributed.world_size()
        self._task: Task | None = None
        self._rate = ""
        columns = (TextColumn("{task.description}", markup=False), BarColumn(20), TextColumn("{task.fields[state]}"))
        self._line = Progress(
            *columns, console=self.console, transient=True, disable=not distributed.is_main() or not self.shows
        )
        self._bar = self._line.add_task("", state="", total=1.0)

    @property
    def shows(self) -> bool:
        """Whether a live line can be shown."""
        return self.console.is_terminal

    def __enter__(self) -> SuiteProgress:
        self._line.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._line.stop()

    def begin(self, task: Task) -> None:
        self._task, self._images, self._rate = task, 0.0, ""
        self._show(0.0)

    def progress(self, what: str, done: int, of: int) -> None:
        """A batch more of `what`, a task's images or its texts."""
        now = time.monotonic()
        if what == "texts":
            self._rate = f"texts {done}/{of}"
            self._show(0.0)
            return
        if done == 1:
            self._images, self._rate = now, ""
        elif now > self._images:
            self._rate = f"{(done - 1) * self._batch / (now - self._images):,.0f} images/s"
        self._show(done / of)

    def finish(self, record: TaskRecord) -> None:
        self.records.append(record)
        self._done += self._cost[record.key]
        if distributed.is_main():
            value = "–" if record.value is None else f"{100 * record.value:.2f}"
            what = record.error or f"{record.main_metric_name or 'done'} {value}"
            place = f"{len(self.records)}/{self._total}"
            how = "  ".join(filter(None, [self._rate, self._ahead(0.0)]))
            self.console.print(f"{place}  {record.dataset}: {what}  ({how})", soft_wrap=True)

    def _show(self, part: float) -> None:
        if self._task is None:
            return
        name = f"{min(len(self.records) + 1, self._total)}/{self._total} {self._task.display}"
        self._line.update(self._bar, description=name, completed=part, state=f"{self._rate}  {self._ahead(part)}")

    def _ahead(self, part: float) -> str:
        """Time left, and the average so far."""
        cost = self._done + (part * self._cost[self._task.name] if self._task else 0.0)
        words = []
        if cost:
            seconds = (time.monotonic() - self._begun) / cost * max(0.0, self._to_do - cost)
            words.append(f"ETA {datetime.timedelta(seconds=round(seconds))}")
        counted = [record.value for record in self.records if record.counts and record.value is not None]
        if counted:
            words.append(f"average of {len(counted)}/{self._averaged} {100 * sum(counted) / len(counted):.2f}")
        return "  ".join(words)


class TaskProgress:
    """Follows an evaluation of a few tasks on rank 0: a live line in a terminal, else nothing."""

    def __init__(self) -> None:
        where = console()
        columns = (
            TextColumn("{task.description}", markup=False),
            BarColumn(20),
            MofNCompleteColumn(),
            TextColumn("batches"),
        )
        hidden = not distributed.is_main() or not where.is_terminal
        self._line = Progress(*columns, console=where, transient=True, disable=hidden)
        self._bar = self._line.add_task("", total=1)

    def __enter__(self) -> TaskProgress:
        self._line.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._line.stop()

    def __call__(self, what: str, done: int, of: int) -> None:
        """A batch more of `what`, a task's images or the texts of all."""
        self._line.update(self._bar, description=task_title(what), completed=done, total=of)
