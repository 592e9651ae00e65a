"""Signals that stop a run after a checkpoint."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterable, Mapping
from types import FrameType, MappingProxyType
from typing import Any

from disttempnet import distributed
from disttempnet.errors import TERMINATED, Preempted

STOPPING = {
    signal.SIGINT: TERMINATED,
    signal.SIGTERM: TERMINATED,
    signal.SIGHUP: TERMINATED,
    signal.SIGUSR1: Preempted.code,
}
LONGEST_WAIT = 10.0  # seconds of training until all ranks know of a signal to one


def stop_signals(wanted: Iterable[signal.Signals]) -> list[signal.Signals]:
    """Return the signals to handle: all but SIGHUP if nohup has it ignored."""
    return [one for one in wanted if one != signal.SIGHUP or signal.getsignal(one) != signal.SIG_IGN]


class Terminal:
    """Standard output and error, if they are a terminal.

    A closed terminal (SIGHUP) refuses all output, which would end the run before it has saved.
    """

    def __init__(self) -> None:
        self._streams = [stream for stream in (1, 2) if os.isatty(stream)]

    def leave_if_closed(self) -> None:
        """Send output to /dev/null if the terminal was closed."""
        for stream in self._streams:
            if not os.isatty(stream):
                null = os.open(os.devnull, os.O_WRONLY)
                os.dup2(null, stream)
                os.close(null)


class StopSignal:
    """Handler of SIGTERM, SIGINT, SIGHUP and SIGUSR1, which stop a run after a checkpoint.

    A second SIGINT interrupts at once. A rank that ends by an exception keeps these handlers: its process ends soon.

    Args:
        codes: signal → exit code.

    Attributes:
        code: exit code of the signal that was received; 0 = continue.
    """

    def __init__(self, codes: Mapping[signal.Signals, int] = MappingProxyType(STOPPING)) -> None:
        self.code = 0
        self._codes = codes
        self._before: dict[signal.Signals, Any] = {}
        self._terminal = Terminal()

    def __enter__(self) -> StopSignal:
        for number in stop_signals(self._codes):
            self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None and kind is not Preempted and distributed.world_size() > 1:
            return  # torchrun sends SIGTERM to all when one rank is gone: this one has yet to report which
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGHUP:
            self._terminal.leave_if_closed()
        if self.code and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.code = max(self.code, self._codes[signal.Signals(number)])
