"""Evaluation data below a data root, as DataComp's and CLIP_benchmark's tools lay it out, and as it is published.

wds_vtab-dtd_test/                          a task's key with "/" as "-"; `fairness/` and `_test` may be left out
    classnames.txt                          a name a line, line i = label i
    zeroshot_classification_templates.txt   a template a line, {c} = the name
    test/nshards.txt  test/0.tar …          KEY.webp|png|jpg|jpeg, KEY.cls, KEY.npy (metadata), KEY.txt (captions)
flickr_1k_test_image_text_retrieval/        a published retrieval set: a CSV and a folder of images
wds_winogavil_test/                         test/*.tar of images, and puzzles.jsonl
sizes.toml                                  optional: "vtab/dtd" = 500, where a folder holds a part of the task
"""

from __future__ import annotations

import shlex
import tomllib
from dataclasses import replace
from pathlib import Path

from disttempnet.data.icons.built import BUILT, built_split
from disttempnet.errors import UserError
from disttempnet.evaluation.datasets.built import built_data
from disttempnet.evaluation.datasets.classification import labelled_data
from disttempnet.evaluation.datasets.own import own_data
from disttempnet.evaluation.datasets.retrieval import RAW_PROTOCOLS, captioned_data, winogavil_data
from disttempnet.evaluation.tars import has_tars
from disttempnet.evaluation.tasks import OWN_DATA, OWN_SHARDS, Task, TaskData, all_tasks, embedded_data

HF_CACHE = "hf_cache"  # where DataComp's download keeps raw sets, in a form of `datasets` that only it reads


def load_task(task: Task, root: Path | None = None, compat: str = "") -> TaskData:
    """Read the data of a task.

    Args:
        task: a row of tasks.toml.
        root: the data root; tasks whose data ships with the package need none.
        compat: "", or `datacomp-1.4`: as in CLIP_benchmark 1.4, which DataComp pins, blank lines are no class names.

    Raises:
        UserError: it is not below the data root (the message says where to get it), cannot be read, or does not fit.
    """
    if task.data.startswith(OWN_DATA):
        return own_data(task)
    if task.is_built:
        return built_data(task, root)
    if not task.below_root:
        return embedded_data(task)
    if root is None:
        raise UserError(f"task '{task.name}' needs its data: set --data-root, or eval.data_root in a config")
    folder = find_data(task, root)
    if folder is None:
        looked = f"none of {', '.join(folder_names(task))} below {root} holds "
        raise UserError(f"{looked}{' or '.join(_patterns(task))}; get {where_to_get(task, root)}")
    size = sizes_of(root).get(task.name, task.size)
    data = read_folder(task, folder, compat)
    notes = [*data.notes]
    if size != task.size:
        notes.append(f"sizes.toml: {size:,} samples, the task has {task.size:,}")
    return replace(data, notes=tuple(notes), size=size)


def read_folder(task: Task, folder: Path, compat: str = "") -> TaskData:
    """Read a task's folder in any layout. Raises UserError where it cannot be read."""
    if task.protocols == ("winogavil",):
        return winogavil_data(task, folder)
    if task.protocols == ("caption_retrieval",):
        return captioned_data(task, folder)
    return labelled_data(task, folder, compat)


def folder_names(task: Task) -> list[str]:
    """Return names of folders that a task may lie in, in the order in which they are tried."""
    key = task.name.replace("/", "-")
    names = [f"wds_{key}_test", f"wds_{key.removeprefix('fairness-')}_test", task.source.rpartition("/")[2], *task.also]
    names += [name.removesuffix("_test") for name in names if name.startswith("wds_")]  # as CLIP_benchmark calls them
    return list(dict.fromkeys(names))


def find_data(task: Task, root: Path) -> Path | None:
    """Return a task's folder below a data root, the first with tars or the CSV of raw data; None where none has."""
    raw = task.protocols in RAW_PROTOCOLS
    folders = (root / name for name in folder_names(task))
    return next((folder for folder in folders if has_tars(folder) or (raw and any(folder.glob("*.csv")))), None)


def _patterns(task: Task) -> list[str]:
    return ["test/*.tar", "a CSV with its images"] if task.protocols in RAW_PROTOCOLS else ["test/*.tar"]


def where_to_get(task: Task, root: Path) -> str:
    """Return the data set's page; for raw data also where to unzip it."""
    page = f"huggingface.co/datasets/{task.source}"
    if task.protocols not in RAW_PROTOCOLS:
        return page
    words = f"{page}: its CSV and its images, unzipped, in {download_folder(task, root)}"
    return words + (f"; {root / HF_CACHE} is not read" if (root / HF_CACHE).is_dir() else "")


def download_folder(task: Task, root: Path) -> Path:
    """Return the folder for a download of the task: DataComp's name for its tars, or the name of the raw set."""
    return root / task.source.rpartition("/")[2]


def has_data(task: Task, root: Path | None = None) -> bool:
    """Return whether a task's data is below a data root, is built, or needs neither."""
    if task.is_built:
        try:
            return built_split(task.data.removeprefix(BUILT), root).is_dir()
        except UserError:
            return False
    return not task.below_root or (root is not None and find_data(task, root) is not None)


def how_to_evaluate(tars: Path, images: int) -> str:
    """Return the command that evaluates retrieval on tars of images and captions.

    Args:
        tars: their folder, as an absolute path.
        images: how many they hold; another number than the task has needs a line in sizes.toml.
    """
    tasks = [task for task in all_tasks().values() if task.protocols == ("caption_retrieval",)]
    root, name = tars.parent.parent, tars.parent.name
    task = next((task for task in tasks if tars.name == "test" and name in folder_names(task)), None)
    if task is None:
        command = shlex.join(["disttempnet", "evaluate", "RUN", "--tasks", f"{OWN_SHARDS}{tars}"])
        return f"evaluate retrieval on it: {command}"
    command = shlex.join(["disttempnet", "evaluate", "RUN", "--data-root", str(root), "--tasks", task.name])
    if sizes_of(root).get(task.name, task.size) != images:
        command += f'\n  (the task has {task.size:,} images: write "{task.name}" = {images} into {root / "sizes.toml"})'
    return f"evaluate retrieval on it: {command}"


def sizes_of(root: Path) -> dict[str, int]:
    """Return sizes by task of a data root's sizes.toml, for roots that hold parts of tasks."""
    path = root / "sizes.toml"
    try:
        sizes = tomllib.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read: {error}") from None
    for name, size in sizes.items():
        if not isinstance(size, int) or size < 1:
            raise UserError(f"{path}: '{name}' is not a number of samples: {size!r}")
    return sizes
