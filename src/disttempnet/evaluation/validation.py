"""The task `validation` of a run: samples of its own data that it was not trained on, or a source of its own.

Retrieval, of images that are decoded as evaluation decodes them, each with the captions that training draws from.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from disttempnet import distributed
from disttempnet.config import DataConfig, SourceConfig
from disttempnet.data.held_out import HeldOut
from disttempnet.data.open import open_source, open_training_source
from disttempnet.data.source import Source, UnreadableCaption
from disttempnet.errors import UserError
from disttempnet.evaluation.datasets.own import ReadSample, own_data
from disttempnet.evaluation.tasks import OWN, VALIDATION, Sample, Task, TaskData, find_task, task_title


def validation_data(config: DataConfig, trained: Source | None = None) -> TaskData | None:
    """What a run's data.validation names; None where it names nothing. Every rank calls this.

    Args:
        config: the run's [data].
        trained: what it is trained on, where that is open already.

    Raises:
        UserError: it cannot be read, or holds nothing to measure on.
    """
    given = config.validation
    if not given:
        return None
    if isinstance(given, str):
        return _of_a_source(given, trained)
    source = trained or open_training_source(config)
    assert isinstance(source, HeldOut)  # with a share above zero
    return _retrieval(source.base, source.held_out.tolist(), f"{source.digest} {given}", ())


def _of_a_source(spec: str, trained: Source | None) -> TaskData:
    if spec.startswith(OWN):
        data = distributed.together(lambda: own_data(find_task(spec)))
        named = {"name": VALIDATION, "display": task_title(VALIDATION)}
        return replace(data, task=data.task.model_copy(update=named))
    source = open_source((SourceConfig(path=spec),))
    if trained is not None and source.digest == trained.digest:
        raise UserError(f"data.validation = '{spec}' is what is trained on: name other samples, or a share of these")
    return _retrieval(source, source.usable.tolist(), source.digest, source.problems().splitlines())


def _retrieval(source: Source, ids: Sequence[int], digest: str, problems: Sequence[str]) -> TaskData:
    task = Task(
        name=VALIDATION,
        display=task_title(VALIDATION),
        data=f"{VALIDATION}:{digest}",
        protocols=("retrieval",),
        main="mean_recall",
        tags=(),
    )

    def read() -> TaskData:
        samples: list[Sample] = []
        broken = list(problems)
        for i in ids:
            try:
                captions = source.captions(i)
            except UnreadableCaption as error:
                broken.append(f"{source.name(i)}: {error}")
                continue
            image = partial(source.image_bytes, i)
            samples.append(ReadSample(source.name(i), Path(source.where), 0, 0, captions, "", read=image))
        if not samples:
            raise UserError(f"data.validation: nothing to measure on; {next(iter(broken), 'no samples')}")
        return TaskData(task, tuple(samples), broken=tuple(broken))

    return distributed.together(read)
