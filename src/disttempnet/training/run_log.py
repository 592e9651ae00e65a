"""Logs of a run: progress bar, metrics.jsonl, eval.jsonl."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from disttempnet.data import Skip
from disttempnet.evaluation.scores import Scores, from_record, to_record
from disttempnet.io.files import read_json_lines, write_atomically
from disttempnet.io.progress import ProgressDisplay, clock
from disttempnet.training.trackers import Tracker

Report = Callable[[int, int, Mapping[str, float]], None]
NAMED_SKIPPED = 20  # unreadable samples that are named one by one
WARNING_SHARES = (0.01, 0.1, 0.5)  # of unreadable samples: reported at once, not at the end of an epoch
SLOW_DATA_SHARE = 0.1  # of a step's time spent waiting for data: shown in the progress line


class RunLog:
    """The log of one run, written by rank 0 only; every other rank gets a silent one.

    Args:
        folder: the run folder.
        steps: of the whole run.
        start: step to continue from; later lines of an interrupted run are cut off.
        active: whether this rank writes.
        report: replaces the progress bar and all lines on the console: called with (step, steps, metrics) at the start
            and at each logged step.
        trackers: that get the same numbers; closed with the log.
    """

    def __init__(
        self,
        folder: Path,
        steps: int,
        start: int,
        active: bool,
        report: Report | None = None,
        trackers: Sequence[Tracker] = (),
    ) -> None:
        self.active, self.folder, self.steps, self._report = active, folder, steps, report
        self._trackers = trackers
        self._display = ProgressDisplay(active=active and report is None, elapsed=True)
        if not active:
            return
        for name, check in LOGS.items():
            _cut_after(folder / name, start, check)
        self._metrics = (folder / "metrics.jsonl").open("a", encoding="utf-8")
        self._bar = self._display.add(folder.name, steps, start, f"{start}/{steps}")
        self._display.start()
        self._begun, self._start, self._first = time.monotonic(), start, True
        if report is not None:
            report(start, steps, {})

    def say(self, text: str) -> None:
        """Print a line above the progress bar."""
        if self.active:
            self._display.say(text)

    def step(self, step: int, epoch: float, metrics: Mapping[str, float]) -> None:
        """Append a line to metrics.jsonl, and update the progress."""
        if not self.active:
            return
        line = {"step": step, "epoch": round(epoch, 4), **metrics}
        self._metrics.write(json.dumps(line) + "\n")
        self._metrics.flush()
        for tracker in self._trackers:
            tracker.log(metrics, step)
        if self._report is not None:
            self._report(step, self.steps, metrics)
            return
        seconds_a_step = (time.monotonic() - self._begun) / max(1, step - self._start)
        text = f"{step}/{self.steps}  {_summary(metrics)}  ETA {clock(seconds_a_step * (self.steps - step))}"
        self._display.update(self._bar, step, text)
        self._display.plain_line(f"{self.folder.name}  step {text}", due=self._first or step == self.steps)
        self._first = False

    def evaluation(self, step: int, epoch: float, results: Mapping[str, Scores]) -> None:
        """Append a line to eval.jsonl."""
        if not self.active:
            return
        line = {"step": step, "epoch": round(epoch, 4), **to_record(results)}
        with (self.folder / "eval.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        numbers = {f"{task}/{name}": value for task, one in results.items() for name, value in one.metrics.items()}
        for tracker in self._trackers:
            tracker.log(numbers, step)

    def close(self) -> None:
        if self.active:
            self._display.stop()
            self._metrics.close()
            for tracker in self._trackers:
                tracker.close()


class Skipped:
    """Count of unreadable samples of all ranks since the run began: each counts once, the first are named.

    Args:
        samples: N of the source.
        readable: how many of them an epoch may read.
        found: from a checkpoint, reason → int64 ids. Older checkpoints have numbers of draws in place of ids, which are
            ignored.
    """

    def __init__(self, samples: int, readable: int, found: Mapping[str, Tensor | int] | None = None) -> None:
        self.readable, self.total = readable, 0
        self._reasons: list[str] = []
        self._codes = np.zeros(samples, np.uint8)  # 1 + index of the reason in the list; 0 = readable so far
        for reason, ids in (found or {}).items():
            if isinstance(ids, Tensor):
                self._codes[ids.numpy()] = self._code(reason)
                self.total += len(ids)

    def _code(self, reason: str) -> int:
        if reason not in self._reasons:
            self._reasons.append(reason)
        return min(self._reasons.index(reason) + 1, 255)

    def add(self, skips: Iterable[Skip]) -> Iterator[str]:
        """Count skipped samples by reason, without its details (`reason: detail`).

        Yields a line for each of the first 20, and a summary whenever the share reaches one of WARNING_SHARES.
        """
        for skip in skips:
            if self._codes[skip.id]:
                continue
            self._codes[skip.id] = self._code(skip.reason.partition(":")[0])
            self.total += 1
            if self.total <= NAMED_SKIPPED:
                yield f"skipped {skip.name}: {skip.reason}"
            if self.total > NAMED_SKIPPED and self.total in [
                math.ceil(share * self.readable) for share in WARNING_SHARES
            ]:
                yield self.summary()

    def by_reason(self) -> dict[str, Tensor]:
        """Return reason → int64 ids, for a checkpoint."""
        return {
            reason: torch.from_numpy(np.flatnonzero(self._codes == code))
            for code, reason in enumerate(self._reasons, 1)
        }

    def summary(self) -> str:
        counts = {reason: len(ids) for reason, ids in self.by_reason().items()}
        listed = ", ".join(f"{count:,} {reason}" for reason, count in sorted(counts.items(), key=lambda one: -one[1]))
        share = 100 * self.total / self.readable
        about = f"{self.total:,} of {self.readable:,} samples ({share:.{2 if share < 1 else 1}f} %) unreadable"
        return f"skipped so far: {about}: {listed}"


def _summary(metrics: Mapping[str, float]) -> str:
    parts = [f"{metrics['samples_per_second']:.0f} samples/s", f"loss {metrics['loss']:.4f}"]
    if "tau/image_mean" in metrics:
        parts.append(f"τ {metrics['tau/image_mean']:.4f}/{metrics['tau/text_mean']:.4f}")
    if "gamma" in metrics:
        parts.append(f"γ {metrics['gamma']:.2f}")
    waiting = metrics["data_wait"] / metrics["step_seconds"]
    if waiting > SLOW_DATA_SHARE:
        parts.append(f"waits for data {waiting:.0%}")
    return "  ".join(parts)


def check_step(line: Mapping[str, Any]) -> None:
    """Raise ValueError, TypeError or KeyError unless this is a line of metrics.jsonl: a step, an epoch, numbers."""
    if type(line["step"]) is not int or not _is_number(line["epoch"]):
        raise ValueError
    if not all(value is None or _is_number(value) for value in line.values()):
        raise ValueError


def check_evaluation(line: Mapping[str, Any]) -> None:
    """Raise ValueError, TypeError or KeyError unless this is a line of eval.jsonl: a step, an epoch, scores."""
    check_step({key: line[key] for key in ("step", "epoch")})
    for scores in from_record(line).values():
        check_step({"step": 0, "epoch": 0, **scores.metrics})
        check_step({"step": 0, "epoch": 0, **scores.chance})


LOGS: dict[str, Callable[[dict[str, Any]], None]] = {"metrics.jsonl": check_step, "eval.jsonl": check_evaluation}


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _cut_after(path: Path, step: int, check: Callable[[dict[str, Any]], None]) -> None:
    """Drop damaged lines, a half-written last one, and those after `step`, which the resumed run writes again."""
    if path.is_file():
        kept = [text for text, line in read_json_lines(path, check) if line["step"] <= step]
        write_atomically(path, "".join(f"{text}\n" for text in kept))
