"""The progress of a grid: one bar for all runs and one for each running one."""

from __future__ import annotations

import time
from collections.abc import Mapping

from rich.progress import TaskID

from disttempnet.io.progress import ProgressDisplay, clock


class GridDisplay(ProgressDisplay):
    """Bars of all runs and of each running one, with step, samples/s, loss and ETA.

    Args:
        total: runs of the grid.
        done: runs that were finished before this call.
    """

    def __init__(self, total: int, done: int) -> None:
        super().__init__()
        self._total, self._done, self._to_do = total, done, total - done
        self._share: dict[str, float] = {}  # done share of each run of this call
        self._before: dict[str, float] = {}  # the part of it that earlier calls did
        self._state: dict[str, str] = {}  # text of each running one
        self._bars: dict[str, TaskID] = {}
        self._all = self.add("all runs", total, done)
        self._begun = time.monotonic()

    def began(self, name: str) -> None:
        """Add the bar of a run."""
        self._share[name], self._state[name] = 0.0, "starting"
        self._bars[name] = self.add(name, text="starting")

    def progress(self, name: str, step: int, steps: int, metrics: Mapping[str, float]) -> None:
        """Show a logged step of a run."""
        self._share[name] = step / steps
        self._before.setdefault(name, step / steps)
        state = f"{step}/{steps}"
        if metrics:
            state += f"  {metrics['samples_per_second']:.0f} samples/s  loss {metrics['loss']:.4f}"
        self._state[name] = state
        self.update(self._bars[name], step, state, total=steps)
        self._update_all()

    def ended(self, name: str, outcome: str, reason: str, seconds: float) -> None:
        """Remove the bar of a run and print its outcome.

        The rest of a failed run is no work left, and it does not count for the speed.
        """
        self._state.pop(name)
        self.remove(self._bars.pop(name))
        if outcome != "stopped":
            if outcome == "failed":
                share = self._share[name]
                self._before[name] = 1.0 - (share - self._before.get(name, share))
            self._share[name] = 1.0
            self._done += outcome == "finished"
        text = {"finished": f"finished in {clock(seconds)}", "failed": f"FAILED: {reason}"}.get(outcome, "stopped")
        self.say(f"{name}  {text}  ({self._done}/{self._total} runs)")
        self._update_all()

    def tick(self) -> None:
        """Print a plain line if one is due. Called at least twice a second."""
        self.plain_line(self._line())

    def _line(self) -> str:
        running = "  ".join(f"{name} {state}" for name, state in self._state.items())
        return f"{self._overall()}  {running}"

    def _update_all(self) -> None:
        done = self._total - self._to_do + sum(self._share.values())
        self.update(self._all, done, self._overall())

    def _overall(self) -> str:
        """Return the number of finished runs, and the ETA at the speed of this call; all runs count the same."""
        text = f"{self._done}/{self._total} runs"
        # run by run: exactly 0 as long as no run is further than it was; a difference of two sums may be 4e-16
        here = sum(share - self._before.get(name, 0.0) for name, share in self._share.items())
        if here <= 0:
            return text
        left = self._to_do - sum(self._share.values())
        return f"{text}  ETA {clock((time.monotonic() - self._begun) / here * left)}"
