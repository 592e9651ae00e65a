"""Records, comparisons and the results table."""

from __future__ import annotations

import json

import pytest
from rich.console import Console

from disttempnet.evaluation import Scores, from_record, results_table, to_record
from disttempnet.evaluation.scores import clearly_best, compare, metric_title, percent


def scores(acc1: float, trials: int = 100, corrupt: tuple[str, ...] = ()) -> Scores:
    return Scores({"acc1": acc1}, {"acc1": 0.01}, {"acc1": trials}, trials, corrupt)


def rendered(results: dict[str, dict[str, Scores]]) -> str:
    console = Console(width=100, color_system="standard", force_terminal=True, legacy_windows=False)
    with console.capture() as capture:
        console.print(results_table(results))
    return capture.get()


def test_record_round_trip() -> None:
    results = {"emoji-concepts": scores(0.5), "other": scores(0.25, 8, ("0.tar/3",))}
    assert from_record(json.loads(json.dumps(to_record(results)))) == results


def test_record_without_trials_takes_the_samples() -> None:
    record = {"results": {"t": {"acc1": 0.5}}, "chance": {"t": {"acc1": 0.1}}, "samples": {"t": 7}}
    assert from_record(record)["t"].trials == {"acc1": 7}


@pytest.mark.parametrize(
    ("values", "trials", "best"),
    [
        ((0.60, 0.50), 100, 0),  # error sqrt((.24 + .25) / 100) = .07
        ((0.50, 0.56), 100, None),
        ((0.50, 0.56), 400, 1),
        ((0.50, None), 100, None),
        ((None, 0.2, 0.9), 100, 2),
        ((0.9, 0.9, 0.1), 10**9, None),
        ((1.0, 0.0), 0, None),
    ],
)
def test_only_clear_winners_win(values, trials, best) -> None:
    assert clearly_best(values, trials) == best


def test_compare_keeps_order_and_missing_values() -> None:
    (row,) = compare([{"t": scores(0.5)}, {}], "t")
    assert row == ("acc1", 0.01, (0.5, None), None)


def test_table_marks_the_winner_and_shows_chance() -> None:
    text = rendered({"[a]": {"emoji-concepts": scores(0.9)}, "b": {"emoji-concepts": scores(0.5)}})
    assert "\x1b[1m90.0" in text
    assert "\x1b[1m50.0" not in text
    for part in ("[a]", "Unseen concepts", "zero-shot top-1", "1.0", "standard error"):
        assert part in text


def test_table_of_one_run_says_what_is_incomplete() -> None:
    text = rendered({"a": {"t": scores(0.9, corrupt=("0.tar/00007",))}})
    assert "0.tar/00007" in text
    assert "standard error" not in text


def test_titles() -> None:
    assert metric_title("image_to_text_recall@10") == "image → text R@10"
    assert metric_title("acc1_tail") == "top-1, tail"
    assert [percent(value) for value in (None, 0.000522, 0.5)] == ["–", "0.05", "50.0"]
