"""Atomic writes: whole or not at all, never through a link, with the permissions of any new file."""

from __future__ import annotations

import errno
import io
import os
import socket
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from PIL import Image

from disttempnet.cli.main import main
from disttempnet.data.builtin.cache import write_shard
from disttempnet.errors import UserError
from disttempnet.io import files
from disttempnet.io.columns import temporary_index
from disttempnet.io.files import (
    UnfitFile,
    atomic,
    follow_umask,
    locked,
    read_regular,
    refuse_unwritable,
    write_atomically,
    write_output,
)
from tests.full_disk import small_files
from tests.report.synthetic import write_run


@contextmanager
def umask(mask: int) -> Iterator[None]:
    before = os.umask(mask)
    try:
        yield
    finally:
        os.umask(before)


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


@pytest.mark.parametrize(("mask", "expected"), [(0o022, 0o644), (0o002, 0o664), (0o077, 0o600)])
def test_permissions_follow_the_umask(mask: int, expected: int, tmp_path: Path) -> None:
    with umask(mask):
        write_atomically(tmp_path / "a", "x")
        with atomic(tmp_path / "b") as temporary:  # a writer that makes a file of its own, for its owner alone
            temporary.unlink()
            temporary.touch(0o600)
        (tmp_path / "c").touch(0o600)
        follow_umask(tmp_path / "c")
    assert [mode(tmp_path / name) for name in "abc"] == [expected] * 3
    assert sorted(os.listdir(tmp_path)) == ["a", "b", "c"]


def test_a_link_at_the_temporary_name_is_not_followed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    victim = tmp_path / "victim"
    victim.write_text("precious")
    monkeypatch.setattr(files.secrets, "token_hex", lambda _: "guessed")
    (tmp_path / ".writing-a-guessed").symlink_to(victim)
    with pytest.raises(FileExistsError):
        write_atomically(tmp_path / "a", "x")
    assert victim.read_text() == "precious"
    assert (tmp_path / ".writing-a-guessed").is_symlink(), "it is not ours to remove"


def test_temporaries_have_other_names_each_time(tmp_path: Path) -> None:
    names = set()
    for _ in range(20):
        with atomic(tmp_path / "a") as temporary:
            names.add(temporary.name)
    assert len(names) == 20
    assert all(len(name) == len(".writing-a-") + 16 for name in names)


@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO])
def test_a_disk_that_takes_no_more_leaves_the_old_file(
    error: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a").write_text("old")

    def full(_: int) -> None:
        raise OSError(error, os.strerror(error))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match=f"a: cannot be written: {os.strerror(error)}$"):
        write_output(tmp_path / "a", "new")
    assert (tmp_path / "a").read_text() == "old"
    assert os.listdir(tmp_path) == ["a"]


def test_an_interrupt_leaves_nothing(tmp_path: Path) -> None:
    def interrupted() -> None:
        with atomic(tmp_path / "a") as temporary:
            temporary.write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert os.listdir(tmp_path) == []


def test_the_longest_name_can_be_written(tmp_path: Path) -> None:
    path = tmp_path / ("ü" * 125 + ".html")
    refuse_unwritable(path)
    write_output(path, "x")
    assert path.read_text() == "x"


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("folder", "it is a folder"),
        ("file/x.html", "file is no folder"),
        (f"{'x' * 256}.html", "File name too long"),
    ],
)
def test_what_cannot_be_written_is_refused_before_the_work(name: str, why: str, tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=f"cannot be written: .*{why}"):
        refuse_unwritable(tmp_path / name)


def test_a_folder_that_takes_no_files_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda *_: False)  # root may write everywhere
    with pytest.raises(UserError, match="no permission to write into"):
        refuse_unwritable(tmp_path / "new" / "x.html")


