"""A worker of a comparison."""

from __future__ import annotations

from pathlib import Path

import pytest

from disttempnet.compare import worker
from disttempnet.compare.grid import load_grid
from disttempnet.training import trainer
from tests.compare.grids import write


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
