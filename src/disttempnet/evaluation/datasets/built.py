"""Tasks on data that a command builds once: Parquet rows that say a caption, a class, and its training pairs."""

from __future__ import annotations

from bisect import bisect_left
from pathlib import Path
from typing import Any

from disttempnet.data.icons.built import BUILT, built_split
from disttempnet.data.listings.listed import read_listing
from disttempnet.errors import UserError
from disttempnet.evaluation.datasets.own import ReadSample
from disttempnet.evaluation.tasks import Head, Task, TaskData


def built_data(task: Task, root: Path | None) -> TaskData:
    """Read the rows of a built split.

    Args:
        root: the folder that it was built in, or one with that folder in it; None = the cache folder.

    Raises:
        UserError: it is not built, or its rows lack what the task asks of them.
    """
    folder = built_split(task.data.removeprefix(BUILT), root)
    listed = read_listing(folder)

    def fact(key: str, fields: dict[str, Any]) -> Any:
        if key not in fields:
            raise UserError(f"task '{task.name}': {folder}: no column '{key}': build it anew")
        return fields[key]

    # classes: all labels of the split
    labels = [str(fact(task.label_key, image.fields)) for image in listed.images]
    names = tuple(sorted(set(labels)))
    number = {name: i for i, name in enumerate(names)}
    samples = tuple(
        ReadSample(image.name, folder, 0, 0, image.captions, label, image.fields, read=image.read)
        for image, label in zip(listed.images, labels, strict=True)
    )

    # groups: training pairs above the highest bound are the head (0)
    bounds = task.frequency_bounds
    frequency = tuple(int(fact(task.frequency_by, image.fields)) for image in listed.images) if bounds else ()
    third = tuple(len(bounds) - bisect_left(bounds, pairs) for pairs in frequency)
    heads = (Head(names, task.templates),)
    return TaskData(task, samples, heads, tuple(number[label] for label in labels), frequency, third)
