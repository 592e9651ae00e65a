"""The page over groups of seeds."""

from __future__ import annotations

from disttempnet.report.seeds.comparison import compare_groups
from disttempnet.report.seeds.page import comparison_page
from tests.report.invented import result
from tests.report.pages import Page, assert_self_contained
from tests.report.seeds.seeds import TASK, runs


def test_the_page_over_seeds_is_self_contained_and_escaped() -> None:
    page = Page(comparison_page(compare_groups([*runs(), result("late", 1, {TASK: {"acc1": 0.9}}, finished=False)])))
    assert_self_contained(page)
    assert page.ids == ["results", "learning", "parts", "temperatures", "frequency", "provenance"]
    for part in ("3 configurations, 2 to 3 seeds each", "A_B & τ|<b>", "25.0 (2.0)", "0123abcd", "torch 2.9"):
        assert part in page.text, part
    assert "Left out, because unfinished: late--seed-1." in page.text
    assert "90.0" not in page.text
    classes = [a.get("class") for tag, a in page.tags if tag == "td"]
    assert [word for word in classes if word and word not in ("n", "mono")] == [
        "difference", "best", "difference ahead", "difference behind",
    ]  # fmt: skip
    for part in ("difference to CLIP, 95 %", "+3.0 [3.0, 3.0]", "−20.50 [−31.94, −9.06] n=2"):
        assert part in page.text, part


def test_the_page_opens_with_the_differences_that_exclude_zero() -> None:
    page = Page(comparison_page(compare_groups(runs())))
    assert (
        "Unseen concepts, zero-shot top-1: ahead of CLIP: A_B & τ|<b> (+3.0 [3.0, 3.0]); behind CLIP: SogCLR "
        "(−20.5 [−31.9, −9.1])."
    ) in page.text
    noisy = [result(loss, s, {TASK: {"acc1": v}}) for loss in ("clip", "sogclr") for s, v in ((1, 0.2), (2, 0.3))]
    text = Page(comparison_page(compare_groups(noisy))).text
    assert "Unseen concepts, zero-shot top-1: none of 1 differences to CLIP excludes zero." in text
    single = [result(loss, 1, {TASK: {"acc1": v}}) for loss, v in (("clip", 0.2), ("sogclr", 0.3))]
    text = Page(comparison_page(compare_groups(single))).text
    assert "No two seeds are shared: differences have no interval, and nothing is claimed." in text


def test_the_page_of_runs_without_evaluations() -> None:
    page = Page(comparison_page(compare_groups([result("clip", s, {}) for s in (1, 2)])))
    assert page.ids == ["results", "learning", "temperatures", "frequency", "provenance"]
