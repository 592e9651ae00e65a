"""Runs with a damaged file beside sound ones: what can be done without it is done, and a line names it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from disttempnet.cli.main import main
from disttempnet.config import CONFIG_FOLDER, load_config
from disttempnet.errors import UserError, UserNotice
from disttempnet.training import atomic_folder, checkpoint
from disttempnet.training.checkpoint import load_run
from disttempnet.training.run_folder import chosen_checkpoint, list_checkpoints, weights_folder
from disttempnet.training.trainer import train

JUNK = {"binary": b"\x00\xff\xfe\n", "empty": b"", "half": b'{"step": 1, "epo', "list": b"[1]", "number": b"7"}


def config(out: Path, steps: int) -> Any:
    more = [f"out={out}", f"train.stop_after_steps={steps}", "train.checkpoint_every=1", "eval.tasks=[]"]
    return load_config(CONFIG_FOLDER / "debug.toml", [*more, "train.log_every=1", "data.workers=0", "train.keep=3"])


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of three steps, with a checkpoint after each."""
    out = tmp_path_factory.mktemp("trained")
    assert train(config(out, 3))
    return out


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    shutil.copytree(trained / "debug", tmp_path / "debug")
    return tmp_path / "debug"


@pytest.mark.parametrize("junk", [*JUNK, "another type", "gone"])
def test_a_damaged_best_json_gives_the_last_checkpoint(junk: str, run: Path) -> None:
    best = run / "checkpoints" / "best.json"
    best.write_text('{"step": 2, "mean_recall": 0.5}')
    assert chosen_checkpoint(run).name == "step-00000002"
    best.write_bytes({"another type": b'{"step": "two"}', "gone": b'{"step": 40}'}.get(junk) or JUNK.get(junk, b""))
    with pytest.warns(UserNotice, match=r"best.json: skipped: "):
        assert chosen_checkpoint(run).name == "step-00000003"


