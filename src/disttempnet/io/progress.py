"""The progress display of all commands: bars in a terminal, elsewhere a plain line from time to time."""

from __future__ import annotations

import time
from collections.abc import Callable
from datetime import timedelta
from typing import Self

from rich.filesize import decimal
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from disttempnet.terminal import console

PLAIN_LINE_SECONDS = 15.0  # between plain lines


def clock(seconds: float) -> str:
    """Return a duration as hours:minutes:seconds."""
    return str(timedelta(seconds=round(seconds)))


class ProgressDisplay:
    """Bars with text beside them, inside a `with`. Nothing is drawn where the output is no terminal.

    Args:
        active: show anything; False on every rank but the main one.
        stderr: write to standard error, else to standard output.
        elapsed: show the time since the start beside each bar.
        transient: remove the bars at the end.

    Example:
        >>> with ProgressDisplay() as display:
        ...     bar = display.add("reading", total=2)
        ...     display.update(bar, 1, "1/2")
    """

    def __init__(
        self, *, active: bool = True, stderr: bool = True, elapsed: bool = False, transient: bool = False
    ) -> None:
        self.console = console(stderr=stderr, quiet=not active)
        # FORCE_COLOR asks for colours (Jupyter and CI set it), and bars would fill what is no terminal
        self._terminal = self.console.is_terminal and self.console.file.isatty()
        text = TextColumn("{task.fields[text]}", markup=False)
        columns = [TextColumn("{task.description}", markup=False), BarColumn(), text]
        self.bars = Progress(
            *columns,
            *([TimeElapsedColumn()] if elapsed else []),
            console=self.console,
            transient=transient,
            disable=not active or not self._terminal,
        )
        self._last_line = time.monotonic()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start(self) -> None:
        """Begin to draw; `with` does it."""
        self.bars.start()

    def stop(self) -> None:
        """Leave the terminal as it was; `with` does it."""
        self.bars.stop()

    def add(self, name: str, total: float | None = None, done: float = 0, text: str = "") -> TaskID:
        """Add a bar and return its id; without a total it moves to and fro."""
        return self.bars.add_task(name, total=total, completed=int(done), text=text)

    def update(
        self, bar: TaskID, done: float, text: str, *, name: str | None = None, total: float | None = None
    ) -> None:
        """Set a bar to `done` of its total, and the text beside it."""
        self.bars.update(bar, completed=done, text=text, description=name, total=total)

    def remove(self, bar: TaskID) -> None:
        """Remove a bar."""
        self.bars.remove_task(bar)

    def say(self, text: str) -> None:
        """Print a line above the bars."""
        self.console.print(text, soft_wrap=True)

    def plain_line(self, text: str, due: bool = False) -> None:
        """Print a line in place of the bars: every PLAIN_LINE_SECONDS, or if it is `due`; never in a terminal."""
        now = time.monotonic()
        if not self._terminal and (due or now - self._last_line > PLAIN_LINE_SECONDS):
            self._last_line = now
            self.say(text)


class Meter(ProgressDisplay):
    """One bar on standard error with a count, a rate and an ETA, inside a `with`.

    Args:
        what: name of the work.
        total: number of units; 0 = not known.
        done: units that were done before; they do not count for the rate.
        active: show anything.
        sizes: units are bytes.
        transient: remove the bar at the end.
    """

    def __init__(
        self,
        what: str,
        total: int,
        done: int = 0,
        active: bool = True,
        sizes: bool = False,
        transient: bool = False,
    ) -> None:
        super().__init__(active=active, transient=transient)
        self.what, self.total, self.done, self._before = what, total, done, done
        self._number: Callable[[int], str] = decimal if sizes else "{:,}".format
        self._begun = time.monotonic()
        self._bar = self.add(what, total or None, done, self._count)

    def advance(self, count: int = 1) -> None:
        """Count this many more units as done."""
        self.done += count
        rate = (self.done - self._before) / max(time.monotonic() - self._begun, 1e-9)
        text = f"{self._count}  {self._number(round(rate))}/s"
        if self.total and rate > 0:
            text += f"  ETA {clock(max(self.total - self.done, 0) / rate)}"
        self.update(self._bar, self.done, text)
        self.plain_line(f"{self.what}  {text}")

    @property
    def _count(self) -> str:
        return f"{self._number(self.done)}/{self._number(self.total)}" if self.total else self._number(self.done)
