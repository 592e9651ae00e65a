"""Evaluations of two configs over three seeds."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.report.evaluations.records import (
    CLIP,
    TEMPNET,
    flat,
    run_subject,
    write_evaluation,
)


@pytest.fixture
def grid(tmp_path: Path) -> Path:
    """Two configs of three seeds, as `evaluate` leaves them below run folders."""
    for loss, values in (("clip", CLIP), ("disttempnet-v1", TEMPNET)):
        for seed, value in enumerate(values, 1):
            write_evaluation(
                tmp_path / f"{loss}--seed-{seed}/evaluation/step-100", flat(value), run_subject(loss, seed)
            )
    return tmp_path
