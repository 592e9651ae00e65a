"""Writer of webdataset shards from any source: the same input gives the same bytes, and a killed command resumes.

A shard takes a fixed range of the source's samples, so that it depends on input and settings alone; unreadable samples
are left out. A shard is renamed when complete. `plan.json` records the input and the settings of a folder; others are
refused.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

from PIL import Image

from disttempnet.data.images import SCALES, EncodedImage
from disttempnet.data.source import OK, Source
from disttempnet.data.tools.unreadable import BAD_SAMPLE, Fault, fault_of, known_faults, read_faults, write_faults
from disttempnet.errors import UserError
from disttempnet.io.files import WRITING, atomic, locked, write_atomically
from disttempnet.io.jobs import run_jobs
from disttempnet.io.progress import Meter
from disttempnet.terminal import say

PLAN_FORMAT = "disttempnet-shards-1"
PLAN, SKIPPED, LOCK = "plan.json", "skipped.jsonl", ".lock"
SHARD_COUNT_FILE = "nshards.txt"  # as in CLIP_benchmark's data sets
SAMPLES_PER_REPORT = 50  # samples between a worker's messages


@dataclass(frozen=True)
class WriteSettings:
    """Settings of the shards.

    Attributes:
        samples_per_shard: usable samples of the source per shard.
        resize: shorter side in pixels that larger images are resized to; 0 = copy all bytes.
        quality: of resized JPEGs.
        captions: content of the .txt: the `first` caption, for training, or all as `lines`, for retrieval.
    """

    samples_per_shard: int = 10_000
    resize: int = 0
    quality: int = 95
    captions: Literal["first", "lines"] = "first"

    def __post_init__(self) -> None:
        if self.samples_per_shard < 1:
            raise UserError(f"--samples-per-shard {self.samples_per_shard}: a shard needs at least one sample")
        if self.resize < 0:
            raise UserError(f"--resize {self.resize}: pixels of the shorter side, or 0 to keep images as they are")
        if not 1 <= self.quality <= 100:
            raise UserError(f"--quality {self.quality}: JPEG quality is 1 to 100")


class PlannedShard(NamedTuple):
    """Shard to write: number, file name, and the ids [first, end) of its samples in the source."""

    number: int
    name: str
    first: int
    end: int

    def __str__(self) -> str:
        return self.name


class WriteResult(NamedTuple):
    """Content of the folder: shards, samples, bytes, and all samples that were left out."""

    shards: int
    samples: int
    size: int
    faults: list[Fault]


def write_shards(
    source: Source, folder: Path, settings: WriteSettings, workers: int, progress: bool = True
) -> WriteResult:
    """Write the usable samples of a source as shards; complete shards in the folder stay.

    Args:
        source: the data.
        folder: output folder, created if needed.
        settings: of the shards.
        workers: processes; 1 = this one. The bytes do not depend on it.
        progress: show a bar on standard error.

    Raises:
        UserError: the folder has other content, the disk is full, or webdataset is not installed.
    """
    _tar_writer()  # fail before the work
    parts = plan_shards(source, settings.samples_per_shard)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with locked(folder / LOCK, wait=False):
            _agree_on_plan(folder, source, settings, parts)
            _remove_leftovers(folder)
            try:
                _write_missing(source, folder, settings, parts, workers, progress)
            except (KeyboardInterrupt, SystemExit):
                whole = sum((folder / part.name).is_file() for part in parts)
                say(
                    f"stopped: {whole:,} of {len(parts):,} shards are complete; run the same command again to resume",
                    error=True,
                )
                raise
            finally:
                _remove_leftovers(folder)
            return _finish(source, folder, settings, parts)
    except BlockingIOError:
        raise UserError(f"{folder}: another command is writing shards here") from None
    except OSError as error:
        raise UserError(_cannot_write(folder, error)) from None


def plan_shards(source: Source, samples_per_shard: int) -> list[PlannedShard]:
    """Divide the ids into shards with the same number of usable ones, in order."""
    usable = source.usable
    starts = usable[::samples_per_shard].tolist()
    digits = max(5, len(str(len(starts) - 1)))
    ends = [*starts[1:], len(source)]
    return [PlannedShard(i, f"{i:0{digits}d}.tar", a, b) for i, (a, b) in enumerate(zip(starts, ends, strict=True))]


def _agree_on_plan(folder: Path, source: Source, settings: WriteSettings, parts: list[PlannedShard]) -> None:
    """Write plan.json, or compare with the existing one."""
    ours = {
        "format": PLAN_FORMAT,
        "input": source.where,
        "digest": source.digest,
        "shards": len(parts),
        **asdict(settings),
    }
    path = folder / PLAN
    if not path.is_file():
        others = [entry.name for entry in folder.glob("*.tar")]
        if others:
            raise UserError(f"{folder}: has other shards, such as {min(others)}; name another folder")
        write_atomically(path, json.dumps(ours, indent=2) + "\n")
        return
    try:
        theirs: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        known = theirs["format"] == PLAN_FORMAT
    except (ValueError, KeyError, TypeError):
        known = False
    if not known:
        raise UserError(f"{path}: not a plan of this version; name another folder, or delete {folder}")
    for key in ("digest", *asdict(settings)):
        if ours[key] != theirs.get(key):
            what = (
                f"another input ({theirs.get('input')}, or it has changed)"
                if key == "digest"
                else f"{key.replace('_', ' ')} {theirs.get(key)}, not {ours[key]}"
            )
            raise UserError(f"{folder}: its shards were made from {what}; name another folder, or delete this one")


def _remove_leftovers(folder: Path) -> None:
    """Remove partial files of killed workers; the caller holds the lock."""
    for pattern in (f"{WRITING}*", ".*.tar.*", f".{PLAN}.*"):  # the last two of earlier versions
        for entry in folder.glob(pattern):
            with suppress(FileNotFoundError):
                entry.unlink()


def _write_missing(
    source: Source, folder: Path, settings: WriteSettings, parts: list[PlannedShard], workers: int, progress: bool
) -> None:
    missing = [part for part in parts if not (folder / part.name).is_file()]
    waiting = sum(part.end - part.first for part in missing)
    total = sum(part.end - part.first for part in parts)
    with Meter("writing shards", total, total - waiting, active=progress) as meter:
        for _, count in run_jobs(partial(_write_part, source, folder, settings), missing, workers):
            meter.advance(count)


def _write_part(source: Source, folder: Path, settings: WriteSettings, part: PlannedShard) -> Iterator[int]:
    """Worker job: write a shard, and beside it the list of samples left out; yield the number of processed ids."""
    faults: list[Fault] = []
    reported = part.first
    try:
        with atomic(folder / part.name) as temporary:
            with temporary.open("wb") as file:
                writer = _tar_writer()(file, user="", group="", mode=0o644, mtime=0, encoder=False)
                try:
                    for sample in range(part.first, part.end):
                        if source.status_of(sample) == OK:
                            try:
                                members = sample_members(source, sample, settings)
                            except BAD_SAMPLE as error:
                                faults.append(fault_of(source, sample, error))
                            else:
                                writer.write({"__key__": f"{sample:09d}", **members})
                        if sample + 1 - reported >= SAMPLES_PER_REPORT:
                            yield sample + 1 - reported
                            reported = sample + 1
                finally:
                    writer.close()
            if faults:
                write_faults(faults, _list_of(folder, part))
    except OSError as error:
        raise UserError(_cannot_write(folder / part.name, error)) from None
    finally:
        source.close()
    yield part.end - reported


def sample_members(source: Source, sample: int, settings: WriteSettings) -> dict[str, bytes]:
    """Return suffix → content of the files of a sample.

    Raises:
        UnreadableImage, UnreadableCaption: it cannot be used.
        UserError: it is gone.
    """
    captions = source.captions(sample)
    data = source.image_bytes(sample)
    encoded = EncodedImage(data)
    size, shown = (encoded.width, encoded.height), _shown_size(encoded, settings.resize)
    facts: dict[str, Any] = {}
    with suppress(ValueError):  # a .json that is not JSON
        facts = dict(source.metadata(sample) or {})
    facts |= {"source": source.name(sample), "width": shown[0], "height": shown[1]}
    lines = settings.captions == "lines"
    if lines or len(captions) > 1:
        facts["captions"] = list(captions)
    suffix = _suffix(data)
    if shown != size:
        facts |= {"original_width": size[0], "original_height": size[1]}
        # a JPEG decodes fast at a fraction of its size; from twice the target size, pixels differ by .3 of 255
        scale = next((scale for scale in SCALES if min(size) >= 2 * scale * settings.resize), 1)
        image = encoded.rgb(scale).resize(shown, Image.Resampling.LANCZOS)
        suffix, data = "jpg", _encoded(image, "JPEG", quality=settings.quality)
    else:
        image = encoded.rgb()  # in any case, so that the shard has decodable images only
        if not suffix:
            suffix, data = "png", _encoded(image, "PNG")
    return {
        suffix: data,
        "txt": "\n".join(" ".join(text.split()) for text in captions).encode() if lines else captions[0].encode(),
        "json": json.dumps(facts, ensure_ascii=False, sort_keys=True).encode("utf-8"),
    }


def _suffix(data: bytes) -> str:
    """Return the suffix of a format that is copied as it is; empty for others."""
    if data.startswith(b"\xff\xd8\xff"):
        return "jpg"
    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        return "png"
    return "webp" if data[:4] == b"RIFF" and data[8:12] == b"WEBP" else ""


def _shown_size(image: EncodedImage, side: int) -> tuple[int, int]:
    """Return width and height after a resize of the shorter side to `side` pixels, if it is longer; 0 = unchanged."""
    shorter = min(image.width, image.height)
    if not side or shorter <= side:
        return image.width, image.height
    return max(side, round(image.width * side / shorter)), max(side, round(image.height * side / shorter))


def _encoded(image: Image.Image, format: str, **options: Any) -> bytes:
    file = io.BytesIO()
    image.info = {}  # no colour profile, no EXIF, as training reads the pixels alone
    image.save(file, format, **options)
    return file.getvalue()


def _list_of(folder: Path, part: PlannedShard) -> Path:
    return folder / f".{part.name.removesuffix('.tar')}.skipped"


def _finish(source: Source, folder: Path, settings: WriteSettings, parts: list[PlannedShard]) -> WriteResult:
    """Merge the lists of left-out samples, add those of the source, and write nshards.txt for evaluation."""
    path = folder / SKIPPED
    if not path.is_file():
        faults = list(known_faults(source, 0, len(source)))
        for part in parts:
            if _list_of(folder, part).is_file():
                faults += read_faults(_list_of(folder, part))
        write_faults(sorted(faults, key=lambda fault: fault.sample or 0), path)
    for part in parts:
        _list_of(folder, part).unlink(missing_ok=True)
    if settings.captions == "lines":
        write_atomically(folder / SHARD_COUNT_FILE, f"{len(parts)}\n")
    faults = list(read_faults(path))
    size = sum((folder / part.name).stat().st_size for part in parts)
    return WriteResult(len(parts), len(source) - len(faults), size, faults)


def _cannot_write(path: Path, error: OSError) -> str:
    return f"{path}: cannot be written: {error.strerror}; complete shards stay, run the same command again to resume"


def _tar_writer() -> Any:
    """Import webdataset's writer. Raises UserError if it is not installed."""
    try:
        from webdataset.writer import TarWriter
    except ImportError:
        raise UserError("writing shards needs webdataset: pip install 'disttempnet[shards]'") from None
    return TarWriter
