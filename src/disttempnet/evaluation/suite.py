"""A model on many tasks: each is run once, its result is kept, and what fails or is missing ends nothing.

All ranks work on one task at a time, each on its own batches, the longest task first; rank 0 writes. Decoding runs
ahead into the next task. A task that has its line in eval_results.jsonl is finished, so the same command goes on where
it was stopped.
"""

from __future__ import annotations

import time
import traceback
import zlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path

import torch

from disttempnet import distributed
from disttempnet.errors import Preempted, UserError
from disttempnet.evaluation.class_features import ClassFeatures
from disttempnet.evaluation.datasets.open import is_there, load_task, sizes_of
from disttempnet.evaluation.encoder import ProgressCallback, batches_of_this_rank, evaluation_mode, make_encoder
from disttempnet.evaluation.loader import DecodeRequest, ImageBatch, decoded
from disttempnet.evaluation.progress import SuiteProgress
from disttempnet.evaluation.protocols import PROTOCOLS
from disttempnet.evaluation.results.records import RESULTS_FILE, TaskRecord, append_record, read_records
from disttempnet.evaluation.score import ScoredTask, embed_task_texts, score_task, task_texts
from disttempnet.evaluation.tasks import Task, TaskData
from disttempnet.models import Towers

SAMPLES_SHOWN = 5  # unreadable samples that an error line names


@dataclass(frozen=True)
class Suite:
    """How a model is evaluated on tasks below a data root.

    Attributes:
        root: the data root.
        out: folder of the results.
        precision: one of `embed.PRECISIONS`.
        compat: "" or one of `layouts.COMPATIBLE`.
        batch: images or texts embedded at once by a rank.
        workers: processes that decode for a rank; 0 = threads.
        texts: class features that are known already, and where they are kept.
        stopped: asked after every batch; where it is true on any rank, all end, and the task is not kept.
    """

    root: Path
    out: Path
    precision: str = "fp32"
    compat: str = ""
    batch: int = 256
    workers: int = 0
    texts: ClassFeatures = field(default_factory=ClassFeatures)
    stopped: Callable[[], object] = bool

    def run(self, towers: Towers, tasks: Sequence[Task], device: torch.device) -> list[TaskRecord]:
        """Evaluate on the tasks that are there and not finished yet; every rank calls this.

        Returns:
            A record of every task whose data is there, finished before or now, in the order of `tasks`.

        Raises:
            UserError: results cannot be written, decoding stopped, or sizes.toml cannot be read.
            Preempted: a rank was told to stop; what is finished is kept.
        """
        done = distributed.gather_objects(read_records(self.out / RESULTS_FILE) if distributed.is_main() else {})[0]
        sizes = distributed.together(lambda: sizes_of(self.root))
        expected = {task.name: sizes.get(task.name, task.size) for task in tasks}
        # a task that failed, or lacked samples, is run again: its data may be whole by now; and one that was measured
        # on another number of samples, of a root that held a part
        done = {
            key: record
            for key, record in done.items()
            if record.complete and not record.error and (record.expected or 0) == expected.get(key)
        }
        present = distributed.gather_objects([task for task in tasks if is_there(task, self.root)])[0]
        line = SuiteProgress(present, [done[task.name] for task in present if task.name in done], self.batch)
        todo = sorted((task for task in present if task.name not in done), key=lambda task: -task.seconds)
        loaded: dict[int, TaskData | BaseException] = {}
        batches_of_all = decoded(self._requests(todo, loaded), towers, self.workers)

        def progress(what: str, done: int, of: int) -> None:
            line.progress(what, done, of)
            if self.stopped():  # where no rank waits for this one in vain
                raise Preempted("told to stop")

        with evaluation_mode(towers.module), line:
            for number, batches in groupby(batches_of_all, key=lambda batch: batch.task):
                line.begin(todo[number])
                record = self._one(todo[number], towers, device, loaded.pop(number), batches, progress)
                stop = distributed.largest(int(bool(self.stopped())), device)
                if not (stop and record.error):
                    self._keep(record)
                    line.finish(record)
                    done[record.key] = record
                if stop:
                    raise Preempted
        if lost := [task.display for task in present if task.name not in done]:
            raise UserError(f"decoding stopped before {lost[0]}: the same command goes on from there")
        return [done[task.name] for task in present]

    def _keep(self, record: TaskRecord) -> None:
        path = self.out / RESULTS_FILE
        distributed.together(lambda: append_record(path, record) if distributed.is_main() else None)

    def _requests(self, todo: Sequence[Task], loaded: dict[int, TaskData | BaseException]) -> Iterator[DecodeRequest]:
        """This rank's batches of all tasks in turn, after an empty one that says that the task is in `loaded`."""
        with ThreadPoolExecutor(1) as ahead:  # tars are indexed while the task before is at work
            waiting = deque(ahead.submit(load_task, task, self.root, self.compat) for task in todo[:1])
            for number in range(len(todo)):
                future = waiting.popleft()
                error = future.exception()
                waiting.extend(
                    ahead.submit(load_task, t, self.root, self.compat) for t in todo[number + 1 : number + 2]
                )
                loaded[number] = future.result() if error is None else error
                yield DecodeRequest(number, 0, ())
                samples = future.result().samples if error is None else ()
                for rows in batches_of_this_rank(len(samples), self.batch):
                    yield DecodeRequest(number, rows.start, samples[rows.start : rows.stop])

    def _one(
        self,
        task: Task,
        towers: Towers,
        device: torch.device,
        loaded: TaskData | BaseException,
        batches: Iterable[ImageBatch],
        progress: ProgressCallback,
    ) -> TaskRecord:
        """Evaluate on one task; whatever goes wrong is in its record."""
        begun = time.monotonic()

        def there() -> TaskData:
            if isinstance(loaded, BaseException):
                raise loaded
            return loaded

        try:
            data = distributed.together(there)
            if len(set(distributed.gather_objects(digest(data)))) > 1:
                raise UserError("the ranks see different data: its copies on the nodes differ, or it is being written")
            matching = any(PROTOCOLS[protocol].matching for protocol in data.task.protocols)
            encoder = make_encoder(towers, device, self.precision, matching, self.batch)
            heads, words = embed_task_texts(data, encoder, self.texts, progress)
            outcome = score_task(data, encoder, batches, heads, words, progress)
        except (UserError, Preempted, distributed.OtherRankFailed) as error:
            return self._failed(task, str(error), begun)
        except Exception as error:
            traceback.print_exc()
            return self._failed(task, f"{type(error).__name__}: {error}", begun)
        return _record(data, outcome, time.monotonic() - begun)

    @staticmethod
    def _failed(task: Task, error: str, begun: float) -> TaskRecord:
        return TaskRecord(
            task.name,
            task.display,
            main_metric_name=task.main,
            expected=task.size or None,
            seconds=time.monotonic() - begun,
            complete=False,
            error=" ".join(error.split()),
        )


