"""Download of CC3M and CC12M from their public lists of URLs, with img2dataset."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from disttempnet.data.shards.store import file_fingerprint
from disttempnet.errors import UserError
from disttempnet.io.files import atomic, unreadable_named, unwritable_named


@dataclass(frozen=True)
class UrlList:
    """Public list of URLs: file name, origin and size."""

    file: str
    origin: str
    size: str


LISTS = {
    "cc3m": UrlList(
        "Train_GCC-training.tsv", "https://ai.google.com/research/ConceptualCaptions/download (Train split)", "500 MB"
    ),
    "cc12m": UrlList("cc12m.tsv", "https://storage.googleapis.com/conceptual_12m/cc12m.tsv", "2.6 GB"),
}


@dataclass(frozen=True)
class Download:
    """Settings of a download.

    Attributes:
        name: cc3m or cc12m.
        tsv: the list, captions and URLs in either order, with or without a header.
        out: folder of the shards.
        processes, threads: of img2dataset; threads per process.
        image_size: shorter side in pixels that larger images are resized to.
    """

    name: str
    tsv: Path
    out: Path
    processes: int
    threads: int
    image_size: int

    def __post_init__(self) -> None:
        for key in ("processes", "threads", "image_size"):
            if getattr(self, key) < 1:
                raise UserError(f"--{key.replace('_', '-')} {getattr(self, key)}: at least 1")

    @property
    def headed(self) -> Path:
        """Copy of the list for img2dataset; its name has the fingerprint of the list."""
        return self.out / f"{self.name}-{file_fingerprint(self.tsv)[:8]}.tsv"

    @property
    def command(self) -> list[str]:
        """Command of img2dataset with its arguments."""
        arguments = {
            "url_list": self.headed,
            "input_format": "tsv",
            "url_col": "url",
            "caption_col": "caption",
            "output_format": "webdataset",
            "output_folder": self.out,
            "processes_count": self.processes,
            "thread_count": self.threads,
            "number_sample_per_shard": 10_000,
            "image_size": self.image_size,
            "resize_mode": "keep_ratio",  # of the shorter side
            "resize_only_if_bigger": True,
            "encode_format": "jpg",
            "encode_quality": 95,
            "timeout": 10,
            "retries": 2,
            "incremental_mode": "incremental",
            "enable_wandb": False,
        }
        return ["img2dataset", *(word for key, value in arguments.items() for word in (f"--{key}", str(value)))]


def check_list(job: Download) -> None:
    """Raise UserError if the list is missing, or is not a list of captions and URLs."""
    if not job.tsv.is_file():
        known = LISTS[job.name]
        raise UserError(f"{job.tsv}: no such file; get it ({known.size}) from {known.origin} and name it with --tsv")
    with unreadable_named(job.tsv), job.tsv.open(encoding="utf-8", errors="replace") as file:
        _url_column(job.tsv, file.readline(), file.readline())


def _url_column(path: Path, first: str, second: str) -> int:
    """Return the number of the column with URLs, of two."""
    for line in (first, second):
        fields = line.rstrip("\n").split("\t")
        columns = [number for number, field in enumerate(fields) if field.startswith(("http://", "https://"))]
        if len(fields) == 2 and len(columns) == 1:
            return columns[0]
    raise UserError(f"{path}: not a list of captions and URLs, separated by a tab: {first[:80].strip()!r}")


def write_headed(job: Download) -> int:
    """Write the list for img2dataset: with a header, and with quotes around captions that have a quotation mark.

    Without these quotes such a caption would take in the lines after it.

    Returns:
        Number of lines that are left out, as they do not have two columns.

    Raises:
        UserError: the folder cannot be written, or belongs to another list.
    """
    others = [path.name for path in job.out.glob(f"{job.name}-*.tsv") if path != job.headed]
    if others:
        raise UserError(f"{job.out}: was started with another list, {others[0]}; name another folder")
    left_out = 0
    with unwritable_named(job.out):
        job.out.mkdir(parents=True, exist_ok=True)
        if job.headed.is_file():
            return 0
        with atomic(job.headed) as temporary, temporary.open("w", encoding="utf-8", newline="\n") as file:
            file.write("url\tcaption\n")
            for row in _rows(job.tsv):
                if row is None:
                    left_out += 1
                else:
                    file.write("\t".join(map(_quoted, row)) + "\n")
    return left_out


def _rows(path: Path) -> Iterator[tuple[str, str] | None]:
    """Yield (URL, caption) of each line except a header; None for a malformed line."""
    with unreadable_named(path), path.open(encoding="utf-8", errors="replace", newline="\n") as file:
        first, second = file.readline(), file.readline()
        column = _url_column(path, first, second)
        file.seek(0)
        for number, line in enumerate(file):
            fields = line.rstrip("\r\n").split("\t")
            if number == 0 and sorted(field.lower() for field in fields) == ["caption", "url"]:
                continue
            yield (fields[column], fields[1 - column]) if len(fields) == 2 and fields[column] else None


def _quoted(field: str) -> str:
    return '"' + field.replace('"', '""') + '"' if '"' in field else field


class DownloadResult(NamedTuple):
    """Progress of a download: complete shards, samples, failures by reason."""

    shards: int
    samples: int
    failures: Counter[str]


def run_download(job: Download) -> int:
    """Run img2dataset to its end; complete shards stay.

    Returns:
        Its exit code.

    Raises:
        UserError: it is not installed.
    """
    beside = os.path.join(os.path.dirname(sys.executable), "img2dataset")
    program = beside if os.access(beside, os.X_OK) else shutil.which("img2dataset")
    if program is None:
        raise UserError("downloading needs img2dataset: pip install 'disttempnet[download]'")
    environment = {**os.environ, "NO_ALBUMENTATIONS_UPDATE": "1"}
    process = subprocess.Popen([program, *job.command[1:]], env=environment, start_new_session=True)
    try:
        return process.wait()
    finally:
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)  # with its child processes
        process.wait()


def download_result(folder: Path) -> DownloadResult:
    """Read img2dataset's statistics of each complete shard; a partial file of a killed one is ignored."""
    shards, samples, failures = 0, 0, Counter[str]()
    for path in sorted(folder.glob("*_stats.json")):
        try:
            stats = json.loads(path.read_text(encoding="utf-8"))
        except ValueError:
            continue
        shards, samples = shards + 1, samples + stats["successes"]
        failures.update({reason: count for reason, count in stats["status_dict"].items() if reason != "success"})
    return DownloadResult(shards, samples, failures)


def as_typed(command: list[str]) -> str:
    """Return a command as typed in a shell, one argument per line."""
    return shlex.join(command).replace(" --", " \\\n  --")
