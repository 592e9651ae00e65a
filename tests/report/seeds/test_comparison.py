"""Groups × metrics: columns, marks, and differences to a baseline by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest

from disttempnet.errors import UserError
from disttempnet.report.compact import CompactResult
from disttempnet.report.seeds.comparison import GroupComparison, compare_groups, mark
from disttempnet.report.seeds.groups import Cell, Column
from disttempnet.report.seeds.intervals import t_quantile
from tests.report.invented import result

TASK = "emoji-concepts"


def scores(acc1: float, **others: float) -> dict[str, dict[str, float]]:
    return {TASK: {"acc1": acc1, **others}}


def runs(loss: str, values: dict[int, float], **more: object) -> list[CompactResult]:
    return [result(loss, seed, scores(value), **more) for seed, value in values.items()]


def differences(comparison: GroupComparison) -> dict[str, tuple[str | None, float | None, int]]:
    """Title → title of its baseline, difference in the first column, number of pairs."""
    rows = zip(comparison.groups, comparison.baselines, comparison.differences, strict=True)
    return {
        group.title: (base and base.title, row[0] and row[0].mean, row[0].n if row[0] else 0)
        for group, base, row in rows
    }


@pytest.mark.parametrize(
    ("means", "marks"),
    [
        ([0.48, 0.50, 0.47], ["", "best", ""]),
        ([0.50, 0.50], ["best", "best"]),
        ([0.50, None], ["", None]),
        ([None, 0.3, 0.4], [None, "", "best"]),
    ],
)
def test_the_highest_mean_of_a_column_is_marked(means: list[float | None], marks: list[str | None]) -> None:
    marked = mark([None if mean is None else Cell(mean, 0.1, n=3) for mean in means])
    assert [None if cell is None else cell.mark for cell in marked] == marks
    assert [cell and cell.mean for cell in marked] == means


def test_columns_are_the_main_metrics_or_those_asked_for() -> None:
    runs = [result("clip", 1, scores(0.1, acc5=0.3, acc1_tail=0.05, acc1_head=0.2, mean_recall=0.4))]
    chosen = [column.metric for column in compare_groups(runs).columns]
    assert chosen == ["acc1", "mean_recall", "acc1_head", "acc1_tail"]
    assert compare_groups(runs, [f"{TASK}/acc5"]).columns == (Column(TASK, "acc5"),)
    with pytest.raises(UserError, match=f"unknown metric '{TASK}/acc6'. Did you mean '{TASK}/acc"):
        compare_groups(runs, [f"{TASK}/acc6"])


def test_a_metric_that_some_groups_lack_is_left_empty() -> None:
    runs = [result("clip", 1, scores(0.1)), result("sogclr", 1, scores(0.2, mean_recall=0.5))]
    (_, missing), (_, alone) = compare_groups(runs).cells
    assert missing is None
    assert alone is not None
    assert alone.mark == ""  # nothing to be better than


CLIP = {1: 0.20, 2: 0.22, 3: 0.27}


def test_differences_are_paired_by_seed() -> None:
    """The seeds differ by more than the objectives, which differ alike in every seed."""
    made = runs("clip", CLIP) + runs("sogclr", {1: 0.21, 2: 0.24, 3: 0.28})
    comparison = compare_groups(made)
    (one,) = comparison.differences[1]
    assert one is not None
    reach = t_quantile(2) * (1 / 3) ** 0.5 * 0.01 / 3**0.5  # of .01, .02 and .01: variance .0001 / 3
    assert one.mean == pytest.approx(0.04 / 3)
    assert one.interval == pytest.approx((0.04 / 3 - reach, 0.04 / 3 + reach))
    assert (one.n, one.sign) == (3, 0)
    assert comparison.baselines[0] is None
    assert comparison.differences[0] == (None,)
    assert comparison.intervals == [one]


def test_only_shared_seeds_count() -> None:
    made = runs("clip", CLIP) + runs("sogclr", {2: 0.25, 3: 0.31, 4: 0.9}) + runs("tempnet", {8: 0.5, 9: 0.5})
    found = differences(compare_groups([*made, *runs("isogclr", {3: 0.5})]))
    assert found["SogCLR"] == ("CLIP", pytest.approx(0.035), 2)
    assert found["tempnet"] == ("CLIP", None, 0)
    assert found["isogclr"] == ("CLIP", pytest.approx(0.23), 1)


def test_other_data_and_other_evaluations_have_no_differences() -> None:
    others = {
        "sogclr": {"index_digest": "beef"},
        "tempnet": {"num_samples": 7},
        "isogclr": {"index_digest": "", "num_samples": 0},  # unknown: the name of the data decides
    }
    made = runs("clip", CLIP)
    for loss, facts in others.items():
        for one in runs(loss, CLIP):
            one.facts.update(facts)
            made.append(one)
    for key, value in (("trials", {"acc1": 900}), ("samples", 900), ("chance", {"acc1": 0.02})):
        for one in runs("siglip", CLIP, run=f"siglip-{key}", lr=len(made)):
            setattr(one.final[TASK], key, value)
            made.append(one)
    found = differences(compare_groups(made))
    paired = [title for title, (_, _, n) in found.items() if n]
    assert paired == ["isogclr"]
    for one in made:
        if one.name.startswith("isogclr"):
            one.config["data"]["train"] = "elsewhere"
    assert not any(n for _, _, n in differences(compare_groups(made)).values())


def test_a_baseline_is_named_by_run_title_or_full_name() -> None:
    made = [
        *runs("clip", CLIP, run="low", temperature=0.05),
        *runs("clip", CLIP, run="high", temperature=0.1),
        *runs("sogclr", CLIP),
    ]
    assert {base for base, _, _ in differences(compare_groups(made)).values()} == {None, "CLIP (low)"}
    for name in ("high", "CLIP (high)"):
        assert {base for base, _, _ in differences(compare_groups(made, (), name)).values()} == {None, "CLIP (high)"}
    with pytest.raises(UserError, match=r"unknown baseline 'hihg'. Did you mean 'high'\?"):
        compare_groups(made, (), "hihg")


def test_a_baseline_has_the_same_varied_keys() -> None:
    """As with `[vary] data.global_batch`: objectives are compared at the same batch."""
    made = [
        one
        for loss in ("clip", "sogclr")
        for batch in (32, 512)
        for one in runs(loss, CLIP, batch=batch, varied=f"--global_batch-{batch}")
    ]
    made += runs("tempnet", CLIP, batch=64, varied="--global_batch-64")
    comparison = compare_groups(made)
    assert {title: base for title, (base, _, _) in differences(comparison).items()} == {
        "CLIP, batch 32": None,
        "CLIP, batch 512": None,
        "SogCLR, batch 32": "CLIP, batch 32",
        "SogCLR, batch 512": "CLIP, batch 512",
        "tempnet, batch 64": None,
    }
    assert comparison.difference_head == "difference to CLIP, 95 %"
    # one of them for all
    one = compare_groups(made, (), "clip--global_batch-32")
    assert {base for base, _, _ in differences(one).values()} == {None, "CLIP, batch 32"}
    assert one.difference_head == "difference to CLIP, batch 32, 95 %"


def test_a_name_of_several_groups_is_no_baseline() -> None:
    made = runs("clip", CLIP, lr=1) + runs("clip", CLIP, lr=2) + runs("sogclr", CLIP)
    made[3:6] = [replace(one, config={**one.config, "out": "runs/other"}) for one in made[3:6]]
    with pytest.raises(UserError, match=r"the baseline 'clip' is several groups; give the title of one: CLIP \[runs"):
        compare_groups(made, (), "clip")
    first = {title: base for title, (base, _, _) in differences(compare_groups(made)).items()}
    assert first["SogCLR"] == "CLIP [runs/compare/clip--seed-1]"
    assert first["CLIP [runs/other/clip--seed-1]"] == "CLIP [runs/compare/clip--seed-1]"
    chosen = compare_groups(made, (), "CLIP [runs/other/clip--seed-1]")
    assert differences(chosen)["SogCLR"][0] == "CLIP [runs/other/clip--seed-1]"


def test_a_table_of_some_columns_keeps_their_numbers() -> None:
    made = [result(loss, s, scores(0.1 * s, acc1_tail=0.2, mean_recall=0.3)) for loss in ("clip", "x") for s in (1, 2)]
    whole = compare_groups(made)
    tail = whole.only([Column(TASK, "acc1_tail")])
    assert (tail.columns, len(tail.chance), len(tail.intervals)) == ((Column(TASK, "acc1_tail"),), 1, 1)
    assert [row[0] for row in tail.cells] == [row[2] for row in whole.cells]
