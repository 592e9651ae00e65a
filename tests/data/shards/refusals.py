"""What tests of shards share: the message of a refusal, and entries of tars."""

import io
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest

from disttempnet.data import (
    open_index,
)
from disttempnet.errors import UserError
from tests.data.conftest import sample, write_shard

Write = Callable[..., Path]


def refusal(spec: object, index_path: str = "") -> str:
    """The one line that opening fails with."""
    with pytest.raises(UserError) as caught:
        open_index(str(spec), index_path, progress=False)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def link_entry(name: str, kind: bytes) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type = kind
    return info


def member_entry(name: str) -> tuple[tarfile.TarInfo, object]:
    info = link_entry(name, tarfile.DIRTYPE if name == "folder" else tarfile.REGTYPE)
    info.size = 0 if name == "folder" else len(name)
    return info, io.BytesIO(name.encode())


def replace_same_size(folder: Path) -> Path:
    for n in range(2):
        write_shard(folder / f"0000{n}.tar", {"a": sample(n), "b": sample(n + 5)})
    return folder
