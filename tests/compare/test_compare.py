"""A comparison: trained as `train` does, resumed, one command at a time; what it leaves."""

from __future__ import annotations

import fcntl
import json
from pathlib import Path

import pytest

from disttempnet.cli.main import main
from disttempnet.compare import _report
from disttempnet.compare.grid import load_grid
from disttempnet.training.trainer import train
from tests.compare.grids import losses, write


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The grid file of a finished comparison, two runs at a time."""
    path = write(tmp_path_factory.mktemp("grid"))
    assert main(["compare", str(path), "--jobs", "2"]) == 0
    return path


def test_a_run_of_the_grid_is_the_same_as_train(finished: Path, tmp_path: Path) -> None:
    config = load_grid(finished).configs[3]
    assert config.name == "v1--seed-2"
    assert train(config.model_copy(update={"out": str(tmp_path)}))
    assert losses(tmp_path / "v1--seed-2") == losses(config.folder)


def test_what_it_leaves(finished: Path) -> None:
    out = finished.parent / "out"
    lines = [json.loads(line) for line in (out / "results.jsonl").read_text(encoding="utf-8").splitlines()]
    assert {(line["name"], line["seed"]) for line in lines} == {
        (f"{run}--seed-{seed}", seed) for run in ("clip", "v1") for seed in (1, 2)
    }
    assert "2 configurations, 2 seeds each" in (out / "report.html").read_text(encoding="utf-8")
    assert (out / "workers.log").read_text() == ""


def test_finished_runs_are_skipped(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = [config.folder for config in load_grid(finished).configs]
    before = {file: file.stat().st_mtime_ns for run in runs for file in run.rglob("*")}
    assert main(["compare", str(finished)]) == 0
    assert {file: file.stat().st_mtime_ns for run in runs for file in run.rglob("*")} == before
    assert "DistTempNet-v1" in capsys.readouterr().out
    assert main(["compare", str(finished), "--list"]) == 0
    assert "4 of 4 runs are done" in capsys.readouterr().out


def test_differences_to_the_baseline(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = finished.parent / "out" / "report.html"
    for name, title in (("v1", "DistTempNet-v1"), ("clip", "CLIP")):
        assert main(["compare", str(finished), f"baseline={name}"]) == 0
        out = " ".join(capsys.readouterr().out.replace("│", " ").replace("┃", " ").split())
        assert "difference in points, paired by seed" in out
        assert f"difference to {title}, 95 %" in page.read_text(encoding="utf-8")


def test_a_baseline_without_a_finished_run_is_named(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    grid = load_grid(finished)
    folders = [config.folder for config in grid.configs if config.name.startswith("v1")]
    _report(folders, grid, ())
    assert "no run of the baseline 'clip' is finished: differences are to the first run" in capsys.readouterr().out
    _report([config.folder for config in grid.configs], grid, ())
    assert "no run of the baseline" not in capsys.readouterr().out


def test_a_folder_with_another_config_is_an_error(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", str(finished), "optim.lr=0.5"]) == 2
    assert "clip--seed-1: optim.lr was 0.001 and is 0.5 now" in capsys.readouterr().err
    assert main(["compare", str(finished), "data.workers=1", "--list"]) == 0  # no matter to the result
    assert "4 of 4 runs are done" in capsys.readouterr().out


def test_one_command_at_a_time_in_a_folder(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with (finished.parent / "out" / "lock").open("a") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        assert main(["compare", str(finished)]) == 2
        error = capsys.readouterr().err.strip()
        assert "another compare is running here" in error
        assert "\n" not in error
        assert main(["compare", str(finished), "--list"]) == 0
    assert main(["compare", str(finished)]) == 0


def test_an_out_that_cannot_be_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path, out=str(tmp_path / "grid.toml" / "out"))
    assert main(["compare", str(path)]) == 2
    error = capsys.readouterr().err.strip()
    assert "grid.toml is not a folder" in error
    assert "\n" not in error
