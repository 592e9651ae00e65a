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
from disttempnet.data.open import open_source, open_training_source, places_of
from disttempnet.data.source import Source, UnreadableCaption
from disttempnet.errors import UserError
from disttempnet.evaluation.datasets.own import ReadSample, own_data
from disttempnet.evaluation.tasks import (
    OWN_DATA,
    OWN_FOLDER,
    VALIDATION_TASK,
    EvaluationSample,
    Task,
    TaskData,
    find_task,
    own_path,
    task_title,
)


def validation_data(config: DataConfig, trained: Source | None = None) -> TaskData | None:
    """Read the data that a run's data.validation names; None where it names nothing. Every rank calls this.

    Args:
        config: the run's [data].
        trained: the training source, where that is open already.

    Raises:
        UserError: it cannot be read, is trained on, or has no usable samples.
    """
    given = config.validation
    if not given:
        return None
    if isinstance(given, str):
        return _of_a_source(given, config.sources, trained)
    source = trained or open_training_source(config)
    assert isinstance(source, HeldOut)  # with a share above zero
    return _retrieval(source.base, source.held_out.tolist(), f"{source.digest} {given}", ())


def _of_a_source(spec: str, sources: Sequence[SourceConfig], trained: Source | None) -> TaskData:
    """Read validation data that is a source of its own. Raises UserError where it is trained on, too."""
    if spec.startswith(OWN_DATA):
        data = distributed.together(lambda: own_data(find_task(spec)))
        notes = distributed.together(lambda: _refuse_trained(spec, _own_places(spec, data), sources))
        named = {"name": VALIDATION_TASK, "display": task_title(VALIDATION_TASK)}
        return replace(data, task=data.task.model_copy(update=named), notes=(*data.notes, *notes))
    given = SourceConfig(path=spec)
    notes = distributed.together(lambda: _refuse_trained(spec, places_of(given), sources))
    source = open_source((given,))
    if trained is not None and source.digest in trained.digests:  # a copy, or remote
        raise UserError(_is_trained(spec, spec))
    data = _retrieval(source, source.usable.tolist(), source.digest, source.problems().splitlines())
    return replace(data, notes=notes)


def _own_places(spec: str, data: TaskData) -> set[Path]:
    """Return where samples of your own data are: for folders of classes the folders with images, as others may lie
    beside them."""
    path = own_path(spec)
    if not spec.startswith(OWN_FOLDER):
        return places_of(SourceConfig(path=path))
    where = Path(path).expanduser()
    shards = {sample.shard for sample in data.samples}
    return {place.resolve() for place in {shard if shard == where else shard.parent for shard in shards}}


def _refuse_trained(spec: str, places: set[Path], sources: Sequence[SourceConfig]) -> tuple[str, ...]:
    """Raise UserError where one of the places is trained on, or is a folder inside or around one that is.

    Returns:
        Notes on training sources that are not on this machine, as a run may be evaluated elsewhere.
    """
    trained, notes = set[Path](), list[str]()
    for source in sources:
        try:
            trained |= places_of(source)
        except UserError:
            notes.append(f"{source.path} is not here: not checked whether its samples are those of validation")
    folders = {place for place in trained if place.is_dir()}
    for place in sorted(places):
        around = folders & {*place.parents} if place.is_dir() else set()
        inside = {folder for folder in folders if place in folder.parents}
        if place in trained or around or inside:
            raise UserError(_is_trained(spec, place))
    return tuple(notes)


def _is_trained(spec: str, place: Path | str) -> str:
    where = f": {place}" if str(place) != spec else ""
    return f"data.validation = '{spec}'{where} is also trained on: name other samples, or a share of these"


def _retrieval(source: Source, ids: Sequence[int], digest: str, problems: Sequence[str]) -> TaskData:
    task = Task(
        name=VALIDATION_TASK,
        display=task_title(VALIDATION_TASK),
        data=f"{VALIDATION_TASK}:{digest}",
        protocols=("retrieval",),
        main="mean_recall",
        tags=(),
    )

    def read() -> TaskData:
        samples: list[EvaluationSample] = []
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
            raise UserError(f"data.validation: no usable samples; {next(iter(broken), 'no samples')}")
        return TaskData(task, tuple(samples), broken=tuple(broken))

    return distributed.together(read)
