"""Tars of evaluation data: files by key, the last dot where the first gives no image, and no sample lost in silence."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Sequence
from pathlib import Path

from disttempnet.evaluation.tars import image_of, members_of, read_tar


def tar_of(path: Path, members: Sequence[tuple[str, bytes]]) -> Path:
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for name, data in members:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return path


def test_files_are_grouped_by_key_wherever_they_are(tmp_path: Path) -> None:
    path = tar_of(tmp_path / "0.tar", [("a.jpg", b"image a"), ("b.jpg", b"image b"), ("a.cls", b"7"), ("b.cls", b"8")])
    tar = read_tar(path)
    assert (tar.note, tar.repeated) == ("", ())
    assert {key: list(files) for key, files in tar.samples.items()} == {"a": ["jpg", "cls"], "b": ["jpg", "cls"]}
    image = image_of(tar.samples["b"])
    assert image is not None
    assert image.content is None
    assert path.read_bytes()[image.offset : image.offset + image.size] == b"image b"
    assert tar.samples["b"]["cls"].content == b"8"


def test_a_second_run_of_files_under_a_key_is_named(tmp_path: Path) -> None:
    members = [("a.jpg", b"1"), ("a.cls", b"1"), ("b.jpg", b"2"), ("b.cls", b"2"), ("a.jpg", b"3"), ("a.cls", b"3")]
    members += [("mr. c.jpg", b"4"), ("mr. d.jpg", b"5"), ("mr. c.jpg", b"6")]
    path = tar_of(tmp_path / "0.tar", members)
    broken: list[str] = []
    found = {name: files for name, _, files in members_of([path], broken)}
    assert list(found) == ["0.tar/a", "0.tar/b", "0.tar/mr. c", "0.tar/mr. d"]
    assert found["0.tar/a"]["cls"].content == b"1", "the first ones count"
    why = "the key comes twice in this tar; only its first files are read"
    assert broken == [f"0.tar/a: {why}", f"0.tar/mr. c: {why}"]


def test_a_tar_that_is_cut_off_gives_what_is_before(tmp_path: Path) -> None:
    path = tar_of(tmp_path / "0.tar", [("a.jpg", b"1" * 600), ("a.cls", b"1"), ("b.jpg", b"2" * 600), ("b.cls", b"2")])
    path.write_bytes(path.read_bytes()[: 512 + 1024 + 512 + 512 + 512 + 100])  # inside b.jpg
    broken: list[str] = []
    assert [name for name, _, _ in members_of([path], broken)] == ["0.tar/a"]
    assert broken == ["0.tar: cut off at byte 3,172, inside b.jpg"]


def test_names_that_differ_in_case_alone_are_samples(tmp_path: Path) -> None:
    path = tar_of(tmp_path / "0.tar", [("shot_v1.3A.jpg", b"1"), ("shot_v1.3a.jpg", b"2")])
    tar = read_tar(path)
    assert tar.repeated == ()
    assert sorted(tar.samples) == ["shot_v1.3A", "shot_v1.3a"]
