"""A run is what its config says: golden losses, exact resume, any world size, nothing lost and nothing overwritten."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from itertools import islice
from multiprocessing.resource_sharer import DupFd
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from disttempnet.config import CONFIG_FOLDER, Config, load_config
from disttempnet.data import lost_workers_named
from disttempnet.errors import UserError
from disttempnet.training.checkpoint import load_run
from disttempnet.training.run_folder import list_checkpoints
from disttempnet.training.run_log import _summary
from disttempnet.training.trainer import Trainer, train

GOLDEN = Path(__file__).parent / "golden_losses.txt"
GOLDEN_TOLERANCE = 2e-3  # relative; other processors and thread counts sum in another order
CPU = torch.device("cpu")
WORLD_SIZE_TOLERANCE = 2e-4  # relative, float32, over 20 steps


def debug(out: Path, *overrides: str) -> Config:
    return load_config(CONFIG_FOLDER / "debug.toml", [f"out={json.dumps(str(out))}", *overrides])


def losses(run: Path) -> dict[int, float]:
    lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    records = [json.loads(line) for line in lines]
    assert [r["step"] for r in records] == sorted({r["step"] for r in records}), "every step stands once, in order"
    return {r["step"]: r["loss"] for r in records}


def same(a: Any, b: Any, where: str = "") -> None:
    """Bit for bit."""
    assert type(a) is type(b), where
    if isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            same(a[key], b[key], f"{where}.{key}")
    elif isinstance(a, list):
        assert len(a) == len(b), where
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            same(x, y, f"{where}[{i}]")
    elif isinstance(a, torch.Tensor):
        assert torch.equal(a, b), where
    else:
        assert a == b, where


def same_ending(a: Path, b: Path) -> None:
    """The last checkpoints of two runs hold the same bits: towers, objective, per-sample state, optimizers."""
    first, second = list_checkpoints(a)[-1], list_checkpoints(b)[-1]
    assert first.name == second.name
    assert (first / "open_clip_model.safetensors").read_bytes() == (second / "open_clip_model.safetensors").read_bytes()
    for name in ("trainer.pt", "shard-00000-of-00001.pt"):
        one, two = (torch.load(folder / name, weights_only=True) for folder in (first, second))
        for content in (one, two):
            content.pop("config", None)  # name and place differ
        same(one, two, name)


def command(*arguments: str, processes: int = 1) -> list[str]:
    launcher = (
        ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)] if processes > 1 else []
    )
    return [sys.executable, *launcher, "-m", "disttempnet", *arguments]


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """20 steps of the debug config, undisturbed."""
    out = tmp_path_factory.mktemp("straight")
    assert train(debug(out))
    return out / "debug"


def test_golden_losses(straight: Path) -> None:
    golden = np.loadtxt(GOLDEN)
    measured = losses(straight)
    np.testing.assert_allclose([measured[int(step)] for step, _ in golden], golden[:, 1], rtol=GOLDEN_TOLERANCE)


def test_measuring_normalisers_changes_nothing_else(straight: Path, tmp_path: Path) -> None:
    """Over the first two batches of the next epoch, read by workers that stay; chunks and loader go on as without."""
    assert train(debug(tmp_path, "eval.normaliser_samples=50", "eval.every_epochs=1", "data.workers=1"))
    same_ending(tmp_path / "debug", straight)
    lines = [json.loads(line) for line in (tmp_path / "debug" / "metrics.jsonl").read_text().splitlines()]
    found = {line["step"]: {key: value for key, value in line.items() if "normaliser" in key} for line in lines}
    assert [step for step, numbers in found.items() if numbers] == [10, 20]
    assert found[10].keys() == found[20].keys()
    assert len(found[10]) == 6
    assert found[10]["normaliser_error/visited"] == 1
    assert 0 < found[20]["normaliser_error/image_log_rms"] < 1
    assert losses(tmp_path / "debug") == losses(straight)


def test_a_network_that_never_started_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Ten steps are fewer than are measured; where it starts from the first step on nothing is said."""
    short = ("data.validation=0", "train.epochs=1", "eval.tasks=[]")
    assert train(debug(tmp_path, *short, "loss.tau_start=ahead"))
    assert "the temperature network never started: its τ stays where it began" in capsys.readouterr().err
    assert train(debug(tmp_path, *short, "name=other"))
    assert "never started" not in capsys.readouterr().err


