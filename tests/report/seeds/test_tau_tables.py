"""Tables of τ over seeds."""

from __future__ import annotations

import numpy as np
import pytest

from disttempnet.report.seeds.comparison import compare_groups
from disttempnet.report.seeds.tables import latex_table, markdown_table
from disttempnet.report.seeds.tau_tables import tau_series
from tests.report.invented import result
from tests.report.seeds.seeds import TASK, csv_rows, runs


def test_tau_stands_in_every_table() -> None:
    """Where it ends, its correlation with frequency, and its trajectory: mean and std over the seeds 0, 1, 2."""
    made = [one for one in runs() if one.name.startswith("x")]
    for seed, one in enumerate(made):
        one.tau["text"] = [0.04 + 0.01 * seed, 0.02, 0.06, 0.005]
        curve = one.tau_curve  # what stands between its points lies on a line
        curve["mean"] = [0.01 * epoch + 0.001 * seed for epoch in curve["epoch"]]
    final = "0.0300 ± 0.0040, 0.0200 to 0.0500", "0.0500 ± 0.0050, 0.0200 to 0.0600", "0.60 (0.10)", "-0.25 (0.00)"
    # four epochs; the first that is logged is .1
    trained = "0.0020 (0.0010)", "0.0110 (0.0010)", "0.0210 (0.0010)", "0.0310 (0.0010)", "0.0410 (0.0010)"
    markdown, latex = markdown_table(compare_groups(made)), latex_table(compare_groups(made))
    for words in (final, trained):
        assert "| A_B & τ\\|&lt;b&gt; | " + " | ".join(words) + " |" in markdown
        assert r"A\_B \& $\tau$|<b> & " + " & ".join(words).replace("±", r"$\pm$") + r" \\" in latex
    assert latex.count(r"\begin{tabular}") == latex.count(r"\end{tabular}") == 3
    rows = {row["metric"]: row for row in csv_rows(made) if not row["task"]}
    assert {row["n"] for row in rows.values()} == {"3"}
    for metric, mean, std in (
        ("tau_image_mean", 0.03, 0),
        ("tau_text_mean", 0.05, 0.01),
        ("tau_text_min", 0.02, 0),
        ("tau_text_max", 0.06, 0),
        ("tau_text_std", 0.005, 0),
        ("tau_image_rank_correlation_with_frequency", 0.6, 0.1),
        ("tau_text_rank_correlation_with_frequency", -0.25, 0),
        ("training_tau_image_mean@0", 0.002, 0.001),
        ("training_tau_image_mean@0.25", 0.011, 0.001),
        ("training_tau_image_mean@1", 0.041, 0.001),
    ):
        assert float(rows[metric]["mean"]) == pytest.approx(mean, abs=1e-12), metric
        assert float(rows[metric]["std"]) == pytest.approx(std, abs=1e-12), metric


def test_no_table_of_tau_where_it_is_one_for_all() -> None:
    made = runs()[:3]
    for one in made:
        one.tau_by_frequency.clear()
    comparison = compare_groups(made)
    assert "τ" not in markdown_table(comparison)
    assert latex_table(comparison).count("tabular") == 2
    assert all(row["task"] for row in csv_rows(made))


def test_tau_of_seeds_that_logged_at_other_epochs_is_averaged_at_the_same_epochs() -> None:
    made = [result("clip", s, {TASK: {"acc1": 0.1}}) for s in (1, 2)]
    for one, epochs, slope in zip(made, ([0.5, 1, 2, 4], [1, 3, 4]), (0.01, 0.03), strict=True):
        mean = slope * np.array(epochs)
        one.tau_curve.update(epoch=epochs, mean=mean.tolist(), min=(mean - 0.001).tolist(), max=(2 * mean).tolist())
    (group,) = compare_groups(made).groups
    x, mean, low, high = tau_series(group)
    np.testing.assert_allclose(x, [1, 2, 3, 4])
    np.testing.assert_allclose(mean, 0.02 * x)
    np.testing.assert_allclose(low, 0.01 * x - 0.001)
    np.testing.assert_allclose(high, 0.06 * x)
