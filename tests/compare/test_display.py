"""The display of a comparison."""

from __future__ import annotations

from typing import Any

import pytest

from disttempnet.compare import display


def test_a_run_that_fails_at_its_start_does_not_shorten_the_eta(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(display.time, "monotonic", lambda: now[0])
    shown = display.GridDisplay(4, 0)
    metrics: dict[str, Any] = {}
    shown.began("bad")
    now[0] = 2.0
    shown.ended("bad", "failed", "by hand", 2.0)
    assert "ETA" not in shown._overall(), "nothing is known of the speed yet"
    shown.began("good")
    shown.progress("good", 0, 10, metrics)
    now[0] = 12.0
    shown.progress("good", 5, 10, metrics)
    assert shown._overall().endswith("ETA 0:01:00")  # half a run in 12 s; 2.5 are left
    shown.ended("good", "failed", "half way", 10.0)
    assert shown._overall().endswith("ETA 0:00:48")  # 2 are left


def test_shares_that_round_give_no_eta_before_work_is_done() -> None:
    """The shares at which runs resume add up to another float in another order: no speed may come of that."""
    shown, shares = display.GridDisplay(4, 0), {"a": 76, "b": 32, "c": 95}
    for name in shares:
        shown.began(name)
    for name in ("c", "a", "b"):
        shown.progress(name, shares[name], 100, {})
    assert shown._overall() == "0/4 runs"
