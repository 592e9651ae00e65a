"""results.json: what is kept of an earlier command, and where results go of a run that cannot be written to."""

from __future__ import annotations

import errno
import json
from pathlib import Path
from unittest import mock

import pytest

from disttempnet.errors import UserError
from disttempnet.evaluation.results.file import RESULTS, default_place, refuse_other, write_results
from disttempnet.evaluation.results.records import RESULTS_FILE, read_records
from disttempnet.evaluation.results.summary import SUMMARY_FILE, Subject, read_subject
from disttempnet.evaluation.scores import Scores, from_record
from disttempnet.io import files

FIRST = Subject("mine @ step 1", checkpoint="aa", notes=("note",))
LATER = Subject("mine @ step 2", checkpoint="bb")


def scores(value: float) -> Scores:
    return Scores({"acc1": value}, {"acc1": 0.5}, {"acc1": 8}, 8, ("x",), notes=("n",), errors={"acc1": 0.1})


def test_tasks_of_one_checkpoint_come_together(tmp_path: Path) -> None:
    path = tmp_path / "new" / RESULTS
    write_results(path, FIRST, {"a": scores(0.1), "b": scores(0.2)})
    write_results(path, FIRST, {"b": scores(0.3), "c": scores(0.4)})
    table = json.loads(path.read_text())
    assert (table["model"], table["checkpoint"], table["notes"]) == ("mine @ step 1", "aa", ["note"])
    assert from_record(table) == {"a": scores(0.1), "b": scores(0.3), "c": scores(0.4)}


def test_a_later_checkpoint_has_a_file_of_its_own(tmp_path: Path) -> None:
    write_results(tmp_path / RESULTS, FIRST, {"a": scores(0.1)})
    assert default_place(tmp_path, "mine", "step-1", FIRST) == tmp_path / RESULTS
    place = default_place(tmp_path, "mine", "step-2", LATER)
    assert place == tmp_path / "results-step-2.json"
    write_results(place, LATER, {"a": scores(0.2)})
    assert default_place(tmp_path, "mine", "step-2", LATER) == place
    trained_anew = Subject("mine @ step 2", checkpoint="cc")
    with pytest.raises(UserError, match=r"results-step-2\.json: holds the results of mine @ step 2, of other weights"):
        default_place(tmp_path, "mine", "step-2", trained_anew)


def test_what_is_not_ours_is_not_overwritten(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    for content in ("{}", "[1]", "no JSON", '{"model": "mine @ step 1", "checkpoint": "aa", "results": {"a": 1}}'):
        path.write_text(content)
        with pytest.raises(UserError, match=rf"{path}: holds .*: give another --out, or delete it"):
            refuse_other(path, FIRST)
        assert path.read_text() == content
    before_hashes = {"model": FIRST.title, "results": {}, "chance": {}, "samples": {}}
    path.write_text(json.dumps(before_hashes))
    refuse_other(path, FIRST)
    with pytest.raises(UserError, match="holds the results of mine @ step 1: give"):
        refuse_other(path, LATER)


def test_results_of_a_run_of_somebody_else_are_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "runs" / "theirs").mkdir(parents=True)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    access = mock.patch.object(files.os, "access", side_effect=lambda path, mode: "theirs" not in str(path))
    with access:
        assert default_place(tmp_path / "runs" / "theirs", "theirs", "step-2", LATER) == Path(
            "evaluation/theirs-step-2.json"
        )
    none = mock.patch.object(files.os, "access", return_value=False)
    with (
        none,
        pytest.raises(UserError, match=r"theirs-step-2\.json: cannot be written: no permission to write into "),
    ):
        default_place(tmp_path / "runs" / "theirs", "theirs", "step-2", LATER)
    assert [*tmp_path.rglob("*.json")] == []


def test_a_full_disk_is_one_line_and_leaves_nothing(tmp_path: Path) -> None:
    write_results(tmp_path / RESULTS, FIRST, {"a": scores(0.1)})
    before = (tmp_path / RESULTS).read_bytes()
    full = mock.patch.object(files, "_to_disk", side_effect=OSError(errno.ENOSPC, "No space left on device"))
    with full, pytest.raises(UserError, match=r"results\.json: cannot be written: No space left on device"):
        write_results(tmp_path / RESULTS, FIRST, {"a": scores(0.2)})
    assert [path.name for path in tmp_path.iterdir()] == [RESULTS]
    assert (tmp_path / RESULTS).read_bytes() == before


DEEP = "[" * 100_000


def test_damaged_files_are_one_line(tmp_path: Path) -> None:
    whole = '{"key": "a", "dataset": "A", "metrics": {"main_metric": 0.5}}'
    records = tmp_path / RESULTS_FILE
    for line in ("5", "{}", whole[:-1] + ', "samples": Infinity}', whole.replace("0.5", "1" + "0" * 400)):
        records.write_text(f"{line}\n{whole}\n")
        with pytest.raises(UserError, match=rf"{records}: line 1 is not the result of a task$"):
            read_records(records)
    records.write_text(f"{DEEP}\n{whole}\n")
    with pytest.raises(UserError, match=rf"{records}: line 1 is not JSON$"):
        read_records(records)
    summary = tmp_path / SUMMARY_FILE
    for more in ('"versions": 3', '"notes": 1', '"run": []', '"run": {"config": [1]}', '"run": {"step": "x"}'):
        summary.write_text(f'{{"model": "m", {more}}}')
        with pytest.raises(UserError, match=rf"{summary}: damaged, not the summary of an evaluation$"):
            read_subject(tmp_path)
    summary.write_text(DEEP)
    with pytest.raises(UserError, match="damaged"):
        read_subject(tmp_path)
    results = tmp_path / RESULTS
    head = '"model": "mine @ step 1", "checkpoint": "aa", "results": {"a": {}}, "chance": {"a": {}}'
    for content in (DEEP, f'{{{head}, "samples": {{"a": Infinity}}}}'):
        results.write_text(content)
        with pytest.raises(UserError, match=rf"{results}: holds .*: give another --out, or delete it"):
            refuse_other(results, FIRST)
