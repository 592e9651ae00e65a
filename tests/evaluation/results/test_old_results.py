"""Results that version 0.1.0 wrote before there were hashes and standard errors: they open, and are added to.

Made at 6e82a2e by `evaluate open_clip:demo-vit-32`, with `--data-root root --tasks cifar10 vtab/dtd --out folder`, and
with `--tasks folder:photos emoji-concepts --out results.json`.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from disttempnet.cli.main import main
from disttempnet.errors import UserError
from disttempnet.evaluation.outputs import ResultsFolder
from disttempnet.evaluation.results.file import refuse_other, write_results
from disttempnet.evaluation.results.records import RESULTS_FILE, read_records
from disttempnet.evaluation.results.summary import Subject, read_subject
from disttempnet.evaluation.scores import Scores, from_record
from disttempnet.evaluation.tasks import find_task

OLD = Path(__file__).parents[2] / "fixtures" / "results_of_0_1_0"


@pytest.fixture
def old(tmp_path: Path) -> Path:
    return Path(shutil.copytree(OLD, tmp_path / "old"))


def test_a_file_takes_more_tasks(old: Path) -> None:
    path, subject = old / "results.json", Subject("open_clip:demo-vit-32", checkpoint="aa")
    before = from_record(json.loads(path.read_text()))
    assert before["folder:photos"].metrics == {"acc1": 1 / 3, "mean_per_class_recall": 0.5}
    assert before["emoji-concepts"].trials["acc1"] == 332
    refuse_other(path, subject)
    more = Scores({"acc1": 0.25}, {"acc1": 0.5}, {"acc1": 4}, 4)
    write_results(path, subject, {"folder:more": more})
    assert from_record(json.loads(path.read_text())) == {**before, "folder:more": more}
    with pytest.raises(UserError, match="holds the results of open_clip:demo-vit-32"):
        refuse_other(path, Subject("open_clip:RN50"))


def test_a_folder_is_gone_on_with(old: Path, tmp_path: Path) -> None:
    folder, root = old / "folder", tmp_path / "root"
    records = read_records(folder / RESULTS_FILE)
    assert {key: (record.value, record.counts) for key, record in records.items()} == {
        "cifar10": (0.5, True),
        "vtab/dtd": (0.5, False),
    }
    subject = read_subject(folder)
    assert subject is not None
    assert (subject.model, subject.checkpoint) == ("demo-vit-32", "503dd4d937bf89b56e20b82e78089ccd")
    for key in ("cifar10", "vtab-dtd"):
        (root / f"wds_{key}_test" / "test").mkdir(parents=True)
        (root / f"wds_{key}_test" / "test" / "0.tar").touch()
    (root / "sizes.toml").write_text("cifar10 = 2\n")
    tasks, cpu = [find_task("cifar10"), find_task("vtab/dtd")], torch.device("cpu")
    output = ResultsFolder(folder, root, tasks, subject, cpu)
    output.claim()
    assert output.unfinished() == [find_task("vtab/dtd")], "it lacked samples"
    with pytest.raises(UserError, match="holds results of another checkpoint"):
        ResultsFolder(folder, root, tasks, replace(subject, checkpoint="bb"), cpu).claim()


def test_it_is_exported_and_reported(old: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = str(old / "folder")
    assert main(["export", folder, "--to", "openclip-csv", "--out", str(tmp_path / "x.csv")]) == 0
    assert "Describable Textures incomplete: 2 samples of 1,880 were seen" in capsys.readouterr().out
    assert "demo-vit-32" in (tmp_path / "x.csv").read_text()
    assert main(["report", folder, "--out", str(tmp_path / "x.md")]) == 0
    assert "demo-vit-32" in (tmp_path / "x.md").read_text()
