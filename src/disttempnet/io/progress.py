"""How far a long command is: a bar with rate and ETA, or a line from time to time where there is no terminal."""

from __future__ import annotations

import time
from collections.abc import Callable
from datetime import timedelta

from rich.filesize import decimal
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from disttempnet.terminal import console

PLAIN_LINE_SECONDS = 15.0


class Meter:
    """Counts on standard error, inside a `with`.

    Args:
        what: what is being done.
        total: how many there are to do.
        done: how many of them were done before; they do not count for the rate.
        active: whether to show anything.
        sizes: the counts are bytes.
    """

    def __init__(self, what: str, total: int, done: int = 0, active: bool = True, sizes: bool = False) -> None:
        self.what, self.total, self.done, self._before = what, total, done, done
        self._text: Callable[[int], str] = decimal if sizes else "{:,}".format
        self.console = console(stderr=True, quiet=not active)
        self._bar = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            TextColumn("{task.fields[count]}"),
            TextColumn("{task.fields[rate]}"),
            TextColumn("ETA"),
            TimeRemainingColumn(),
            console=self.console,
            disable=not active or not self.console.is_terminal,
        )
        self._task = self._bar.add_task(what, total=total, completed=done, count=self._count, rate="")

    def __enter__(self) -> Meter:
        self._begun = self._told = time.monotonic()
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def advance(self, count: int = 1) -> None:
        """So many more are done."""
        self.done += count
        now = time.monotonic()
        rate = (self.done - self._before) / max(now - self._begun, 1e-9)
        shown = f"{self._text(round(rate))}/s"
        self._bar.update(self._task, completed=self.done, count=self._count, rate=shown)
        if not self.console.is_terminal and now - self._told > PLAIN_LINE_SECONDS:
            self._told = now
            eta = timedelta(seconds=round((self.total - self.done) / max(rate, 1e-9)))
            self.console.print(f"{self.what}  {self._count}  {shown}  ETA {eta}")

    @property
    def _count(self) -> str:
        return f"{self._text(self.done)}/{self._text(self.total)}"