def test_what_is_no_file_is_written_to_as_it_is(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    write_atomically(tmp_path / "pipe", "through")
    assert os.read(reader, 100) == b"through"
    os.close(reader)
    assert stat.S_ISFIFO((tmp_path / "pipe").stat().st_mode)


def test_a_device_does_not_depend_on_its_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever may not make files in /dev may write to /dev/null."""
    allowed = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: str(path) != "/dev" and allowed(path, mode))
    for path in (Path("/dev/null"), Path("/dev/stdout")):
        refuse_unwritable(path)
    with pytest.raises(UserError, match="no permission to write into /dev"):
        refuse_unwritable(Path("/dev/new"))
    os.mkfifo(tmp_path / "pipe")
    monkeypatch.setattr(os, "access", lambda path, mode: path != tmp_path / "pipe" and allowed(path, mode))
    with pytest.raises(UserError, match="pipe: cannot be written: permission denied"):
        refuse_unwritable(tmp_path / "pipe")


@pytest.mark.parametrize("link", [False, True])
def test_a_device_is_never_replaced(link: bool, tmp_path: Path) -> None:
    """Root could: /dev/null would be a file from then on."""
    os.mkfifo(tmp_path / "pipe")
    reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    path = tmp_path / "pipe"
    if link:
        path = tmp_path / "link"
        path.symlink_to("pipe")
    write_output(path, "text")
    with pytest.raises(UserError, match=r"the index cannot be written \(not a regular file\)"), temporary_index(path):
        pass
    assert os.read(reader, 100) == b"text"
    os.close(reader)
    assert stat.S_ISFIFO(path.stat().st_mode)
    assert path.is_symlink() == link


def test_only_regular_files_are_read(tmp_path: Path) -> None:
    """What data names may be a device without an end, or a pipe that nobody writes to: neither is waited for."""
    (tmp_path / "file").write_bytes(b"x" * 100)
    (tmp_path / "link").symlink_to("file")
    (tmp_path / "zero").symlink_to("/dev/zero")
    os.mkfifo(tmp_path / "pipe")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "socket"))
    for name in ("file", "link"):
        assert read_regular(tmp_path / name, 100) == b"x" * 100
    with pytest.raises(UnfitFile, match="over 99 bytes"):
        read_regular(tmp_path / "file", 99)
    for path in ("/dev/zero", "/dev/null", tmp_path / "zero", tmp_path / "pipe", tmp_path / "socket"):
        with pytest.raises(UnfitFile, match="not a regular file"):
            read_regular(path, 100)
    with pytest.raises(UnfitFile, match="over 1,000 bytes"):
        read_regular("/proc/self/maps", 1000)  # regular, and of no size by its own account
    with pytest.raises(IsADirectoryError):
        read_regular(tmp_path, 100)
    with pytest.raises(FileNotFoundError):
        read_regular(tmp_path / "gone", 100)


# ---- commands, on a disk that takes no more than so many bytes of a file, and in folders that take none ----


EMOJI = "embedded:emoji/train"
COMMANDS = {
    "preview.png": ["data", "preview", EMOJI, "--count", "8", "--out"],
    "preview.html": ["data", "preview", EMOJI, "--count", "8", "--out"],
    "broken.jsonl": ["data", "verify", "{shards}", "--workers", "1", "--out"],
    "shards/00000.tar": ["data", "shard", EMOJI, "--workers", "1", "--out"],
    "report.html": ["report", "{run}", "--out"],
    "report.md": ["report", "{run}", "--out"],
    "report.csv": ["report", "{run}", "--out"],
    "report.tex": ["report", "{run}", "--out"],
    "report.jsonl": ["report", "{run}", "--out"],
}


def command(name: str, folder: Path) -> list[str]:
    given = {"run": folder / "run", "shards": folder / "broken" / "{00000..00000}.tar"}
    words = [word.format(**given) if word in ("{run}", "{shards}") else word for word in COMMANDS[name]]
    return [*words, str(folder / "out" / name.partition("/")[0])]


@pytest.fixture
def inputs(tmp_path: Path) -> Path:
    """A run with numbers, and a shard of which nothing is an image."""
    write_run(tmp_path / "run", tasks=("emoji-concepts",))
    (tmp_path / "broken").mkdir()
    (tmp_path / "out").mkdir()
    members = [(f"{n:04d}.{kind}", b"no image") for n in range(60) for kind in ("jpg", "txt")]
    good = io.BytesIO()
    Image.new("RGB", (8, 8)).save(good, "PNG")
    write_shard(tmp_path / "broken" / "00000.tar", [*members, ("9999.png", good.getvalue()), ("9999.txt", b"x")])
    assert main(["data", "index", str(tmp_path / "broken" / "{00000..00000}.tar"), EMOJI, "--workers", "1"]) == 0
    return tmp_path


@pytest.mark.parametrize("name", COMMANDS)
def test_a_full_disk_is_one_line_and_leaves_nothing_half_written(
    name: str, inputs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    with small_files(100):
        code = main(command(name, inputs))
    printed = capsys.readouterr().err
    assert code == 2, printed
    (line,) = [line for line in printed.splitlines() if line.startswith("disttempnet: ")]
    assert ": cannot be written: File too large" in line
    left = [path.name for path in (inputs / "out").rglob("*") if path.is_file()]
    assert set(left) <= {".lock"}, left


@pytest.mark.parametrize("name", [name for name in COMMANDS if "/" not in name])
def test_a_folder_that_takes_no_files_is_told_before_the_work(
    name: str, inputs: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    allowed = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: "out" not in str(path) and allowed(path, mode))
    worked: list[str] = []
    for work in ("data.tools.preview.draw_samples", "data.tools.verify.verify", "report.write.read_results"):
        monkeypatch.setattr(f"disttempnet.{work}", lambda *_, **__: worked.append("read"))
    assert main(command(name, inputs)) == 2
    out = inputs / "out"
    assert (
        f"disttempnet: {out / name}: cannot be written: no permission to write into {out}\n" in capsys.readouterr().err
    )
    assert worked == []


def test_a_lock_is_held_by_one_at_a_time(tmp_path: Path) -> None:
    with locked(tmp_path / "lock"), pytest.raises(BlockingIOError), locked(tmp_path / "lock", wait=False):
        pytest.fail("two hold the lock")
    with locked(tmp_path / "lock", wait=False):
        pass


def test_a_file_is_replaced_as_a_whole_bytes_or_text(tmp_path: Path) -> None:
    path = tmp_path / "file"
    for content in ("τ", b"\x00\xff"):
        write_atomically(path, content)
        assert path.read_bytes() == (content if isinstance(content, bytes) else content.encode())
    assert list(tmp_path.iterdir()) == [path]
