"""The progress display: bars in a terminal, plain lines elsewhere, nothing where it is off."""

from __future__ import annotations

import sys

import pytest

from disttempnet.io import progress
from disttempnet.io.progress import Meter, ProgressDisplay


@pytest.fixture
def now(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time, which a test sets."""
    time = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: time[0])
    return time


def test_a_plain_line_has_count_rate_and_eta(now: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    with Meter("reading", total=1100, done=100) as meter:
        now[0] = 10.0
        meter.advance(100)
        assert capsys.readouterr().err == "", "too early for a line"
        now[0] = 20.0
        meter.advance(100)
        assert capsys.readouterr().err == "reading  300/1,100  10/s  ETA 0:01:20\n", "the first hundred took no time"
        now[0] = 30.0
        meter.advance(800)
        assert capsys.readouterr().err == "", "the next line is not due"


def test_nothing_done_or_no_total_gives_no_eta(now: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    with Meter("reading", total=100_000) as meter:
        now[0] = 20.0
        meter.advance(0)
        assert capsys.readouterr().err == "reading  0/100,000  0/s\n"
    with Meter("reading", total=0, sizes=True) as meter:
        now[0] = 40.0
        meter.advance(2_000_000)
    assert capsys.readouterr().err == "reading  2.0 MB  100.0 kB/s\n"


def test_sizes_are_bytes(now: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    with Meter("fetching", total=4_000_000, sizes=True) as meter:
        now[0] = 20.0
        meter.advance(2_000_000)
    assert capsys.readouterr().err == "fetching  2.0 MB/4.0 MB  100.0 kB/s  ETA 0:00:20\n"


def test_bars_are_drawn_in_a_terminal_only(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], now: list[float]
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "100")
    with ProgressDisplay() as display:
        bar = display.add("a [name]", total=4)
        display.update(bar, 2, "2/4", name="b [name]")
        display.say("a line")
        now[0] = 60.0
        display.plain_line("a plain line")
    shown = capsys.readouterr().err
    assert "b [name]" in shown
    assert "2/4" in shown
    assert "a plain line" not in shown
    assert shown.index("a line") < shown.rindex("2/4")


def test_colours_that_are_forced_make_no_terminal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], now: list[float]
) -> None:
    """Jupyter and CI set FORCE_COLOR, which rich takes for a terminal: a log would hold every bar that is drawn."""
    monkeypatch.setenv("FORCE_COLOR", "1")
    with ProgressDisplay() as display:
        display.update(display.add("name", total=4), 2, "2/4")
        now[0] = 60.0
        display.plain_line("a plain line")
    assert capsys.readouterr().err == "a plain line\n"


def test_nothing_is_shown_where_it_is_off(capsys: pytest.CaptureFixture[str], now: list[float]) -> None:
    with Meter("reading", total=10, active=False) as meter:
        now[0] = 60.0
        meter.advance(5)
        meter.say("a line")
    assert capsys.readouterr() == ("", "")


def test_a_line_that_is_due_does_not_wait(capsys: pytest.CaptureFixture[str], now: list[float]) -> None:
    with ProgressDisplay(stderr=False) as display:
        display.plain_line("first", due=True)
        display.plain_line("too early")
    assert capsys.readouterr() == ("first\n", "")
