"""A worker of a comparison."""

from __future__ import annotations

import json
import signal
import zlib
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from disttempnet.compare import worker
from disttempnet.compare.grid import load_grid, run_state
from disttempnet.config import Config, LossConfig, dump_config, load_config
from disttempnet.training import trainer
from disttempnet.training.run_folder import list_checkpoints
from tests.compare.grids import GRID, losses, write


def test_a_fault_of_the_program_is_named_and_logged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(*_: object, **__: object) -> bool:
        raise ZeroDivisionError("by hand\nsecond line")

    monkeypatch.setattr(trainer, "train", broken)
    config = load_grid(write(tmp_path)).configs[0]
    end = worker._run(config, None)  # type: ignore[arg-type]
    assert end == worker.RunEnd("failed", "ZeroDivisionError: by hand")
    assert 'raise ZeroDivisionError("by hand' in capsys.readouterr().err


# what an older version had no name for, with the value that it trained with
LATER = {"tau_gradient_limit": 5.0, "eps": 0.0, "drift": 0.0}


def make_older(run: Path) -> None:
    """Make a run folder what a version without the arguments in LATER would have written."""
    config = load_config(run / "config.toml")
    arguments = {key: value for key, value in config.loss.arguments.items() if key not in LATER}
    assert len(arguments) == len(config.loss.arguments) - len(LATER)
    older = config.model_copy(update={"loss": LossConfig(name=config.loss.name, **arguments)})
    (run / "config.toml").write_text(dump_config(older), encoding="utf-8")
    for saved in list_checkpoints(run):
        trainer = torch.load(saved / "trainer.pt", weights_only=True)
        for key in LATER:
            del trainer["config"]["loss"][key]
        torch.save(trainer, saved / "trainer.pt")
        content = (saved / "trainer.pt").read_bytes()
        listing = json.loads((saved / "files.json").read_text(encoding="utf-8"))
        listing["trainer.pt"] = [len(content), zlib.crc32(content)]
        (saved / "files.json").write_text(json.dumps(listing), encoding="utf-8")


def with_limit(config: Config, limit: float) -> Config:
    loss = config.loss.model_copy(update={"tau_gradient_limit": limit})
    return config.model_copy(update={"loss": loss})


def test_a_run_that_an_older_version_began_goes_on_as_it_began(tmp_path: Path) -> None:
    text = GRID.replace("[1, 2]", "[1]").replace("64", "160")
    _, config = load_grid(write(tmp_path, text)).configs
    assert "tau_gradient_limit" not in config.loss.arguments

    def stop(step: int, *_: object) -> None:
        if step == 3:
            signal.raise_signal(signal.SIGTERM)

    assert not trainer.train(with_limit(config, 5.0), report=stop)
    assert run_state(config).kind == "differs"  # this version's own run, with another value
    make_older(config.folder)
    assert run_state(config).kind == "begun"
    assert run_state(with_limit(config, 0.0)).why.startswith(
        f"{config.folder}: loss.tau_gradient_limit was 5.0 and is 0.0 now"
    )

    parent = SimpleNamespace(send=lambda message: None)
    assert worker._run(config, parent) == worker.RunEnd("finished")  # type: ignore[arg-type]
    assert load_config(config.folder / "config.toml").loss.arguments.items() >= LATER.items()
    straight = with_limit(config, 5.0).model_copy(update={"out": str(tmp_path / "straight")})
    assert trainer.train(straight)
    assert losses(config.folder) == losses(straight.folder)

    make_older(config.folder)
    assert run_state(config).kind == "done"
