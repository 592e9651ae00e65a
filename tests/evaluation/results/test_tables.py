"""Tables of scores in a terminal."""

from __future__ import annotations

from rich.console import Console

from disttempnet.evaluation import Scores, results_table
from tests.evaluation.toy import accuracy


def rendered(results: dict[str, dict[str, Scores]]) -> str:
    console = Console(width=100, color_system="standard", force_terminal=True, legacy_windows=False)
    with console.capture() as capture:
        console.print(results_table(results))
    return capture.get()


def test_table_marks_the_winner_and_shows_chance() -> None:
    text = rendered({"[a]": {"emoji-concepts": accuracy(0.9)}, "b": {"emoji-concepts": accuracy(0.5)}})
    assert "\x1b[1m90.0" in text
    assert "\x1b[1m50.0" not in text
    for part in ("[a]", "Unseen concepts", "zero-shot top-1", "1.0", "standard error"):
        assert part in text


def test_table_of_one_run_says_what_is_incomplete() -> None:
    text = rendered({"a": {"t": accuracy(0.9, corrupt=("0.tar/00007",))}})
    assert "0.tar/00007" in text
    assert "standard error" not in text
