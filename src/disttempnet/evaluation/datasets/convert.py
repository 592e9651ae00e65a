"""Raw folders of a task → the task's tars below a data root, so that a cluster reads few large files.

Image bytes are copied as they are, so that the numbers are those of the raw folder. The new folder is made beside its
place, read back, compared with its source and renamed at the end: the write is atomic.
"""

from __future__ import annotations

import io
import json
import os
import shutil
import tarfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO, NamedTuple

from PIL import Image

from disttempnet.data.headers import UNKNOWN_FORMAT, image_header
from disttempnet.data.images import MAX_BYTES
from disttempnet.errors import UserError
from disttempnet.evaluation.datasets.cifar import PixelSample
from disttempnet.evaluation.datasets.image_folder import folder_data
from disttempnet.evaluation.datasets.open import folder_names, read_folder
from disttempnet.evaluation.datasets.retrieval import RAW_PROTOCOLS
from disttempnet.evaluation.tars import has_tars
from disttempnet.evaluation.tasks import OWN_FOLDER, EvaluationSample, Task, TaskData, find_task, own_path
from disttempnet.io.files import locked, read_regular
from disttempnet.io.progress import Meter

IMAGE_HEAD_BYTES = 4096  # tell an image's format


class Converted(NamedTuple):
    """Counts of a written task: its folder, tars, images, their bytes; and what of the source is in none of them."""

    folder: Path
    shards: int
    samples: int
    size: int
    left_out: tuple[str, ...]


def convert(task: Task, source: str, root: Path, per_shard: int, progress: bool = True) -> Converted:
    """Write a task's raw data as its folder of tars below a data root.

    Args:
        task: a row of tasks.toml whose data lies below a data root.
        source: a published CSV beside its images (Flickr, MSCOCO, WinoGAViL); or `folder:PATH` of images in folders of
            classes, or of CIFAR for Python, for a task of plain classification.
        root: the data root; made if it is not there.
        per_shard: images of a tar.

    Raises:
        UserError: the source is of another form, the task's folder is there already, or it cannot be written.
    """
    # What cannot be written is refused before anything is.
    if per_shard < 1:
        raise UserError(f"--samples-per-shard {per_shard}: a tar holds at least one image")
    target = root / folder_names(task)[0]
    if target.exists():
        raise UserError(f"{target}: exists already; delete it to write it again")
    data = _read(task, source)
    if not data.samples:
        raise UserError(f"{source}: none of it can be used; {next(iter(data.broken), 'it is empty')}")
    # Written under another name, compared with its source, then renamed.
    part = root / f".{target.name}.part"
    try:
        root.mkdir(parents=True, exist_ok=True)
        with locked(Path(f"{part}.lock"), wait=False):
            shutil.rmtree(part, ignore_errors=True)  # of a command that was killed
            try:
                shards, size = _write(data, part, per_shard, progress)
                _refuse_other(data, read_folder(task, part), target)
                os.rename(part, target)
            finally:
                shutil.rmtree(part, ignore_errors=True)
                with suppress(OSError):
                    os.unlink(f"{part}.lock")
    except BlockingIOError:
        raise UserError(f"{target}: another command is writing it") from None
    except OSError as error:
        raise UserError(f"{error.filename or target}: {error.strerror or error}; nothing is left of {target}") from None
    return Converted(target, shards, len(data.samples), size, data.broken)


def _read(task: Task, source: str) -> TaskData:
    if not task.below_root:
        raise UserError(f"task '{task.name}' has no data below a data root, so nothing to convert")
    if source.startswith(OWN_FOLDER):
        if task.protocols != ("classification",):
            raise UserError(f"task '{task.name}' needs more than the images and classes of {OWN_FOLDER}")
        path = Path(own_path(source)).expanduser()
        if not path.is_dir():
            raise UserError(f"{path}: no such folder")
        return folder_data(find_task(source), path)
    folder = Path(source)
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder")
    if has_tars(folder):
        raise UserError(f"{folder}: holds tars already; put it, or a link to it, below the data root")
    if task.protocols not in RAW_PROTOCOLS:
        raise UserError(f"task '{task.name}' has one raw form, images in folders of classes: give {OWN_FOLDER}{source}")
    return read_folder(task, folder)


