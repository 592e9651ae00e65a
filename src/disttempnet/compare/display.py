"""One progress display for the whole grid: bars in a terminal, now and then a plain line elsewhere."""

from __future__ import annotations

import datetime
import time
from collections.abc import Mapping

from rich.progress import BarColumn, Progress, TaskID, TextColumn

from disttempnet.terminal import console

PLAIN_LINE_SECONDS = 30.0  # between lines where the output is no terminal


class Display:
    """Runs done of all, every running one with its step, samples/s and loss, and the time that is left.

    Args:
        total: runs of the grid.
        done: runs that were finished before this call.
    """

    def __init__(self, total: int, done: int) -> None:
        self._total, self._done, self._to_do = total, done, total - done
        self._share: dict[str, float] = {}  # of each run of this call, what it has done
        self._before: dict[str, float] = {}  # of that, what was not done by this call
        self._state: dict[str, str] = {}  # running ones
        self._bars: dict[str, TaskID] = {}
        self._console = console(stderr=True)
        self._progress = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            TextColumn("{task.fields[state]}"),
            console=self._console,
            disable=not self._console.is_terminal,
        )
        self._all = self._progress.add_task("all runs", total=total, completed=done, state="")
        self._begun = self._last_line = time.monotonic()

    def __enter__(self) -> Display:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def say(self, text: str) -> None:
        """One line above the bars."""
        self._console.print(text, soft_wrap=True)

    def began(self, name: str) -> None:
        self._share[name], self._state[name] = 0.0, "starting"
        self._bars[name] = self._progress.add_task(name, total=None, state="starting")

    def progress(self, name: str, step: int, steps: int, metrics: Mapping[str, float]) -> None:
        """A run has logged a step."""
        self._share[name] = step / steps
        self._before.setdefault(name, step / steps)
        state = f"{step}/{steps}"
        if metrics:
            state += f"  {metrics['samples_per_second']:.0f} samples/s  loss {metrics['loss']:.4f}"
        self._state[name] = state
        self._progress.update(self._bars[name], total=steps, completed=step, state=state)
        self._update()

    def ended(self, name: str, outcome: str, reason: str, seconds: float) -> None:
        """A run has ended. What a failed one has left is nothing to wait for, nor is it work that took no time."""
        self._state.pop(name)
        self._progress.remove_task(self._bars.pop(name))
        if outcome != "stopped":
            if outcome == "failed":
                share = self._share[name]
                self._before[name] = 1.0 - (share - self._before.get(name, share))
            self._share[name] = 1.0
            self._done += outcome == "finished"
        text = {"finished": f"finished in {_clock(seconds)}", "failed": f"FAILED: {reason}"}.get(outcome, "stopped")
        self.say(f"{name}  {text}  ({self._done}/{self._total} runs)")
        self._update()

    def tick(self) -> None:
        """Called twice a second at least."""
        now = time.monotonic()
        if self._console.is_terminal or now - self._last_line < PLAIN_LINE_SECONDS:
            return
        self._last_line = now
        running = "  ".join(f"{name} {state}" for name, state in self._state.items())
        self.say(f"{self._overall()}  {running}")

    def _update(self) -> None:
        done = self._total - self._to_do + sum(self._share.values())
        self._progress.update(self._all, completed=done, state=self._overall())

    def _overall(self) -> str:
        """Time left: each run counts the same, at the speed that this call has had so far."""
        text = f"{self._done}/{self._total} runs"
        here = sum(self._share.values()) - sum(self._before.values())
        if here <= 0:
            return text
        left = self._to_do - sum(self._share.values())
        return f"{text}  ETA {_clock((time.monotonic() - self._begun) / here * left)}"


def _clock(seconds: float) -> str:
    return str(datetime.timedelta(seconds=round(seconds)))