@pytest.mark.filterwarnings("always::disttempnet.errors.UserNotice")
@pytest.mark.parametrize("junk", JUNK)
def test_a_run_with_damaged_logs_goes_on_and_names_their_lines(
    junk: str, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first, _, third = (run / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    (run / "metrics.jsonl").write_bytes(first + JUNK[junk].strip() + b"\n" + third + b'{"step": 4')
    (run / "eval.jsonl").write_bytes(JUNK[junk].strip() + b"\n")
    (run / "run.json").write_bytes(JUNK[junk])
    words = ["train", str(CONFIG_FOLDER / "debug.toml"), "--resume", "auto", f"out={run.parent}", "eval.tasks=[]"]
    words += ["train.stop_after_steps=4", "train.checkpoint_every=1", "train.log_every=1", "data.workers=0"]
    assert main(words) == 0
    printed = capsys.readouterr().err
    steps = [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert steps == [1, 3, 4]
    assert (run / "eval.jsonl").read_bytes() == b""
    assert set(json.loads((run / "run.json").read_text())) >= {"objective", "started", "versions"}
    assert f"{run / 'run.json'}: skipped" in printed
    if junk != "empty":
        assert f"{run / 'metrics.jsonl'}: line 2 is skipped" in printed
        assert f"{run / 'eval.jsonl'}: line 1 is skipped" in printed
    assert "Traceback" not in printed


def test_a_checkpoint_without_a_listing_is_examined_by_what_its_files_say(run: Path) -> None:
    last = list_checkpoints(run)[-1]
    (last / atomic_folder.LISTING).unlink()
    with pytest.warns(UserNotice, match=r"step-00000003: has no files.json, so sizes and checksums cannot be compared"):
        assert load_run(last).step == 3
    spoiled: dict[str, Callable[[bytes], bytes]] = {
        "open_clip_model.safetensors": lambda content: content[:-1],
        "trainer.pt": lambda content: content[:-100],
        "shard-00000-of-00001.pt": lambda content: content.replace(b"PK\x01\x02", b"PK\x01\x03"),
        "open_clip_config.json": lambda content: content[:-3],
    }
    for name, spoil in spoiled.items():
        content = (last / name).read_bytes()
        (last / name).write_bytes(spoil(content))
        with pytest.warns(UserNotice), pytest.raises(UserError, match=rf"step-00000003: damaged: {name} (has|is not)"):
            load_run(last)
        (last / name).write_bytes(content)
    with pytest.warns(UserNotice):
        assert load_run(last).step == 3


def spoil(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Write another content, with a listing that fits it, as a program that means well does."""
    content = torch.load(path, weights_only=True)
    torch.save(change(content) or content, path)
    listing = path.parent / atomic_folder.LISTING
    known = json.loads(listing.read_text())
    known[path.name] = atomic_folder._size_and_sum(path)
    listing.write_text(json.dumps(known))


ODD: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "a list": (lambda content: [content], r"trainer.pt: holds a list, not the state of a checkpoint"),
    "nothing": (lambda content: content.clear(), r"trainer.pt: not the state of a checkpoint: its step is of type N"),
    "another format": (lambda content: content.update(format=9), r"checkpoint format 9, this version reads 1"),
    "no optimizers": (lambda content: content.pop("optimizers") and None, r"its optimizers is of type NoneType"),
    "a word for the step": (lambda content: content.update(step="three"), r"its step is 'three'"),
    "a negative step": (lambda content: content.update(step=-1), r"its step is -1"),
    "no ranks": (lambda content: content.update(world_size=0), r"its world_size is 0"),
    "a config of another type": (lambda content: content.update(config=[1]), r"its config is of type list"),
    "an unknown config": (lambda content: content.update(config={"a": 1}), r"trainer.pt: config: unknown key 'a'"),
    "another objective": (lambda content: content["objective"].update(x=torch.ones(1)), r"does not fit this run"),
    "moments of another shape": (
        lambda content: content["optimizers"][0]["state"][0].update(exp_avg="x"), r"trainer.pt: its state does not fit",
    ),
    "states of other optimizers": (lambda content: content["optimizers"].append({}), r"its state does not fit"),
    "another scale": (lambda content: content.update(logit_scale=torch.ones(3)), r"its state does not fit"),
}  # fmt: skip


@pytest.mark.parametrize("odd", ODD)
def test_odd_content_of_trainer_pt_is_one_line(odd: str, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    change, message = ODD[odd]
    spoil(list_checkpoints(run)[-1] / "trainer.pt", change)
    words = ["train", str(CONFIG_FOLDER / "debug.toml"), "--resume", "auto", f"out={run.parent}", "eval.tasks=[]"]
    assert main([*words, "train.stop_after_steps=4", "data.workers=0", "train.checkpoint_every=1"]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("disttempnet: ")]
    with pytest.raises(UserError, match=message):
        raise UserError(line)


def test_weights_have_the_permissions_of_any_file(run: Path, trained: Path) -> None:
    modes = {path.name: path.stat().st_mode & 0o777 for path in list_checkpoints(trained / "debug")[-1].iterdir()}
    assert len(set(modes.values())) == 1, modes
    (run / "new").touch()
    assert set(modes.values()) == {(run / "new").stat().st_mode & 0o777}


def test_a_damaged_checkpoint_is_not_opened(tmp_path: Path) -> None:
    assert train(load_config(CONFIG_FOLDER / "debug.toml", [f"out={tmp_path}", "train.stop_after_steps=1"]))
    weights = list_checkpoints(tmp_path / "debug")[-1] / "open_clip_model.safetensors"
    assert load_run(tmp_path / "debug").step == 1
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1  # one bit of the last weight, which safetensors would not notice
    weights.write_bytes(content)
    with pytest.raises(UserError, match=r"step-00000001: damaged: open_clip_model.safetensors has changed"):
        load_run(tmp_path / "debug")
    with pytest.raises(UserError, match="damaged"):
        weights_folder(str(tmp_path / "debug"))


def test_generators_of_the_gpu_are_kept_where_there_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    assert checkpoint._generators().keys() == {"rng"}
    state, restored = torch.arange(4, dtype=torch.uint8), []
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda: state)
    monkeypatch.setattr(torch.cuda, "set_rng_state", restored.append)
    kept = checkpoint._generators()
    checkpoint._restore_generators(kept)
    checkpoint._restore_generators({"rng": kept["rng"]})  # of a run that began without one
    assert [value is state for value in restored] == [True]
