"""The built rows are those of the plain loop, whatever builds them and however often it is killed."""

import json
import signal
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from filelock import FileLock

from disttempnet.cli.main import main
from disttempnet.data.icons import build
from disttempnet.data.icons.build import BUILDING, build_icons
from disttempnet.data.icons.release import SPLITS, Count
from disttempnet.errors import UserError, UserNotice
from tests.data.icons.scenario import expected_splits, release

COLUMNS = ("image", "caption", "concept", "style", "vendor", "category", "license", "frequency")
KILLED = """
import sys, time
from pathlib import Path
from disttempnet.data.icons import build
from tests.data.icons.scenario import release
draw = build.draw
def slowly(icon):
    time.sleep(0.01)
    return draw(icon)
build.draw = slowly
out, package = map(Path, sys.argv[1:])
build.build_icons(out, package, 1, release(package), progress=False)
"""


def content(out: Path) -> dict[str, bytes]:
    """All files but the manifest, which names versions."""
    return {str(path.relative_to(out)): path.read_bytes() for path in sorted(out.rglob("*")) if path.is_file()}


def test_rows_are_those_of_the_plain_loop(package: Path, built: Path) -> None:
    expected = expected_splits(package)
    for split in SPLITS:
        rows = pq.read_table(built / split).to_pylist()
        assert rows == [{key: row[key] for key in COLUMNS} for row in expected[split]]
        assert pq.ParquetFile(built / split / "00000.parquet").schema_arrow.names == list(COLUMNS)
    counts = {split: len(rows) for split, rows in expected.items()}
    assert counts == {"train": 170, "val": 36, "val_concepts": 44}


def test_what_is_left_out(package: Path, built: Path) -> None:
    rows = [row for split in SPLITS for row in pq.read_table(built / split).to_pylist()]
    odd = {row["image"]["path"] for row in rows if row["vendor"] == "zz-odd"}
    assert odd == {"zz-odd/copied-32.webp", "zz-odd/red.webp", "zz-odd/wide.webp"}
    assert {"twemoji", "closed"}.isdisjoint(row["vendor"] for row in rows)


def test_held_out_means_held_out(built: Path) -> None:
    train, val, unseen = (pq.read_table(built / split).to_pylist() for split in SPLITS)
    concepts = {row["concept"] for row in train}
    assert {row["vendor"] for row in val} == {"carbon", "eva", "iconoir"}
    assert {row["vendor"] for row in val}.isdisjoint(row["vendor"] for row in train)
    assert {row["concept"] for row in val} <= concepts
    assert {row["concept"] for row in unseen}.isdisjoint(concepts)
    for row in train + val + unseen:
        assert row["frequency"] == sum(other["concept"] == row["concept"] for other in train)


def test_credits_name_each_vendor_in_the_set(built: Path) -> None:
    text = (built / "LICENSES.md").read_text()
    assert "| lucide | 17 | Lucide | Lucide Contributors | ISC |\n" in text
    assert "| zz-odd | 3 | Zz-Odd | A / B | MIT |\n" in text
    assert "closed" not in text
    rows = [line.split("|") for line in text.splitlines() if line.startswith("| ")][1:]
    assert sum(int(row[2]) for row in rows) == 170 + 36 + 44


def test_workers_change_nothing(package: Path, built: Path, tmp_path: Path) -> None:
    build_icons(tmp_path / "out", package, workers=2, release=release(package), progress=False)
    assert content(tmp_path / "out") == content(built)


