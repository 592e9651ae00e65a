"""Folders that are whole or absent: a full disk, a rank that fails, files that are damaged later."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from disttempnet import distributed
from disttempnet.errors import UserError, UserNotice
from disttempnet.training import atomic_folder
from tests.full_disk import small_files
from tests.gloo import Pools


def two_files(folder: Path) -> list[Path]:
    (folder / "a.bin").write_bytes(bytes(range(100)))
    (folder / "b.bin").write_bytes(b"")
    return [folder / "a.bin", folder / "b.bin"]


@pytest.fixture
def target(tmp_path: Path) -> Path:
    """A folder that was written whole."""
    atomic_folder.write_folder(tmp_path / "step", two_files)
    return tmp_path / "step"


def test_a_whole_folder_has_all_files_and_nothing_is_beside_it(target: Path) -> None:
    assert sorted(p.name for p in target.iterdir()) == ["a.bin", "b.bin", "files.json"]
    assert [p.name for p in target.parent.iterdir()] == ["step"]
    assert atomic_folder.damage(target) == ""


def change(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[50] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("spoil", "found"),
    [
        (lambda folder: (folder / "a.bin").unlink(), "a.bin is missing"),
        (lambda folder: os.truncate(folder / "a.bin", 64), "a.bin has 64 bytes of 100"),
        (lambda folder: change(folder / "a.bin"), "a.bin has changed"),
        (lambda folder: os.truncate(folder / "files.json", 9), "files.json cannot be used (JSONDecodeError)"),
    ],
)
def test_damage_is_named(spoil: object, found: str, target: Path) -> None:
    spoil(target)  # type: ignore[operator]
    assert atomic_folder.damage(target) == found


def test_a_folder_without_a_listing_is_told(target: Path) -> None:
    """As in early versions: its files are verified by their own formats (test_checkpoint.py)."""
    (target / "files.json").unlink()
    with pytest.warns(UserNotice, match=r"step: has no files.json, so sizes and checksums cannot be compared"):
        assert atomic_folder.damage(target) == ""


def test_a_folder_of_the_same_name_is_replaced(target: Path) -> None:
    def other(folder: Path) -> list[Path]:
        (folder / "c.bin").write_bytes(b"c")
        return [folder / "c.bin"]

    atomic_folder.write_folder(target, other)
    assert sorted(p.name for p in target.iterdir()) == ["c.bin", "files.json"]
    assert [p.name for p in target.parent.iterdir()] == ["step"]


def test_what_is_removed_loses_its_name_first(target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as killed:
        killed.setattr(shutil, "rmtree", lambda *_, **__: None)  # as killed there, or as NFS keeps a file in use
        atomic_folder.remove_folder(target)
        assert not target.exists()
        (left,) = target.parent.iterdir()
    atomic_folder.remove_folder(target)
    (target.parent / ".writing-step-00000001-abc").mkdir()
    (target.parent / ".writing-best.json-17").touch()
    assert left.exists()
    atomic_folder.remove_leftovers(target.parent)
    assert list(target.parent.iterdir()) == []


@pytest.mark.parametrize("save", [torch.save, save_file], ids=["torch", "safetensors"])
def test_a_full_disk_is_one_line_and_leaves_nothing(save: object, tmp_path: Path) -> None:
    def large(folder: Path) -> list[Path]:
        save({"a": torch.zeros(200_000)}, folder / "large")  # type: ignore[operator]
        return [folder / "large"]

    reason = (
        r"step: cannot be written: .*; [\d,.]+ MB are free there. --resume auto continues from the last checkpoint$"
    )
    with small_files(300_000), pytest.raises(UserError, match=reason):
        atomic_folder.write_folder(tmp_path / "step", large)
    assert list(tmp_path.iterdir()) == []


def test_a_fault_of_the_program_stays_loud(tmp_path: Path) -> None:
    def broken(folder: Path) -> list[Path]:
        raise RuntimeError("boom")

    with pytest.raises(RuntimeError, match="boom"):
        atomic_folder.write_folder(tmp_path / "step", broken)
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_beside_the_checkpoints_is_one_line_too(tmp_path: Path) -> None:
    reason = r"metrics.jsonl: cannot be written: No space left on device; [\d,.]+ MB are free"
    with pytest.raises(UserError, match=reason), atomic_folder.full_disk_named(tmp_path):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(tmp_path / "metrics.jsonl"))
    with pytest.raises(PermissionError), atomic_folder.full_disk_named(tmp_path):
        raise PermissionError(errno.EACCES, "denied")


def one_rank_has_no_room(folder: str) -> tuple[str, list[str]]:
    """What a rank hears where rank 1 cannot write, and what is in the folder then."""

    def write(writing: Path) -> list[Path]:
        if distributed.rank() == 1:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        path = writing / f"{distributed.rank()}.bin"
        path.write_bytes(b"whole")
        return [path]

    try:
        atomic_folder.write_folder(Path(folder) / "step", write)
    except UserError as error:
        distributed.barrier()
        return str(error), os.listdir(folder)
    raise AssertionError("no rank may take it for written")


def test_all_ranks_hear_of_one_without_room(gloo: Pools, tmp_path: Path) -> None:
    (other, left), (own, _) = gloo(2, one_rank_has_no_room, str(tmp_path))
    assert left == []
    assert "No space left on device" in own
    assert other.startswith("rank 1: ")
    assert "No space left on device" in other


def shared_folder(folder: str, spoil: str) -> list[str]:
    def write(writing: Path) -> list[Path]:
        path = writing / f"{distributed.rank()}.bin"
        path.write_bytes(bytes(100))
        return [path]

    target = Path(folder) / "step"
    atomic_folder.write_folder(target, write)
    found = [atomic_folder.damage(target)]
    distributed.barrier()
    if distributed.is_main() and spoil:
        change(target / spoil)
    distributed.barrier()
    return [*found, atomic_folder.damage(target)]


def test_every_rank_learns_of_damage_that_one_finds(gloo: Pools, tmp_path: Path) -> None:
    assert gloo(2, shared_folder, str(tmp_path), "1.bin") == [["", "1.bin has changed"]] * 2


@pytest.mark.parametrize(
    "words", ["[enforce fail at inline_container.cc:672] . unexpected pos 64", "basic_ios::clear: iostream error"]
)
def test_what_torch_says_of_a_full_disk_is_one_line(words: str, tmp_path: Path) -> None:
    def write(folder: Path) -> list[Path]:
        raise RuntimeError(words)

    with pytest.raises(UserError, match="step: cannot be written: a file could not be written to its end"):
        atomic_folder.write_folder(tmp_path / "step", write)
    assert not [*tmp_path.iterdir()]


def test_other_errors_of_torch_stay_loud(tmp_path: Path) -> None:
    def write(folder: Path) -> list[Path]:
        raise RuntimeError("shapes do not fit")

    with pytest.raises(RuntimeError, match="shapes do not fit"):
        atomic_folder.write_folder(tmp_path / "step", write)
