"""Download of CC3M and CC12M as ready shards of the Hugging Face Hub, resumable; sizes and sha256 from its API."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from disttempnet.errors import UserError
from disttempnet.io.files import read_json_lines, unwritable_named
from disttempnet.sanitize import brief

HUB_REPOSITORIES = {"cc3m": "pixparse/cc3m-wds", "cc12m": "pixparse/cc12m-wds"}
CHECKED = ".hub-shards.jsonl"  # in the folder: shards whose content was compared with the hub's sha256
HUB_ATTEMPTS = 4
HUB_PAUSE = 1.0  # seconds before the second attempt; each further pause is four times as long


class HubShard(NamedTuple):
    """A shard on the hub: its file name, bytes, and sha256 in hexadecimal digits."""

    name: str
    size: int
    sha256: str


@dataclass(frozen=True)
class HubShards:
    """The shards of a data set at one commit of its repository."""

    repository: str
    revision: str
    shards: tuple[HubShard, ...]

    @property
    def bytes(self) -> int:
        return sum(shard.size for shard in self.shards)


def list_hub_shards(name: str) -> HubShards:
    """Ask the hub for the shards of the train split, NAME-train-0000.tar and so on.

    Args:
        name: cc3m or cc12m.

    Raises:
        UserError: the hub cannot be reached, refuses, or holds no such shards.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.hf_api import RepoFile

    repository, found = HUB_REPOSITORIES[name], []
    api = HfApi(library_name="disttempnet")

    def ask() -> tuple[str, list[Any]]:
        revision = api.dataset_info(repository).sha or "main"
        return revision, list(api.list_repo_tree(repository, repo_type="dataset", revision=revision, recursive=True))

    revision, tree = _asked(ask, repository)
    for file in tree:
        if isinstance(file, RepoFile) and re.fullmatch(rf"{name}-train-\d+\.tar", file.path):
            if file.lfs is None:
                raise UserError(f"{repository}: the hub gives no sha256 of {file.path}")
            found.append(HubShard(file.path, file.size, file.lfs.sha256))
    if not found:
        raise UserError(f"{repository}: holds no {name}-train-*.tar at {revision}")
    return HubShards(repository, revision, tuple(sorted(found)))


def missing_shards(listed: HubShards, out: Path) -> list[HubShard]:
    """Return the shards that are not in the folder, or were never compared with the hub's sha256.

    A shard that was compared counts as long as its size and its mtime have not changed.
    """
    checked = {line["name"]: line for _, line in read_json_lines(out / CHECKED, _checked_line)}
    facts = {shard: _facts(out / shard.name, shard) for shard in listed.shards}
    return [shard for shard, now in facts.items() if now is None or checked.get(shard.name) != now]


def to_download(wanted: Sequence[HubShard], out: Path) -> list[HubShard]:
    """Return those of the shards that are not in the folder with the hub's size; the others are to be compared."""
    return [shard for shard in wanted if _facts(out / shard.name, shard) is None]


def _checked_line(line: dict[str, Any]) -> tuple[str, int]:
    return str(line["name"]), int(line["mtime_ns"])


def _facts(path: Path, shard: HubShard) -> dict[str, Any] | None:
    """Return the line of a shard that lies in the folder with the hub's size; None where it does not."""
    if not path.is_file() or path.stat().st_size != shard.size:
        return None
    return {**shard._asdict(), "mtime_ns": path.stat().st_mtime_ns}


def check_space(listed: HubShards, wanted: Sequence[HubShard], out: Path) -> None:
    """Raise UserError where the disk has too little space for the shards that are wanted."""
    with unwritable_named(out):
        out.mkdir(parents=True, exist_ok=True)
    free = free_space(out)
    need = sum(shard.size for shard in to_download(wanted, out))
    if need > free:
        missing, whole, left = (f"{size / 1e9:,.1f} GB" for size in (need, listed.bytes, free))
        raise UserError(
            f"{out}: {missing} of {whole} are missing, and {left} are free: free some space, or name a folder on a "
            "larger disk with --out (--dry-run lists the shards with their bytes)"
        )


def free_space(folder: Path) -> int:
    """Return the free bytes of the disk that a folder is on, or will be on."""
    there = next(place for place in (folder.absolute(), *folder.absolute().parents) if place.is_dir())
    return shutil.disk_usage(there).free


def fetch_shard(listed: HubShards, out: Path, shard: HubShard) -> Iterator[HubShard]:
    """Fetch one shard, compare it, and yield it: a job of `run_jobs`.

    A part of an earlier attempt is continued. Content with another sha256 is removed and fetched again.

    Raises:
        UserError: the hub refuses, or the content is wrong again and again.
    """
    from huggingface_hub import HfApi, utils

    utils.disable_progress_bars()  # type: ignore[attr-defined]
    path = out / shard.name
    for attempt in range(HUB_ATTEMPTS):
        if _facts(path, shard) is None or attempt:
            fetch = partial(
                HfApi(library_name="disttempnet").hf_hub_download,
                listed.repository,
                shard.name,
                repo_type="dataset",
                revision=listed.revision,
                local_dir=out,
                force_download=path.exists(),
            )
            _asked(fetch, f"{listed.repository}: {shard.name}")
        with path.open("rb") as file:
            if path.stat().st_size == shard.size and hashlib.file_digest(file, "sha256").hexdigest() == shard.sha256:
                yield shard
                return
    path.unlink()
    raise UserError(
        f"{path}: its content is not the hub's after {HUB_ATTEMPTS} attempts (sha256 {shard.sha256}); removed"
    )


def note_checked(out: Path, shard: HubShard) -> None:
    """Add a shard that was compared to the list in the folder."""
    facts = _facts(out / shard.name, shard)
    with unwritable_named(out / CHECKED), (out / CHECKED).open("a", encoding="utf-8") as file:
        file.write(json.dumps(facts) + "\n")


def _asked(ask: Callable[[], Any], what: str) -> Any:
    """Return the hub's answer; what may pass (a lost connection, a busy server) is tried again after a pause.

    Raises:
        UserError: the last attempt failed, or another one would be in vain.
    """
    from huggingface_hub import errors

    network: type[Exception] = getattr(errors, "HTTPError", OSError)
    pause = HUB_PAUSE
    for attempt in range(HUB_ATTEMPTS):
        try:
            return ask()
        except (network, OSError, ValueError) as error:
            status = getattr(getattr(error, "response", None), "status_code", 0)
            refused = 400 <= status < 500 and status not in (408, 429)
            in_vain = refused or isinstance(error, errors.OfflineModeIsEnabled)
            if in_vain or attempt == HUB_ATTEMPTS - 1:
                hint = "; run the same command again to resume" if not in_vain else ""
                raise UserError(f"{what}: {brief(error, 300)}{hint}") from None
        time.sleep(pause)
        pause *= 4
    raise AssertionError("the last attempt returns or raises")