def digest(data: TaskData) -> int:
    """The same on all ranks that see the same samples, and words of the same number."""
    counts = (len(data.puzzles), len(data.broken), [(len(head.names), len(head.templates)) for head in data.heads])
    words = "\n".join([*(sample.key for sample in data.samples), *task_texts(data)])
    return zlib.crc32(f"{counts}{data.labels}{words}".encode())


def _record(data: TaskData, outcome: ScoredTask, seconds: float) -> TaskRecord:
    """A task's result, with what it lacks said in `error`."""
    task, scores = data.task, outcome.scores
    reasons = [f"{key}: {why}" for key, why in zip(scores.corrupt, outcome.reasons, strict=True)] + list(data.broken)
    wrong = []
    if reasons:
        more = f" and {len(reasons) - SAMPLES_SHOWN:,} more" if len(reasons) > SAMPLES_SHOWN else ""
        wrong.append(f"{len(reasons):,} unreadable: {'; '.join(reasons[:SAMPLES_SHOWN])}{more}")
    if data.size and scores.samples != data.size:
        wrong.append(f"{scores.samples:,} samples of {data.size:,} were seen")
    known = {**scores.metrics, **dict.fromkeys(scores.undefined)}
    main = task.main or (task.metrics[0] if task.metrics else "")
    metrics = {name: known[name] for name in task.metrics or known}
    metrics["main_metric"] = metrics[main] if main else None
    return TaskRecord(
        key=task.name,
        dataset=task.display,
        metrics=metrics,
        main_metric_name=main,
        samples=scores.samples,
        expected=data.size or None,
        corrupt=tuple(reasons),
        seconds=seconds,
        complete=not wrong,
        error=". ".join(wrong),
        notes=data.notes,
        standard_errors={name: error for name, error in scores.errors.items() if name in metrics},
    )
