"""Run folders, complete, unfinished and damaged."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from disttempnet.errors import UserError, UserNotice
from disttempnet.report import build_report, read_run
from disttempnet.report.read import distinct_titles
from tests.report.synthetic import write_run


@pytest.mark.parametrize("missing", ["config.toml", "run.json"])
def test_folder_that_is_no_run(tmp_path: Path, missing: str) -> None:
    folder = write_run(tmp_path / "a")
    (folder / missing).unlink()
    with pytest.raises(UserError, match=f"a: not a run folder \\(it has no {missing}\\)"):
        build_report([folder], tmp_path / "page.html")
    assert not (tmp_path / "page.html").exists()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("run.json", b"{", "run.json: skipped: it is not JSON"),
        ("run.json", b"\x00\xff\xfe", "run.json: skipped: it is not JSON"),
        ("run.json", b"[1]", "run.json: skipped: it holds no object"),
        ("run.json", b'{"objective": "clip"}', 'run.json: skipped: objective is "clip"'),
        ("run.json", b'{"started": "yesterday"}', 'run.json: skipped: started is "yesterday"'),
        ("run.json", b'{"parameters": "many"}', 'run.json: skipped: parameters is "many"'),
        ("metrics.jsonl", b'no\n{"step": 1, "epoch": 1}\n', "metrics.jsonl: line 1 is skipped: it is not JSON"),
        ("metrics.jsonl", b'{"step": 1, "epoch": 1}\n\xff\n', "metrics.jsonl: line 2 is skipped: it is not JSON"),
        ("metrics.jsonl", b'{"step": "1", "epoch": 1}\n', "line 1 is skipped: it is no line of this file"),
        ("metrics.jsonl", b'{"step": 1, "epoch": 1, "loss": "x"}\n', "line 1 is skipped: it is no line"),
        ("metrics.jsonl", b"7\n", "line 1 is skipped: it is no line of this file"),
        ("eval.jsonl", b'{"step": 1}\n', "eval.jsonl: line 1 is skipped: it is no line of this file"),
        ("eval.jsonl", b'{"step": 1, "epoch": 1, "results": []}\n', "eval.jsonl: line 1 is skipped"),
        ("temperatures/step-00000010.npz", b"no", "step-00000010.npz: skipped: not a file of temperatures"),
    ],
)
def test_damaged_files_are_named_and_passed_over(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    folder = write_run(tmp_path / "a")
    whole = read_run(folder)
    (folder / name).write_bytes(content)
    with pytest.warns(UserNotice, match=message):
        run = read_run(folder)
    assert run.title == "DistTempNet-v1"
    kept = content.count(b'{"step": 1, "epoch": 1}')
    assert len(run.steps) == (kept if name == "metrics.jsonl" else len(whole.steps))
    assert len(run.evaluations) == (len(whole.evaluations) if name != "eval.jsonl" else 0)
    assert len(run.temperatures) == {"eval.jsonl": 0, "temperatures/step-00000010.npz": 3}.get(name, 4)


def test_run_record(tmp_path: Path) -> None:
    run = read_run(write_run(tmp_path / "a"))
    assert run.title == "DistTempNet-v1"
    assert run.finished
    assert run.has_own_temperatures
    assert run.final["emoji-concepts"].metrics["acc1"] == pytest.approx(0.4)
    assert [snapshot.epoch for snapshot in run.temperatures] == [1, 2, 3, 4]
    epochs, losses = run.series("loss")
    assert epochs[-1] == 4.0
    assert losses[0] == 5.0
    assert len(run.series("nothing")[0]) == 0


def test_temperatures_past_the_last_evaluation_do_not_count(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "a")
    np.savez(folder / "temperatures" / "step-00000099.npz", image=np.ones(3), text=np.ones(3))
    assert [snapshot.epoch for snapshot in read_run(folder).temperatures] == [1, 2, 3, 4]


def test_titles_are_distinct(tmp_path: Path) -> None:
    runs = [read_run(write_run(tmp_path / name, title)) for name, title in (("a", "X"), ("b", "X"), ("c", "Y"))]
    assert distinct_titles(runs) == ["X (a)", "X (b)", "Y"]
    again = read_run(write_run(tmp_path / "other" / "a", "X"))
    assert distinct_titles([*runs, again]) == [f"X ({tmp_path.name}/a)", "X (b)", "Y", "X (other/a)"]
    assert distinct_titles([runs[0], runs[0], runs[0]]) == ["X (a)", "X (a, again)", "X (a, 3)"]


def test_titles_are_as_short_as_they_can_be(tmp_path: Path) -> None:
    deep = tmp_path / ("long" * 20) / "x"
    runs = [read_run(write_run(deep / place, "X")) for place in ("one/seed/a", "two/seed/a")]
    assert distinct_titles(runs) == ["X (one/seed/a)", "X (two/seed/a)"]
