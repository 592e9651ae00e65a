"""Linear probes of `evaluate --probe`: tasks with a train split below the data root, a line each in their own file.

The train split lies beside the test split, `train/0.tar …` as CLIP_benchmark's data has it, or in a folder of its own:

wds_vtab-dtd_test/train/*.tar     wds_vtab-dtd/train/*.tar     wds_vtab-dtd_train/train/*.tar

Its labels are those of the test split: line i of classnames.txt is label i. Features of both splits are computed once.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from disttempnet import distributed
from disttempnet.errors import Preempted, UserError
from disttempnet.evaluation.datasets.classification import labelled_data
from disttempnet.evaluation.datasets.open import find_data, folder_names, load_task, sizes_of
from disttempnet.evaluation.embed import features_of_samples
from disttempnet.evaluation.encoder import make_encoder
from disttempnet.evaluation.evaluator import Evaluator, refuse_different
from disttempnet.evaluation.linear_probe import fit_probe
from disttempnet.evaluation.metrics import predict
from disttempnet.evaluation.outputs import record_of_error
from disttempnet.evaluation.progress import EvaluationProgress
from disttempnet.evaluation.results.records import (
    MAIN,
    PROBE_FILE,
    PROBE_PREFIX,
    TaskRecord,
    append_record,
    read_records,
)
from disttempnet.evaluation.score import score_predictions
from disttempnet.evaluation.tasks import Task, TaskData

WITHOUT_CLASSES = ("retrieval", "caption_retrieval", "winogavil", "faces")  # protocols of tasks that are not probed


@dataclass(frozen=True)
class ProbeRequest:
    """Probes of one model on a data root.

    Attributes:
        folder: of the results.
        root: the data root; compat: see `load_task`.
        tasks: those that are wanted.
        stopped: asked after every batch; where it is true on any rank, all end, and the task is not kept.
    """

    folder: Path
    root: Path
    compat: str
    tasks: Sequence[Task]
    stopped: Callable[[], object] = bool


def find_train(task: Task, root: Path) -> Path | None:
    """Return the folder with the tars of a task's train split below a data root; None where there is none."""
    for name in folder_names(task):
        stem = name.removesuffix("_test")
        for place in (root / name, root / stem, root / f"{stem}_train"):
            if any(not path.name.startswith(".") for path in (place / "train").glob("*.tar")):
                return place / "train"
    return None


def why_no_probe(task: Task, root: Path) -> str:
    """Return why a task has no linear probe; empty where it has one."""
    if set(task.protocols) & set(WITHOUT_CLASSES):
        return "no classes to probe"
    if find_data(task, root) is None:
        return "its test split is not below the data root"
    return "" if find_train(task, root) is not None else "no train split"


def skipped_probes(tasks: Sequence[Task], root: Path) -> list[str]:
    """Return a line for each reason why tasks have no linear probe, with their names."""
    reasons: dict[str, list[str]] = {}
    for task in tasks:
        if why := why_no_probe(task, root):
            reasons.setdefault(why, []).append(task.display)
    return [f"no linear probe ({why}): {', '.join(names)}" for why, names in reasons.items()]


def probe_tasks(request: ProbeRequest, evaluator: Evaluator) -> bool:
    """Probe the tasks that have a train split and are not finished; every rank calls this.

    Returns:
        Whether a task failed, or was not seen as a whole.

    Raises:
        UserError: a damaged file of results.
        Preempted: a rank was told to stop; the same command goes on.
    """
    # Rank 0's files decide which tasks are there and finished.
    path = request.folder / PROBE_FILE
    found = distributed.gather_objects(read_records(path) if distributed.is_main() else {})[0]
    present = distributed.gather_objects([task for task in request.tasks if not why_no_probe(task, request.root)])[0]
    sizes = distributed.together(lambda: sizes_of(request.root))
    expected = {task.name: sizes.get(task.name, task.size) for task in present}
    done = {key: r for key, r in found.items() if r.whole and (r.expected or 0) == expected.get(key)}
    finished = {task.name: done[task.name].value for task in present if task.name in done}

    failed = False
    line = EvaluationProgress(present, finished, evaluator.batch)

    def advance(what: str, number: int, of: int) -> None:
        line.advance(what, number, of)
        if request.stopped():
            raise Preempted("told to stop")

    with line:
        for task in sorted((task for task in present if task.name not in done), key=lambda task: -task.seconds):
            line.begin(task)
            begun = time.monotonic()
            try:
                record = _probed(task, request, evaluator, advance)
            except UserError as error:
                record = record_of_error(task, error, f"{PROBE_PREFIX}{task.main}", 0.0)
            record = replace(record, seconds=time.monotonic() - begun)
            stop = bool(distributed.largest(int(bool(request.stopped())), evaluator.device))
            if not (stop and record.error):
                distributed.together(partial(append_record, path, record) if distributed.is_main() else _nothing)
                value = "–" if record.value is None else f"{100 * record.value:.2f}"
                line.finish(task, record.value, f"linear probe: {record.error or value}")
                failed |= bool(record.error)
            if stop:
                raise Preempted
    return failed


