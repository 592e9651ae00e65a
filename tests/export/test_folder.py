"""The folder of an export appears when it is complete, and no other files are replaced."""

from __future__ import annotations

from pathlib import Path

import pytest

from disttempnet.errors import UserError
from disttempnet.export.folder import export_folder


def test_it_appears_at_the_end_and_is_replaced_by_the_next(tmp_path: Path) -> None:
    out = tmp_path / "deep" / "out"
    for text in ("one", "two"):
        with export_folder(out) as folder:
            (folder / f"{text}.txt").write_text(text)
            assert not (out / f"{text}.txt").exists()
        assert [path.name for path in out.iterdir() if path.suffix] == [f"{text}.txt"]
    assert [path.name for path in out.parent.iterdir()] == ["out"]


def test_an_error_leaves_what_was_there(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with export_folder(out) as folder:
        (folder / "good").touch()
    with pytest.raises(ZeroDivisionError), export_folder(out) as folder:
        (folder / "bad").write_text(str(1 / 0))
    assert (out / "good").is_file()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_files_of_others_stay(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").touch()
    for out, message in (
        (tmp_path, "holds files that no export wrote"),
        (tmp_path / "mine.txt", "a file; name a folder"),
    ):
        with pytest.raises(UserError, match=message), export_folder(out):
            pytest.fail("entered")
    assert (tmp_path / "mine.txt").is_file()


def test_what_was_there_is_put_back_if_the_new_cannot_take_its_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, original, broken = tmp_path / "out", Path.rename, {"new"}
    with export_folder(out) as folder:
        (folder / "good").touch()

    def rename(path: Path, target: Path) -> Path:
        if path.name in broken:
            raise OSError(5, "Input/output error")
        return original(path, target)

    monkeypatch.setattr(Path, "rename", rename)
    with pytest.raises(UserError, match="cannot be written: Input/output error"), export_folder(out):
        pass
    assert (out / "good").is_file()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]

    # if that fails too, it is kept where it is, and the message says where
    broken.add("old")
    with pytest.raises(UserError, match="cannot be put back") as caught, export_folder(out):
        pass
    assert (Path(str(caught.value).partition("it is in ")[2]) / "good").is_file()
