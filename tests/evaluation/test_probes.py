"""`evaluate --probe`: from tars of a train split to lines, a table, and the report."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from disttempnet.cli.main import main
from disttempnet.evaluation.probes import find_train, why_no_probe
from disttempnet.evaluation.tasks import all_tasks
from tests.evaluation.formats import CORRUPT, labelled, picture, write_captioned_wds, write_tar, write_wds

CLASSES = ("red", "green")
TEST = [("red", "red"), ("green", "green"), ("red and red", "red"), ("green and green", "green")]
TRAIN = TEST * 3
MODEL = "open_clip:demo-vit-32"


@pytest.fixture(autouse=True)
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A data root with two classification tasks, one of them with a train split, and one of retrieval."""
    monkeypatch.setenv("DISTTEMPNET_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    root = tmp_path / "root"
    for key in ("cifar10", "stl10"):
        write_wds(root, key, labelled(TEST, CLASSES), classes=CLASSES, templates=["{c}"])
    write_captioned_wds(root, "retrieval/flickr_1k_test_image_text_retrieval", [("red", ["red"]), ("green", ["green"])])
    write_train(root / "wds_cifar10_test" / "train", TRAIN)
    (root / "sizes.toml").write_text('cifar10 = 4\nstl10 = 4\n"retrieval/flickr_1k_test_image_text_retrieval" = 2\n')
    return root


def write_train(folder: Path, rows: list) -> None:
    folder.mkdir(parents=True)
    (folder / "nshards.txt").write_text("2\n")
    samples = labelled(rows, CLASSES)
    for shard in range(2):
        write_tar(folder / f"{shard}.tar", samples[shard::2], shard * 100)


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def evaluate(*more: str) -> int:
    return main(["evaluate", MODEL, "--data-root", "root", "--out", "out", *more])


def test_a_probe_beside_zero_shot_and_in_the_report(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert evaluate("--probe") == 0
    shown = capsys.readouterr().out
    assert "Linear probes" in shown
    assert "no linear probe (no classes to probe): Flickr" in shown
    assert "no linear probe (no train split): STL-10" in shown
    assert "CIFAR-10: linear probe: 100.00" in shown
    (line,) = lines(Path("out", "probe_results.jsonl"))
    assert (line["key"], line["main_metric_name"], line["metrics"]["probe_acc1"]) == ("cifar10", "probe_acc1", 1.0)
    assert (line["samples"], line["expected"], line["complete"]) == (4, 4, True)
    assert "of 12 training images" in line["notes"][0]
    zero_shot = {one["key"]: one["metrics"]["main_metric"] for one in lines(Path("out", "eval_results.jsonl"))}
    assert zero_shot["cifar10"] < 1.0

    # the same command has nothing left to do
    before = Path("out", "probe_results.jsonl").read_bytes()
    assert evaluate("--probe") == 0
    assert "CIFAR-10: linear probe" not in capsys.readouterr().out
    assert Path("out", "probe_results.jsonl").read_bytes() == before

    assert main(["report", "out", "--out", "table.md"]) == 0
    assert "linear probe top-1" in Path("table.md").read_text()
    assert main(["report", "out", "--out", "page.html"]) == 0
    page = Path("page.html").read_text()
    assert "Linear probes" in page
    assert "linear probe top-1" in page


def test_the_labels_of_the_train_split_are_what_is_learned(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_train(root / "wds_stl10_train" / "train", [(colour, CLASSES[name == "red"]) for colour, name in TRAIN])
    assert evaluate("--probe", "--tasks", "stl10") == 0
    assert lines(Path("out", "probe_results.jsonl"))[0]["metrics"]["probe_acc1"] == 0.0


def test_unreadable_images(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Those of the train split are counted in a note; one of the test split makes the result incomplete."""
    train = root / "wds_cifar10_test" / "train"
    write_tar(train / "0.tar", [{"png": CORRUPT, "cls": b"0"}, {"png": picture("red"), "cls": b"x"}], 900)
    assert evaluate("--probe", "--tasks", "cifar10") == 0
    (line,) = lines(Path("out", "probe_results.jsonl"))
    assert line["notes"][1] == "linear probe: 2 unusable images of the train split are left out"
    write_tar(root / "wds_stl10_test" / "test" / "0.tar", [*labelled(TEST, CLASSES), {"png": CORRUPT, "cls": b"0"}])
    write_train(root / "wds_stl10" / "train", TRAIN)
    capsys.readouterr()
    assert evaluate("--probe", "--tasks", "stl10") == 1
    line = lines(Path("out", "probe_results.jsonl"))[-1]
    assert not line["complete"]
    assert "1 unreadable: 0.tar/s0000004" in line["error"]


def test_a_train_split_that_cannot_be_used_is_a_failed_task(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_train(root / "wds_stl10" / "train", [("red", "red")])
    assert evaluate("--probe") == 1
    shown = capsys.readouterr().out
    assert "STL-10: linear probe: its train split has no class with enough samples" in shown
    assert "CIFAR-10: linear probe: 100.00" in shown, "the others go on"
    assert evaluate("--probe") == 1, "a failed one is tried again"


def test_where_train_splits_are_looked_for(root: Path) -> None:
    task = all_tasks()["cifar10"]
    assert find_train(task, root) == root / "wds_cifar10_test" / "train"
    assert find_train(all_tasks()["stl10"], root) is None
    assert why_no_probe(all_tasks()["mnist"], root) == "its test split is not below the data root"


def test_it_needs_a_data_root(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["evaluate", MODEL, "--probe"]) == 2
    assert capsys.readouterr().err == "disttempnet: --probe goes with --data-root\n"


@pytest.mark.slow
def test_two_ranks_write_the_same_line(root: Path) -> None:
    found = []
    for ranks in (1, 2):
        out = f"out-{ranks}"
        torchrun = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={ranks}", "--standalone"]
        command = [
            "-m",
            "disttempnet",
            "evaluate",
            MODEL,
            "--data-root",
            "root",
            "--out",
            out,
            "--probe",
            "--batch",
            "2",
        ]
        subprocess.run([*torchrun, *command], env=os.environ, check=True, timeout=600, capture_output=True)
        (line,) = lines(Path(out, "probe_results.jsonl"))
        found.append({key: value for key, value in line.items() if key != "seconds"})
    assert found[0] == found[1]