def _nothing() -> None:
    """Write nothing, on other ranks than the first."""


def _probed(
    task: Task, request: ProbeRequest, evaluator: Evaluator, progress: Callable[[str, int, int], None]
) -> TaskRecord:
    """Return the record of one task's probe."""

    def read() -> tuple[TaskData, TaskData]:
        test = load_task(task, request.root, request.compat)
        folder, tars = find_data(task, request.root), find_train(task, request.root)
        assert folder is not None
        assert tars is not None
        plain = task.model_copy(update={"metadata": ()})  # groups are needed of the test split alone
        return test, labelled_data(plain, folder, request.compat, tars)

    test, train = distributed.together(read)
    for data in (test, train):
        refuse_different(data)

    # Features [n, D] of both splits, once; then the probe, and its predictions.
    encoder = make_encoder(evaluator.towers, evaluator.device, evaluator.precision, False, evaluator.batch)
    classes = len(test.class_names)
    seen: list[Tensor] = []
    sets: list[Tensor] = []
    for data in (train, test):
        features, valid = features_of_samples(encoder, data.samples, evaluator.workers, progress, task.name)
        if not valid.any():
            split = "test" if sets else "train"
            raise UserError(f"none of the {len(data.samples)} images of its {split} split can be read")
        seen.append(valid)
        sets.append(features[valid])
    labels = [torch.tensor(data.labels, dtype=torch.int64, device=evaluator.device) for data in (train, test)]
    known = labels[0][seen[0]] < classes
    probe = fit_probe(sets[0][known], labels[0][seen[0]][known], classes)
    prediction = predict(probe.predict_with(sets[1]), probe.weights, labels[1][seen[1]])
    scores = score_predictions(test, seen[1].nonzero().flatten(), prediction, classes)

    # The record: the task's metrics under names of their own, and how the probe was made.
    lost = [test.samples[i].key for i in (~seen[1]).nonzero().flatten().tolist()] + list(test.broken)
    wrong = [f"{len(lost):,} unreadable: {lost[0]}"] if lost else []
    if test.size and scores.samples != test.size:
        wrong.append(f"{scores.samples:,} samples of {test.size:,} were seen")
    share = f"{probe.held_out:,} of {len(sets[0]):,} training images"
    notes = [f"linear probe: λ = 10^{probe.exponent:g}, chosen on {share}"]
    left = len(train.broken) + int((~seen[0]).sum()) + int((~known).sum())
    if left:
        notes.append(f"linear probe: {left:,} unusable images of the train split are left out")
    main = task.main or (task.metrics[0] if task.metrics else "")
    metrics: dict[str, float | None] = {f"{PROBE_PREFIX}{name}": value for name, value in scores.metrics.items()}
    metrics[MAIN] = scores.metrics.get(main)
    return TaskRecord(
        key=task.name,
        dataset=task.display,
        metrics=metrics,
        main_metric_name=f"{PROBE_PREFIX}{main}",
        samples=scores.samples,
        expected=test.size or None,
        corrupt=tuple(lost),
        complete=not wrong,
        error=". ".join(wrong),
        notes=(*notes, *test.notes),
        standard_errors={f"{PROBE_PREFIX}{name}": error for name, error in scores.errors.items()},
    )