def test_a_killed_build_goes_on(package: Path, built: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    process = subprocess.Popen([sys.executable, "-c", KILLED, str(out), str(package)])
    deadline = time.monotonic() + 300
    while not (done := list(out.glob(f"{BUILDING}/drawn-*/*.parquet"))) and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert done
    assert not (out / "icons.json").exists()
    drawn: list[int] = []
    monkeypatch.setattr(build, "draw", lambda icon, draw=build.draw: drawn.append(1) or draw(icon))
    build_icons(out, package, release=release(package), progress=False)
    rest = len(drawn)
    assert content(out) == content(built)
    build_icons(tmp_path / "whole", package, release=release(package), progress=False)
    assert 0 < rest < len(drawn) - rest


def test_ctrl_c_says_how_far_it_is(
    package: Path, built: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    out, draw, left = tmp_path / "out", build.draw, iter(range(150))

    def interrupted(icon: object) -> object:
        if next(left, None) is None:
            raise KeyboardInterrupt
        return draw(icon)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(build, "draw", interrupted)
        with pytest.raises(KeyboardInterrupt):
            build_icons(out, package, workers=1, release=release(package), progress=False)
    assert "stopped: 5 of 14 vendors are drawn; the same command goes on" in capfd.readouterr().err
    build_icons(out, package, workers=1, release=release(package), progress=False)
    assert content(out) == content(built)


def test_killed_while_it_writes(package: Path, built: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(build, "write_credits", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            build_icons(out, package, release=release(package), progress=False)
    (out / "val" / "00000.parquet").unlink()
    build_icons(out, package, release=release(package), progress=False)
    assert content(out) == content(built)


def test_a_built_folder_is_left_alone(package: Path, built: Path) -> None:
    before = content(built)
    counts = build_icons(built, package, release=release(package), progress=False)
    assert counts["train"] == Count(170, 52, 11)
    assert content(built) == before


def test_what_is_there_is_not_replaced(package: Path, tmp_path: Path) -> None:
    (tmp_path / "val").mkdir()
    with pytest.raises(UserError, match=r"holds val and no icons\.json: name another folder"):
        build_icons(tmp_path, package, release=release(package), progress=False)


def test_two_builds_in_one_folder(package: Path, tmp_path: Path) -> None:
    (tmp_path / BUILDING).mkdir()
    with (
        FileLock(tmp_path / BUILDING / "lock"),
        pytest.raises(UserError, match="another command is building the icons here"),
    ):
        build_icons(tmp_path, package, release=release(package), progress=False)


def test_other_counts_are_refused(package: Path, tmp_path: Path) -> None:
    right = release(package)
    more = replace(right, counts={**right.counts, "val": Count(37, 24, 3)})
    what = r"val: 36 pairs of 24 concepts by 3 vendors, where @iconify/json@2\.2\.535 gives 37 pairs .*; the package is"
    with pytest.raises(UserError, match=what):
        build_icons(tmp_path / "a", package, release=more, progress=False)
    with pytest.raises(UserError, match=r"resvg-py 0\.5\.0 draws other pictures than 9\.9: pip install resvg-py==9\.9"):
        build_icons(tmp_path / "b", package, release=replace(more, renderer="9.9"), progress=False)
    assert not (tmp_path / "a" / "train").exists()


def test_other_words_are_refused_and_other_pixels_said(package: Path, tmp_path: Path) -> None:
    right = release(package)
    with pytest.raises(UserError, match="the rows are others than those of @iconify/json"):
        build_icons(tmp_path / "a", package, release=replace(right, rows="0"), progress=False)
    with pytest.warns(UserNotice, match="with other pixels"):
        build_icons(tmp_path / "b", package, release=replace(right, pixels="0"), progress=False)
    manifest = json.loads((tmp_path / "b" / "icons.json").read_text())
    assert manifest["pixels"] == right.pixels


@pytest.mark.parametrize("library", ["resvg_py", "pyarrow"])
def test_a_missing_library_is_one_line(
    library: str, package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(UserError, match=rf"building the icons needs {library}: pip install 'disttempnet\[icons\]'"):
        build_icons(tmp_path / "out", package, release=release(package), progress=False)
    assert not (tmp_path / "out").exists()


def test_the_command_says_what_to_do_next(
    package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(build, "build_icons", partial(build_icons, release=release(package)))
    out = tmp_path / "out"
    assert main(["data", "icons", str(out), "--package", str(package), "--workers", "1"]) == 0
    said = capfd.readouterr().out
    assert "train         170 pairs of 52 concepts by 11 vendors\n" in said
    assert f'data.train={out}/train \'eval.tasks=["icons-artists", "icons-concepts"]\' eval.data_root={out}\n' in said
