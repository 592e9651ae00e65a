"""Scores as records, and compared over runs."""

from __future__ import annotations

import json

import pytest

from disttempnet.evaluation import from_record, to_record
from disttempnet.evaluation.scores import clearly_best, compare, metric_title, percent
from tests.evaluation.toy import accuracy


def test_record_round_trip() -> None:
    results = {"emoji-concepts": accuracy(0.5), "other": accuracy(0.25, 8, ("0.tar/3",))}
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
    (row,) = compare([{"t": accuracy(0.5)}, {}], "t")
    assert row == ("acc1", 0.01, (0.5, None), None)


def test_titles() -> None:
    assert metric_title("image_to_text_recall@10") == "image → text R@10"
    assert metric_title("acc1_tail") == "top-1, tail"
    assert [percent(value) for value in (None, 0.000522, 0.5)] == ["–", "0.05", "50.0"]