def test_normalisers_that_are_not_there_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^eval.normaliser_samples: objective siglip has no normaliser"):
        train(debug(tmp_path, "loss={name='siglip'}", "eval.normaliser_samples=50"))


def test_a_run_leaves_what_it_promises(straight: Path) -> None:
    for name in ("config.toml", "run.json", "metrics.jsonl", "eval.jsonl", "tensorboard", "checkpoints/best.json"):
        assert (straight / name).exists(), name
    facts = json.loads((straight / "run.json").read_text(encoding="utf-8"))
    assert {"versions", "git", "started", "finished", "index_digest", "num_samples"} <= facts.keys()
    run = load_run(straight)
    assert run.step == 20
    tau = np.load(straight / "temperatures" / "step-00000020.npz")
    assert ((tau["image"] > 0.005) & (tau["image"] < 0.15)).all()


@pytest.mark.parametrize("stop", [7, 10])
def test_stop_and_resume_is_bit_exact(
    stop: int, straight: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(debug(tmp_path, f"train.stop_after_steps={stop}"))
    assert f"stopped at step {stop} of 20" in capsys.readouterr().err
    assert list_checkpoints(tmp_path / "debug")[-1].name == f"step-{stop:08d}"
    assert train(debug(tmp_path), resume="auto")
    assert losses(tmp_path / "debug") == losses(straight)
    same_ending(tmp_path / "debug", straight)


def test_resume_of_a_finished_run_changes_nothing(straight: Path) -> None:
    before = losses(straight)
    config = debug(straight.parent)
    assert train(config, resume="auto")
    assert losses(straight) == before


def test_a_run_that_was_killed_ahead_of_its_best_json_gets_it_at_the_next_start(straight: Path, tmp_path: Path) -> None:
    shutil.copytree(straight, tmp_path / "debug")
    best = tmp_path / "debug" / "checkpoints" / "best.json"
    content = best.read_text(encoding="utf-8")
    assert json.loads(content)["step"] == 20
    best.write_text('{"step": 10, "mean_recall": 0.01}\n', encoding="utf-8")
    assert train(debug(tmp_path), resume="auto")
    assert best.read_text(encoding="utf-8") == content


def test_loader_workers_change_nothing(straight: Path, tmp_path: Path) -> None:
    assert train(debug(tmp_path, "data.workers=2", "train.stop_after_steps=5"))
    assert list(losses(tmp_path / "debug").values()) == list(losses(straight).values())[:5]


def test_two_processes_train_the_same_curve_and_continue_as_one(straight: Path, tmp_path: Path) -> None:
    config = str(CONFIG_FOLDER / "debug.toml")
    arguments = ["train", config, f"out={tmp_path}", "train.stop_after_steps=13"]
    launched = command(*arguments, processes=2)
    done = subprocess.run(launched, timeout=300, env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    last = list_checkpoints(tmp_path / "debug")[-1]
    assert sorted(p.name for p in last.glob("shard-*")) == ["shard-00000-of-00002.pt", "shard-00001-of-00002.pt"]
    assert train(debug(tmp_path), resume="auto")
    together, alone = losses(tmp_path / "debug"), losses(straight)
    assert together.keys() == alone.keys()
    np.testing.assert_allclose(list(together.values()), list(alone.values()), rtol=WORLD_SIZE_TOLERANCE, atol=1e-5)
    table, expected = (
        torch.load(list_checkpoints(run)[-1] / "shard-00000-of-00001.pt", weights_only=True)["state"]["state.log_u"]
        for run in (tmp_path / "debug", straight)
    )
    assert torch.equal(table.isinf(), expected.isinf())
    torch.testing.assert_close(table, expected, rtol=1e-3, atol=1e-3)


def test_a_waiting_temperature_neither_moves_nor_gathers_moments(tmp_path: Path) -> None:
    config = debug(tmp_path, "loss.tau_start_epoch=1", "loss.prototypes=4", "eval.tasks=[]")
    trainer = Trainer(config, torch.device("cpu"))
    epoch = trainer.steps_per_epoch
    networks, adam = trainer.loss.temperature.image, trainer.optimizers[1]
    first = networks.weight.detach().clone()
    for batch in islice(trainer.data.loader_from(0), epoch):
        trainer.train_step(batch)
    assert torch.equal(networks.weight, first)
    assert not adam.state
    trainer.loss.set_epoch(1)
    trainer.train_step(next(trainer.data.loader_from(1)))
    moved = (networks.weight - first).abs()
    assert moved.max().item() == pytest.approx(1e-3, rel=1e-2), "Adam's first step is as long as its rate"


def test_statistics_move_while_the_weights_stand_still(tmp_path: Path) -> None:
    """Moments and normalisers, but neither towers nor networks; then the schedules of a run of one epoch."""
    trainer = Trainer(debug(tmp_path, "train.warm_statistics=1", "optim.warmup_steps=4", "eval.tasks=[]"), CPU)
    plain = Trainer(debug(tmp_path / "1", "train.epochs=1", "optim.warmup_steps=4", "eval.tasks=[]"), CPU)
    towers = [p.detach().clone() for p in trainer.towers.module.parameters()]
    networks = [p.detach().clone() for p in trainer.loss.parameters()]
    prototypes = {"temperature.image.prototypes", "temperature.text.prototypes"}  # begin as features
    for batch in trainer.data.loader_from(0):
        trainer.train_step(batch)
        assert trainer.lr == 0
    assert all(map(torch.equal, trainer.towers.module.parameters(), towers))
    for (name, p), first in zip(trainer.loss.named_parameters(), networks, strict=True):
        assert torch.equal(p, first) != (name in prototypes), name
    ids = torch.arange(len(trainer.data.source))
    assert trainer.loss.state.read(ids).isfinite().sum() == 2 * 320
    for optimizer in trainer.optimizers:
        moments = [state["exp_avg"].abs().max() > 0 for state in optimizer.state.values()]
        assert sum(moments) > 0.9 * len(moments)
        assert all(state["step"] == 10 for state in optimizer.state.values())
    rates = []
    for run, epoch in ((trainer, 1), (plain, 0)):
        run.loss.set_epoch(epoch)
        rates.append([])
        for batch in run.data.loader_from(epoch):
            run.train_step(batch)
            rates[-1].append(run.lr)
    assert rates[0] == rates[1]
    assert rates[0][:4] == pytest.approx([0.25e-3, 0.5e-3, 0.75e-3, 1e-3])
    assert sum(map(torch.equal, trainer.towers.module.parameters(), towers)) == 1, "open_clip's own logit scale"


def test_temperatures_of_a_table_stand_still_too(tmp_path: Path) -> None:
    given = [f"loss={{name='{name}', rho=1.5, tau_max=0.15}}" for name in ("isogclr", "fastclip-v2")]
    for number, loss in enumerate(given):
        warm = "train.warm_statistics=1", "optim.warmup_steps=0"
        run = Trainer(debug(tmp_path / str(number), loss, *warm, "eval.tasks=[]"), CPU)
        table = run.loss.temperature.state
        for batch in islice(run.data.loader_from(0), 2):
            run.train_step(batch)
        tau, *moments = table.read(batch.ids).unflatten(0, (-1, 2))
        assert (tau == run.loss.temperature.start).all()
        assert all(part.any() for part in moments)


def test_a_run_with_warm_statistics_resumes_where_it_stopped(tmp_path: Path) -> None:
    warm = ["train.warm_statistics=1", "optim.warmup_steps=3"]
    assert train(debug(tmp_path / "a", *warm))
    for stop in (4, 10, 15):
        assert train(debug(tmp_path / "b", *warm, f"train.stop_after_steps={stop}"), resume="auto")
    assert train(debug(tmp_path / "b", *warm), resume="auto")
    assert losses(tmp_path / "a" / "debug") == losses(tmp_path / "b" / "debug")
    same_ending(tmp_path / "a" / "debug", tmp_path / "b" / "debug")


def test_epochs_to_train_in_are_needed(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"train.*warm_statistics 2 leaves none of 2 epochs to train in"):
        debug(tmp_path, "train.warm_statistics=2")


def wait_for_step(run: Path, step: int, process: subprocess.Popen) -> None:
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline:
        assert process.poll() is None, process.communicate()
        if (run / "metrics.jsonl").is_file() and len((run / "metrics.jsonl").read_text().splitlines()) >= step:
            return
        time.sleep(0.01)
    raise AssertionError("the run did not get going")


def test_a_resume_with_no_step_left_ends_and_keeps_where_the_weights_came_from(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one = debug(tmp_path / "a", "train.stop_after_steps=1", "eval.tasks=[]")
    assert train(one)
    said = "".join(capsys.readouterr())
    assert f"  checkpoint: {tmp_path / 'a' / 'debug' / 'checkpoints' / 'step-00000001'}\n" in said
    assert "5,133 beyond data.limit" in said
    first = json.loads((one.folder / "run.json").read_text())

    # In its own folder, then in another one, where there is no checkpoint to name.
    assert train(one, resume="auto")
    assert json.loads((one.folder / "run.json").read_text())["weights"] == first["weights"] == []
    other = debug(tmp_path / "b", "train.stop_after_steps=1", "eval.tasks=[]")
    capsys.readouterr()
    assert train(other, resume=str(list_checkpoints(one.folder)[-1]))
    said = "".join(capsys.readouterr())
    assert f"run: {other.folder}\n" in said
    assert "  checkpoint: " not in said
    assert "finished" in json.loads((other.folder / "run.json").read_text())


def test_checkpoints_every_so_many_epochs_and_of_the_last_and_the_best(tmp_path: Path) -> None:
    words = ("train.keep=99", "train.epochs=5", "train.checkpoint_epochs=2")
    assert train(debug(tmp_path / "plain", "eval.tasks=[]", *words))
    steps = int(list_checkpoints(tmp_path / "plain" / "debug")[-1].name.removeprefix("step-")) // 5
    saved = [int(folder.name.removeprefix("step-")) for folder in list_checkpoints(tmp_path / "plain" / "debug")]
    assert saved == [2 * steps, 4 * steps, 5 * steps]

    # The first evaluation, of the third epoch, is the best until then.
    assert train(debug(tmp_path / "scored", "eval.every_epochs=3", *words))
    saved = [int(folder.name.removeprefix("step-")) for folder in list_checkpoints(tmp_path / "scored" / "debug")]
    assert saved == [2 * steps, 3 * steps, 4 * steps, 5 * steps]


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT], ids=lambda n: n.name)
def test_a_killed_run_ends_with_the_same_weights(number: signal.Signals, straight: Path, tmp_path: Path) -> None:
    # As a scheduler or a terminal does it: the whole process group gets the signal, loader workers too.
    arguments = ["train", str(CONFIG_FOLDER / "debug.toml"), f"out={tmp_path}", "train.checkpoint_every=3"]
    start = command(*arguments, "data.workers=2")
    run = tmp_path / "debug"
    with subprocess.Popen(start, env=environment(), stdout=-1, stderr=-1, text=True, start_new_session=True) as process:
        wait_for_step(run, 8, process)
        os.killpg(process.pid, number)
        process.communicate(timeout=300)
    if number != signal.SIGKILL:
        assert process.returncode == 143
        assert len(losses(run)) == int(list_checkpoints(run)[-1].name.removeprefix("step-")), "saved where it stopped"
    assert train(debug(tmp_path, "train.checkpoint_every=3"), resume="auto")
    assert losses(run) == losses(straight)
    same_ending(run, straight)


def test_a_killed_loader_worker_ends_the_run_in_one_line_and_it_goes_on(straight: Path, tmp_path: Path) -> None:
    arguments = ["train", str(CONFIG_FOLDER / "debug.toml"), f"out={tmp_path}", "train.checkpoint_every=3"]
    run = tmp_path / "debug"
    start = command(*arguments, "data.workers=2")
    with subprocess.Popen(start, env=environment(), stdout=-1, stderr=-1, text=True) as process:
        wait_for_step(run, 4, process)
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        os.kill(int(children[-1]), signal.SIGKILL)
        _, errors = process.communicate(timeout=300)
    assert process.returncode == 2
    assert re.fullmatch(
        r"disttempnet: loader worker \d+ died( \(Killed\))?, .* --resume auto .*", errors.splitlines()[-1]
    )
    assert "Traceback" not in errors
    assert load_run(run).step >= 3
    assert train(debug(tmp_path, "train.checkpoint_every=3"), resume="auto")
    assert losses(run) == losses(straight)
    same_ending(run, straight)


def test_a_loader_worker_that_dies_while_it_hands_over_a_batch_is_named_too(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(tmp_path / "worker"))  # and nobody listens
        handle = DupFd(0)
        handle._id = (str(tmp_path / "worker"), 1)
        reason = "a loader worker died while it sent a batch, usually out of memory"
        with pytest.raises(UserError, match=reason), lost_workers_named():
            handle.detach()
    with pytest.raises(ConnectionResetError), lost_workers_named():
        raise ConnectionResetError("of something else")


def test_the_wait_for_data_is_logged_and_shown_where_it_matters(straight: Path) -> None:
    for line in (straight / "metrics.jsonl").read_text(encoding="utf-8").splitlines():
        record = json.loads(line)
        assert 0 < record["data_wait"] < record["step_seconds"]
        assert record["samples_per_second"] == pytest.approx(32 / record["step_seconds"])
    shown = {"samples_per_second": 320.0, "loss": 1.0, "step_seconds": 0.1}
    assert _summary(shown | {"data_wait": 0.035}).endswith("waits for data 35%")
    assert "waits" not in _summary(shown | {"data_wait": 0.009})


def test_an_existing_run_is_not_overwritten(straight: Path) -> None:
    before = {p: p.stat().st_mtime_ns for p in straight.rglob("*") if p.is_file()}
    with pytest.raises(UserError, match="exists already; continue it with --resume auto"):
        train(debug(straight.parent))
    assert {p: p.stat().st_mtime_ns for p in straight.rglob("*") if p.is_file()} == before


def test_another_config_is_refused_by_key(straight: Path) -> None:
    with pytest.raises(UserError, match=r"optim.lr was 0.001 and is 0.002 now"):
        train(debug(straight.parent, "optim.lr=2e-3"), resume="auto")
    with pytest.raises(UserError, match=r"loss.rho was 2.4 and is 2.0 now"):
        train(debug(straight.parent, "loss.rho=2.0"), resume="auto")


def test_a_key_that_an_older_checkpoint_lacks_has_its_default(straight: Path, tmp_path: Path) -> None:
    shutil.copytree(straight, tmp_path / "debug")
    path = list_checkpoints(tmp_path / "debug")[-1] / "trainer.pt"
    content = torch.load(path, weights_only=True)
    del content["config"]["train"]["freeze"]
    torch.save(content, path)
    assert train(debug(tmp_path), resume="auto")


def test_a_checkpoint_of_another_data_set_is_refused(straight: Path) -> None:
    with pytest.raises(UserError, match="was trained on another data set"):
        train(debug(straight.parent, "data.train=embedded:emoji/val"), resume="auto")


def test_an_unfinished_checkpoint_is_removed_and_a_damaged_one_passed_over(
    straight: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "debug"
    shutil.copytree(straight, run)
    left = [run / "checkpoints" / name for name in (".writing-step-00000099-1", ".removing-step-00000005-1")]
    for folder in left:
        folder.mkdir()
    assert list_checkpoints(run)[-1].name == "step-00000020"
    weights = run / "checkpoints" / "step-00000020" / "open_clip_model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1  # nothing but a checksum shows this
    weights.write_bytes(content)
    with pytest.raises(UserError, match=r"step-00000020: damaged: open_clip_model.safetensors has changed"):
        train(debug(tmp_path), resume=str(weights.parent))
    assert train(debug(tmp_path), resume="auto")
    printed = capsys.readouterr().err
    assert "step-00000020 is damaged and skipped: open_clip_model.safetensors has changed" in printed
    assert "from step 10" in printed
    assert not any(folder.exists() for folder in left)
    same_ending(run, straight)
    assert losses(run) == losses(straight)


def test_where_every_checkpoint_is_damaged_nothing_is_begun_anew(straight: Path, tmp_path: Path) -> None:
    run = tmp_path / "debug"
    shutil.copytree(straight, run)
    for folder in list_checkpoints(run):
        os.truncate(folder / "trainer.pt", 100)
    with pytest.raises(
        UserError, match=r"all its checkpoints are damaged: step-00000020 is damaged .* step-00000010 is"
    ):
        train(debug(tmp_path), resume="auto")


def test_going_on_from_an_earlier_checkpoint_gives_up_the_later_ones(straight: Path, tmp_path: Path) -> None:
    run = tmp_path / "debug"
    shutil.copytree(straight, run)
    goal = debug(tmp_path, "train.stop_after_steps=14", "train.checkpoint_every=2", "train.keep=1")
    assert train(goal, resume=str(list_checkpoints(run)[0]))
    assert [folder.name for folder in list_checkpoints(run)] == ["step-00000014"], "and not the old step 20"
    assert max(losses(run)) == 14


def test_a_step_that_is_not_finite_stops_with_its_samples(tmp_path: Path) -> None:
    trainer = Trainer(debug(tmp_path), torch.device("cpu"))
    with torch.no_grad():
        next(p for p in trainer.towers.module.parameters() if p.ndim > 1).fill_(torch.nan)
    with pytest.raises(UserError, match="step 1 is not finite"):
        trainer.run()
    report = json.loads((tmp_path / "debug" / "nonfinite-rank0.json").read_text(encoding="utf-8"))
    assert len(report["ids"]) == 32
    assert not list_checkpoints(tmp_path / "debug")


def test_open_clip_opens_a_checkpoint(straight: Path) -> None:
    run = load_run(straight)
    import open_clip

    folder = list_checkpoints(straight)[-1]
    module, _, _ = open_clip.create_model_and_transforms(f"local-dir:{folder}")
    named, _, _ = open_clip.create_model_and_transforms(
        "demo-vit-32", pretrained=str(folder / "open_clip_model.safetensors")
    )
    tokens = run.towers.tokenizer(["a cat", "two dogs"])
    expected = run.towers.module.encode_text(tokens)
    torch.testing.assert_close(module.eval().encode_text(tokens), expected)
    torch.testing.assert_close(named.eval().encode_text(tokens), expected)
    assert 1 < float(module.logit_scale.detach().exp()) < 200


@pytest.mark.parametrize("loss", ['{name="clip"}', '{name="sogclr"}', '{name="tempnet", rho=2.0, network="dist"}'])
def test_other_objectives_train(loss: str, tmp_path: Path) -> None:
    assert train(debug(tmp_path, f"loss={loss}", "train.stop_after_steps=3", "eval.tasks=[]"))
    assert all(np.isfinite(list(losses(tmp_path / "debug").values())))


def test_the_bias_of_siglip_is_in_every_checkpoint_and_is_trained_on(tmp_path: Path) -> None:
    siglip = ['loss={name="siglip", bias=-5.0}', "eval.tasks=[]"]
    assert train(debug(tmp_path / "straight", *siglip, "train.stop_after_steps=6"))
    assert train(debug(tmp_path / "stopped", *siglip, "train.stop_after_steps=3"))
    assert train(debug(tmp_path / "stopped", *siglip, "train.stop_after_steps=6"), resume="auto")
    same_ending(tmp_path / "straight" / "debug", tmp_path / "stopped" / "debug")
    run = load_run(tmp_path / "stopped" / "debug")
    import open_clip

    folder = list_checkpoints(tmp_path / "stopped" / "debug")[-1]
    opened, _, _ = open_clip.create_model_and_transforms(f"local-dir:{folder}")
    assert opened.logit_bias.item() == pytest.approx(run.loss.logit_bias.item())
    assert opened.logit_bias.item() != -5.0