def _write(data: TaskData, folder: Path, per_shard: int, progress: bool) -> tuple[int, int]:
    """Write all files of the task; return the number of tars and their bytes."""
    (folder / "test").mkdir(parents=True)
    starts, size = range(0, len(data.samples), per_shard), 0
    with Meter(f"writing {data.task.display}", len(data.samples), active=progress) as meter:
        for number, start in enumerate(starts):
            path = folder / "test" / f"{number}.tar"
            with (
                _on_disk(path) as file,
                tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as tar,
            ):
                for place in range(start, min(start + per_shard, len(data.samples))):
                    for suffix, content in _members(data, place):
                        member = tarfile.TarInfo(f"{_key(place)}.{suffix}")
                        member.size = len(content)
                        tar.addfile(member, io.BytesIO(content))
                    meter.advance()
            size += path.stat().st_size
    for name, lines in (_words(data) | {"test/nshards.txt": [str(len(starts))]}).items():
        with _on_disk(folder / name) as file:
            file.write("".join(f"{line}\n" for line in lines).encode())
    return len(starts), size


@contextmanager
def _on_disk(path: Path) -> Iterator[BinaryIO]:
    """Open a new file that is synced to the disk when it is closed."""
    with path.open("wb") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())


def _key(place: int) -> str:
    return f"s{place:07d}"


def _members(data: TaskData, place: int) -> Iterator[tuple[str, bytes]]:
    """Yield (suffix, content) of a sample's files."""
    sample = data.samples[place]
    content = _image_bytes(sample)
    suffix = image_header(content[:IMAGE_HEAD_BYTES])[0]
    yield "jpg" if suffix == UNKNOWN_FORMAT else suffix, content  # an unknown format keeps a suffix that readers accept
    if data.labels:
        yield "cls", str(data.labels[place]).encode()
    if sample.captions:
        yield "txt", "\n".join(_one_line(caption, sample) for caption in sample.captions).encode()


def _image_bytes(sample: EvaluationSample) -> bytes:
    """Return the file as it is; pixels in memory as PNG, which is lossless."""
    if not isinstance(sample, PixelSample):
        return read_regular(sample.shard, MAX_BYTES)
    file = io.BytesIO()
    Image.fromarray(sample.pixels).save(file, "PNG")
    return file.getvalue()


def _one_line(caption: str, sample: EvaluationSample) -> str:
    """Return a caption in one line: captions stand a line each, and to tokenizers a line break is a space."""
    text = " ".join(caption.splitlines())
    if not text.strip():
        raise UserError(f"{sample.key}: an empty caption, which the tars cannot hold")
    return text


def _words(data: TaskData) -> dict[str, list[str]]:
    """Return file name → lines of the files beside the tars; sources.tsv names the source of each image."""
    sources = [f"{_key(place)}\t{sample.key}" for place, sample in enumerate(data.samples)]
    files = {"sources.tsv": sources}
    for head in data.heads:
        files |= {"classnames.txt": [*head.names], "zeroshot_classification_templates.txt": [*head.templates]}
    if data.puzzles:
        rows = []
        for puzzle in data.puzzles:
            names = [_key(place) for place in puzzle.candidates]
            right = [name for name, belongs in zip(names, puzzle.right, strict=True) if belongs]
            rows.append({"cue": puzzle.cue, "candidates": names, "associations": right})
        files["puzzles.jsonl"] = [json.dumps(row) for row in rows]  # ASCII: no line separator of Unicode's
    elif not data.labels:
        files["dataset_type.txt"] = ["retrieval"]
    return files


def _refuse_other(data: TaskData, written: TaskData, target: Path) -> None:
    """Raise RuntimeError where the written task does not read as its source."""

    def facts(one: TaskData) -> Sequence[object]:
        captions = [tuple(" ".join(text.splitlines()) for text in sample.captions) for sample in one.samples]
        return (len(one.samples), captions, one.labels, one.heads, one.puzzles)

    if written.broken or facts(written) != facts(data):
        raise RuntimeError(
            f"{target}: the written task differs from its source: {written.broken[:1] or data.task.name}"
        )
