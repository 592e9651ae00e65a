"""One line about an evaluation over many tasks: which task, images a second, time left, the average so far."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence

from disttempnet import distributed
from disttempnet.evaluation.tasks import Task
from disttempnet.io.progress import ProgressDisplay, clock


class EvaluationProgress(ProgressDisplay):
    """Live line in a terminal and, if wanted, a line a finished task; on rank 0, inside a `with`.

    Args:
        tasks: all of them, finished ones too.
        finished: main metrics of tasks that are finished already, by name; None where a task has none that counts.
        batch: images of a batch, on each rank.
        lines: print a line for each finished task.
    """

    def __init__(
        self, tasks: Sequence[Task], finished: Mapping[str, float | None], batch: int, lines: bool = True
    ) -> None:
        super().__init__(active=distributed.is_main(), stderr=False, transient=True)
        self.values = dict(finished)
        self._lines = lines
        self._total = len(tasks)
        self._averaged = sum(bool(task.main) for task in tasks)
        self._cost = {task.name: task.seconds or 1.0 for task in tasks}
        self._to_do = sum(cost for name, cost in self._cost.items() if name not in finished)
        self._done, self._begun, self._images = 0.0, time.monotonic(), 0.0
        self._batch = batch * distributed.world_size()
        self._task: Task | None = None
        self._rate = ""
        self._bar = self.add("", total=1.0)

    def begin(self, task: Task) -> None:
        """Show the task that is at work now."""
        self._task, self._images, self._rate = task, 0.0, ""
        self._show(0.0)

    def advance(self, what: str, done: int, of: int) -> None:
        """Count a batch more of `what`, a task's images or its texts."""
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

    def finish(self, task: Task, value: float | None, result: str) -> None:
        """Count a task as finished: its main metric if it counts for the average, and its result in words."""
        self.values[task.name] = value
        self._done += self._cost[task.name]
        if self._lines:
            how = "  ".join(filter(None, [self._rate, self._ahead(0.0)]))
            self.say(f"{len(self.values)}/{self._total}  {task.display}: {result}  ({how})")

    def _show(self, part: float) -> None:
        if self._task is None:
            return
        name = f"{min(len(self.values) + 1, self._total)}/{self._total} {self._task.display}"
        self.update(self._bar, part, f"{self._rate}  {self._ahead(part)}", name=name)

    def _ahead(self, part: float) -> str:
        """Return the time left and the average so far; `part` of the task at work is done."""
        cost = self._done + (part * self._cost[self._task.name] if self._task else 0.0)
        words = []
        if cost:
            seconds = (time.monotonic() - self._begun) / cost * max(0.0, self._to_do - cost)
            words.append(f"ETA {clock(seconds)}")
        counted = [value for value in self.values.values() if value is not None]
        if counted:
            words.append(f"average of {len(counted)}/{self._averaged} {100 * sum(counted) / len(counted):.2f}")
        return "  ".join(words)
