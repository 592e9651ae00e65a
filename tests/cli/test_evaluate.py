"""`disttempnet evaluate` with a data root, from the command line to the results on disk."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
from pathlib import Path
from unittest import mock

import pytest
import torch

from disttempnet.cli.main import main
from disttempnet.config import CONFIG_FOLDER, load_config
from disttempnet.evaluation.encoder import FeatureEncoder
from disttempnet.evaluation.evaluator import Evaluator
from disttempnet.evaluation.results.summary import read_subject
from disttempnet.evaluation.tasks import Task, find_task
from disttempnet.models import load_model, save_model
from disttempnet.training.trainer import train
from tests.evaluation.dataroot import SAMPLES, write_data_root
from tests.evaluation.formats import labelled, picture, write_wds

MODEL = "open_clip:demo-vit-32"
CIFAR = [("red", "red"), ("green", "green")]


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of one's own, the cache in it."""
    monkeypatch.setenv("DISTTEMPNET_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write_cifar(root: Path, rows: list = CIFAR, size: int = 2) -> None:
    write_wds(root, "cifar10", labelled(rows, ("red", "green")), classes=("red", "green"), templates=["{c}"])
    (root / "sizes.toml").write_text(f"cifar10 = {size}\n")


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_all_forty_and_then_none_again(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (here / "root").mkdir()
    write_data_root(here / "root")
    arguments = ["evaluate", MODEL, "--data-root", "root"]
    assert main(arguments) == 0
    shown = capsys.readouterr().out
    assert "Average over 38" in shown
    results = here / "evaluation" / "demo-vit-32" / "eval_results.jsonl"
    found = lines(results)
    assert {line["key"]: line["samples"] for line in found} == SAMPLES
    assert sum(line["metrics"]["main_metric"] is not None for line in found) == 38
    subject = read_subject(results.parent)
    assert subject is not None
    assert (subject.model, subject.precision, subject.compat, len(subject.checkpoint)) == (
        "demo-vit-32",
        "fp32",
        "",
        32,
    )
    assert [path.name for path in (here / "cache" / "text").iterdir()] == [f"{subject.checkpoint}-float32"]
    before = results.read_bytes()
    assert main(arguments) == 0
    assert results.read_bytes() == before
    assert "1/40" not in capsys.readouterr().out, "nothing is run again"


@pytest.mark.slow
@pytest.mark.parametrize("what", ["a demo run", "open_clip:ViT-B-32"])
def test_a_run_and_a_large_model_go_through_all_forty(
    what: str, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (here / "root").mkdir()
    write_data_root(here / "root")
    if what == "a demo run":
        assert main(["train", str(CONFIG_FOLDER / "demo.toml"), "train.stop_after_steps=3", "eval.tasks=[]"]) == 0
    target = what if what.startswith("open_clip:") else "runs/demo"
    capsys.readouterr()
    assert main(["evaluate", target, "--data-root", "root", "--out", "out"]) == 0
    assert "Average over 38" in capsys.readouterr().out
    assert {line["key"]: line["samples"] for line in lines(here / "out" / "eval_results.jsonl")} == SAMPLES


def test_a_folder_holds_results_of_one_thing(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_cifar(here / "root")
    arguments = ["evaluate", MODEL, "--data-root", "root", "--tasks", "cifar10", "--out", "out"]
    assert main(arguments) == 0
    capsys.readouterr()
    for more, message in (
        (["--precision", "bf16"], "out: holds results of another precision (fp32; now bf16): give --out"),
        (["--compat", "datacomp-1.4"], "out: holds results of another compat (none; now datacomp-1.4): give --out"),
    ):
        assert main([*arguments, *more]) == 2
        assert capsys.readouterr().err == f"disttempnet: {message}\n"
    assert main([*arguments[:1], "open_clip:demo-convnext-32", *arguments[2:]]) == 2
    assert "another checkpoint" in capsys.readouterr().err
    write_wds(here / "root", "stl10", labelled(CIFAR, ("red", "green")), classes=("red", "green"), templates=["{c}"])
    (here / "root" / "sizes.toml").write_text("cifar10 = 2\nstl10 = 2\n")
    assert main([*arguments[:5], "stl10", *arguments[6:]]) == 0
    shown = capsys.readouterr().out
    assert "2/38" in shown
    assert "CIFAR-10" in shown, "the table is of the folder, not of this command"
    assert "not run: 36 tasks" in shown
    (here / "out" / "summary.json").unlink()
    assert main(arguments) == 2
    assert "no summary.json that says of what" in capsys.readouterr().err


def test_what_fails_is_the_exit_code_and_what_is_missing_is_not(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_cifar(here / "root")
    arguments = ["evaluate", MODEL, "--data-root", "root", "--tags", "vtab", "--tasks", "cifar10"]
    assert main(arguments) == 0
    assert (
        "missing: Describable Textures (huggingface.co/datasets/djghosh/wds_vtab-dtd_test)" in capsys.readouterr().out
    )
    (here / "root" / "sizes.toml").unlink()
    assert main([*arguments, "--out", "again"]) == 1
    assert "2 samples of 10,000 were seen" in capsys.readouterr().out


def test_other_ranks_leave_the_exit_code_to_rank_0(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A launcher ends all processes where one fails: none may before rank 0 has printed its table."""
    write_cifar(here / "root", size=3)
    arguments = ["evaluate", MODEL, "--data-root", "root", "--out", "out"]
    with mock.patch("disttempnet.distributed.is_main", return_value=False):
        assert main(arguments) == 0
    assert capsys.readouterr().out == ""
    assert not (here / "out").exists()
    assert main(arguments) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data-root", "nowhere"], "--data-root nowhere: no such folder"),
        (["--data-root", "."], "--data-root .: holds none of the 40 tasks (--list says where to get them)"),
        (["--data-root", ".", "--tags", "vtba"], "unknown tag 'vtba'. Did you mean 'vtab'"),
        (["--data-root", ".", "--batch", "0"], "--batch: must be a whole number from 1 to 65,536 (got 0)"),
        (["--batch", "-1"], "--batch: must be a whole number from 1 to 65,536 (got -1)"),
        (["--precision", "bf16"], "--precision goes with --data-root"),
        (["--tasks", "cifar10"], "task 'cifar10' needs its data: set --data-root"),
    ],
)
def test_mistakes_are_one_line(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["evaluate", MODEL, *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_weights_that_open_clip_names_by_a_path(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`local-dir:` and `hf-hub:` have slashes of their own; what follows them is no tag."""
    (here / "model").mkdir()
    torch.manual_seed(0)
    save_model(load_model("demo-vit-32"), here / "model", 100.0)
    write_cifar(here / "root")
    target = f"open_clip:local-dir:{here / 'model'}"
    assert main(["evaluate", target, "--data-root", "root", "--out", "out"]) == 0
    assert main(["evaluate", MODEL, "--data-root", "root", "--out", "again"]) == 0
    assert read_subject(here / "out").model == f"local-dir:{here / 'model'}"  # type: ignore[union-attr]
    assert (
        lines(here / "out" / "eval_results.jsonl")[0]["metrics"]
        == lines(here / "again" / "eval_results.jsonl")[0]["metrics"]
    )


def test_a_stop_leaves_a_summary_of_what_there_is(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_cifar(here / "root")
    write_wds(here / "root", "sun397", labelled(CIFAR, ("red", "green")), classes=("red", "green"), templates=["{c}"])
    (here / "root" / "sizes.toml").write_text("cifar10 = 2\nsun397 = 2\n")
    one = Evaluator._evaluate

    def stopped(self: Evaluator, task: Task, *rest: object) -> object:
        if task.name == "cifar10":
            raise KeyboardInterrupt
        return one(self, task, *rest)  # type: ignore[arg-type]

    with mock.patch.object(Evaluator, "_evaluate", stopped):
        assert main(["evaluate", MODEL, "--data-root", "root", "--out", "out"]) == 130
    assert json.loads((here / "out" / "summary.json").read_text())["averages"]["datacomp"]["coverage"] == "1/38"
    assert main(["evaluate", MODEL, "--data-root", "root", "--out", "out"]) == 0
    assert [line["key"] for line in lines(here / "out" / "eval_results.jsonl")] == ["sun397", "cifar10"]


def test_sigusr1_ends_with_138_and_the_same_command_goes_on(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As SLURM sends it: to the decoding worker too, which leaves it to the main process."""
    write_cifar(here / "root", CIFAR * 10)
    write_wds(here / "root", "sun397", labelled(CIFAR, ("red", "green")), classes=("red", "green"), templates=["{c}"])
    (here / "root" / "sizes.toml").write_text("cifar10 = 20\nsun397 = 2\n")
    arguments = ["evaluate", MODEL, "--data-root", "root", "--out", "out", "--workers", "1", "--batch", "1"]
    before, encode, seen = signal.getsignal(signal.SIGUSR1), FeatureEncoder.images, []
    others = set(multiprocessing.active_children())  # ranks of other tests

    def told(self: FeatureEncoder, pixels: torch.Tensor) -> torch.Tensor:
        seen.append(len(pixels))
        if len(seen) == 3:
            (worker,) = set(multiprocessing.active_children()) - others
            for process in (worker, multiprocessing.current_process()):
                os.kill(process.pid or 0, signal.SIGUSR1)
            worker.join(0.2)
            assert worker.is_alive()
        return encode(self, pixels)

    with mock.patch.object(FeatureEncoder, "images", told):
        assert main(arguments) == 138
    assert seen == [1, 1, 1], "it ends after the batch"
    shown = capsys.readouterr()
    assert shown.out.endswith("stopped: the same command goes on with the task that was cut off\n")
    assert shown.err == ""
    assert signal.getsignal(signal.SIGUSR1) == before
    assert json.loads((here / "out" / "summary.json").read_text())["averages"]["datacomp"]["coverage"] == "1/38"
    assert main(arguments) == 0
    assert [line["key"] for line in lines(here / "out" / "eval_results.jsonl")] == ["sun397", "cifar10"]


def test_a_folder_that_cannot_be_written_is_one_line(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_cifar(here / "root")
    for out, why in (("root/sizes.toml/out", "is no folder"), ("/proc/out", "cannot be written: ")):
        assert main(["evaluate", MODEL, "--data-root", "root", "--out", out]) == 2
        error = capsys.readouterr().err
        assert why in error
        assert error.count("\n") == 1


def test_a_folder_of_ones_own_that_is_named_by_a_point(here: Path) -> None:
    """Its name stands in the line of results, which without one could not be read again."""
    assert find_task("folder:.").display == here.name


def write_photos(root: Path) -> Path:
    for place, colour in enumerate(("red", "green", "green")):
        path = root / colour / f"{place}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(picture(colour))
    return root


def test_a_path_with_a_comma_and_an_image_that_cannot_be_read(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_photos(here / "my, photos")
    tasks = ["--tasks", "emoji-concepts,folder:my, photos"]
    assert main(["evaluate", MODEL, "--list", *tasks]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()[1:]] == ["emoji-concepts", "folder:my,"]
    assert main(["evaluate", "--list", "--tasks", "folder:my, photos"]) == 0
    assert "(your own)" in capsys.readouterr().out
    assert main(["evaluate", MODEL, "--tasks", "folder:my, photos", "--out", "out.json"]) == 0
    assert "my, photos (3 images)" in capsys.readouterr().out
    (write_photos(here / "old") / "red" / "1.png").write_bytes(b"no image")
    (here / "old" / "owl").mkdir()
    assert main(["evaluate", MODEL, "--tasks", "folder:old", "--out", "old.json"]) == 1
    shown = capsys.readouterr().out
    assert "incomplete: old, 1 unreadable or missing: red/1.png" in shown
    assert "old: left out, without images: owl" in shown
    assert json.loads(Path("old.json").read_text())["task_notes"] == {"folder:old": ["left out, without images: owl"]}


class StopAt:
    """SIGUSR1 to this process while it embeds images for the n-th time; counts the times."""

    def __init__(self, number: int = 0) -> None:
        self.number, self.seen = number, 0

    def __enter__(self) -> StopAt:
        encode = FeatureEncoder.images

        def told(encoder: FeatureEncoder, pixels: torch.Tensor) -> torch.Tensor:
            self.seen += 1
            if self.seen == self.number:
                os.kill(os.getpid(), signal.SIGUSR1)
            return encode(encoder, pixels)

        self._patch = mock.patch.object(FeatureEncoder, "images", told)
        self._patch.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        self._patch.__exit__(None, None, None)


def three_folders(here: Path) -> list[str]:
    return [f"folder:{write_photos(here / name).name}" for name in ("a", "b", "c")]


def test_a_file_of_results_keeps_what_is_finished_and_goes_on(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tasks = three_folders(here)
    arguments = ["evaluate", MODEL, "--tasks", *tasks, "--batch", "2", "--out", "out.json"]
    with StopAt(3) as stop:  # two batches a task: in the first of the second
        assert main(arguments) == 138
    assert stop.seen == 3
    assert capsys.readouterr().out.endswith("stopped: the same command goes on with the task that was cut off\n")
    kept = json.loads(Path("out.json").read_text())
    assert (list(kept["results"]), kept["unfinished"]) == (tasks[:1], tasks[1:])

    with StopAt() as again:
        assert main(arguments) == 0
    assert again.seen == 4, "the first task is not run again"
    shown = capsys.readouterr().out
    assert "out.json: folder:a finished before the stop: goes on with the others" in shown
    assert all(f"{name} (3 images)" in shown for name in "abc")
    whole = json.loads(Path("out.json").read_text())
    assert list(whole["results"]) == tasks
    assert whole["results"]["folder:a"] == kept["results"]["folder:a"]
    assert "unfinished" not in whole

    with StopAt() as anew:
        assert main(arguments) == 0
    assert anew.seen == 6, "a command that reached its end is not gone on with"


def test_an_error_keeps_what_is_finished(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tasks = three_folders(here)
    for image in (here / "b").rglob("*.png"):
        image.write_bytes(b"no image")
    arguments = ["evaluate", MODEL, "--tasks", *tasks, "--out", "out.json"]
    assert main(arguments) == 2
    assert "none of its 3 samples can be read" in capsys.readouterr().err
    write_photos(here / "b")
    with StopAt() as again:
        assert main(arguments) == 0
    assert again.seen == 2


def test_a_stop_in_the_last_task_when_that_is_finished_is_no_stop(here: Path) -> None:
    tasks = three_folders(here)
    with mock.patch("disttempnet.evaluation.outputs.ResultsFile.progress"), StopAt(3):  # not asked after a batch
        assert main(["evaluate", MODEL, "--tasks", *tasks, "--out", "out.json"]) == 0
    assert "unfinished" not in json.loads(Path("out.json").read_text())


def test_a_stop_of_what_is_only_printed_is_not_started_again(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """138 would put a job back into the queue, for ever."""
    with StopAt(2):
        assert main(["evaluate", MODEL, "--tasks", *three_folders(here)]) == 2
    message = "disttempnet: stopped: nothing is kept; with --out FILE the same command would go on\n"
    assert capsys.readouterr().err == message
    assert not list(here.glob("*.json"))


def test_an_own_task_needs_a_path(capsys: pytest.CaptureFixture[str]) -> None:
    for kind in ("folder", "shards", "captions"):
        for rest in ("", " ", "?label=x"):
            assert main(["evaluate", MODEL, "--tasks", f"{kind}:{rest}"]) == 2
            why = f"task '{kind}:{rest}': lacks its path: {kind}:PATH"
            assert capsys.readouterr().err == f"disttempnet: {why}\n"


def test_evaluate_needs_a_model(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["evaluate"]) == 2
    assert "evaluate what?" in capsys.readouterr().err


def test_the_list(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_cifar(here / "root")
    assert main(["evaluate", "--list", "--data-root", "root"]) == 0
    table, _, how = capsys.readouterr().out.partition("\n\n")
    rows = {row.split()[0]: row.split()[1:] for row in table.splitlines()[1:]}
    assert len(rows) == 40
    assert rows["cifar10"] == ["10,000", "acc1", "wds_cifar10_test", "djghosh/wds_cifar10_test"]
    assert rows["misc/winogavil"] == ["3,563", "jaccard_score_10-12", "–", "nlphuji/winogavil"]
    first = next(key for key in rows if key != "cifar10")
    folder = rows[first][-1].removeprefix("djghosh/")
    assert how.splitlines() == [
        f"get one, for example:  hf download --repo-type dataset djghosh/{folder} --local-dir root/{folder}",
        "looked for below root:  vtab/caltech101 in wds_vtab-caltech101_test or wds_vtab-caltech101; "
        "vtab/cifar100 in wds_vtab-cifar100_test or wds_vtab-cifar100; "
        "vtab/clevr_count_all in wds_vtab-clevr_count_all_test or wds_vtab-clevr_count_all; "
        "the others likewise, or --tasks NAME names them",
        "then unzip the images in that folder: Flickr, MSCOCO, WinoGAViL (DataComp's hf_cache is not read)",
        "",
        "38 of these count in averages; fairness/fairface and fairness/utkface have no main metric, as in DataComp",
    ]
    assert main(["evaluate", "--list"]) == 0
    without = capsys.readouterr().out
    assert next(row.split() for row in without.splitlines() if row.startswith("cifar10 ")) == [
        "cifar10", "10,000", "acc1", "djghosh/wds_cifar10_test",
    ], "nothing was looked for"  # fmt: skip
    assert "below the data root" not in without
    assert "--data-root DIR shows which of them are there\n\n38 of these count in averages" in without
    assert main(["evaluate", "--list", "--data-root", "root", "--tasks", "cifar10"]) == 0
    assert "get one" not in capsys.readouterr().out, "nothing is missing"
    (here / "root" / "wds_cifar10_test" / "test" / "0.tar").unlink()
    assert main(["evaluate", "--list", "--data-root", "root", "--tasks", "cifar10"]) == 0
    assert "–" in capsys.readouterr().out, "a folder without tars is not there"
    assert main(["evaluate", "--list", "--tags", "emoji"]) == 0
    listed = capsys.readouterr().out
    assert "(ships with the package)" in listed
    assert "get one" not in listed
    for tags in (["retrieval,imagenet"], ["retrieval", "imagenet"]):
        assert main(["evaluate", "--list", "--tags", *tags]) == 0
        listed = capsys.readouterr().out
        assert "winogavil" in listed
        assert "imagenet1k" in listed
        assert "cifar10" not in listed


def test_a_run_and_its_evaluation_in_training(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_cifar(here / "root")
    write_photos(here / "photos")
    tasks = 'eval.tasks=["cifar10", "folder:photos"]'
    more = ["eval.data_root=root", tasks, "train.stop_after_steps=0", "train.epochs=1"]
    config = load_config(CONFIG_FOLDER / "debug.toml", ["name=small", "out=runs", *more])
    assert train(config)
    logged = lines(here / "runs" / "small" / "eval.jsonl")[-1]
    assert set(logged["results"]["cifar10"]) == {"acc1", "mean_per_class_recall"}
    own = logged["results"]["folder:photos"]
    assert own["acc1"] * 3 == pytest.approx(round(own["acc1"] * 3)), "a share of three images"
    assert main(["evaluate", "runs/small", "--tasks", "folder:photos", "--out", "own.json"]) == 0
    assert json.loads(Path("own.json").read_text())["results"]["folder:photos"]["acc1"] == own["acc1"]
    assert main(["evaluate", "runs/small", "--data-root", "root", "--tasks", "cifar10"]) == 0
    found = list((here / "runs" / "small" / "evaluation").glob("step-*/eval_results.jsonl"))
    assert lines(found[0])[0]["metrics"]["acc1"] == logged["results"]["cifar10"]["acc1"]
    subject = read_subject(found[0].parent)
    assert subject is not None
    assert subject.run["name"] == "small"
    assert subject.run["config"]["train"]["epochs"] == 1
    with mock.patch("os.access", side_effect=lambda path, mode: "small" not in str(path)):  # a colleague's run
        capsys.readouterr()
        assert main(["evaluate", "runs/small", "--tasks", "folder:photos"]) == 0
        assert "runs/small cannot be written to: results go to the current folder" in capsys.readouterr().out
        assert main(["evaluate", "runs/small", "--data-root", "root", "--tasks", "cifar10"]) == 0
        assert "runs/small cannot be written to: results go to the current folder" in capsys.readouterr().out
    step = found[0].parent.name
    own = json.loads(Path(f"evaluation/small-{step}.json").read_text())["results"]
    assert own == json.loads(Path("own.json").read_text())["results"]
    assert lines(Path(f"evaluation/small-{step}/eval_results.jsonl"))[0]["metrics"] == lines(found[0])[0]["metrics"]


def test_training_refuses_tasks_that_are_not_there(here: Path) -> None:
    from disttempnet.errors import UserError

    config = load_config(CONFIG_FOLDER / "debug.toml", ["name=small", "out=runs", 'eval.tasks=["cifar10"]'])
    with pytest.raises(UserError, match="task 'cifar10' needs its data"):
        train(config)
    assert not (here / "runs").exists()
