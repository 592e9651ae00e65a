"""Examples: groups of queries and the extremes of τ, chosen by a rule."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from disttempnet.report.runs import examples
from disttempnet.training.checkpoint import Run
from tests.evaluation.toy import colour_towers


def test_gallery_orders_by_temperature(toy_run: Path) -> None:
    gallery = examples.temperature_gallery(examples.open_model(SimpleNamespace()), batch=4)
    assert gallery is not None
    assert gallery.total == 8
    assert len(gallery.image_tau) == 7
    assert [pair.caption for pair in gallery.extremes["image", "highest"][:2]] == ["green", "yellow"]
    assert [pair.caption for pair in gallery.extremes["text", "highest"][:2]] == ["blue", "grey"]
    assert gallery.extremes["image", "lowest"][0].image_tau == pytest.approx(0.0)


def test_groups_tell_the_runs_apart(toy_run: Path) -> None:
    blind = colour_towers()
    blind.module.encode_image = lambda pixels, normalize: torch.eye(3)[:1].repeat(len(pixels), 1)  # sees red only
    run = examples.open_model(SimpleNamespace())
    other = Run(run.folder, run.config, blind, run.loss, 40, 6, run.index_digest)
    results = [result["toy"] for result in examples.evaluate_models([run, other], ["toy"], batch=4)]
    groups = examples.zero_shot_examples(results, "toy", per_group=2)
    assert [(group.right, group.size) for group in groups] == [
        ((True, True), 1),
        ((True, False), 5),
        ((False, True), 1),
    ]
    assert all(group.total == 7 and len(group.queries) <= 2 for group in groups)
    mislabelled = groups[2].queries[0]
    assert mislabelled.text == "red"
    assert mislabelled.rankings[0].answers[0].text == "green"
    assert mislabelled.rankings[0].place > 1
    assert mislabelled.rankings[0].right_answer.text == "red"
    backwards = examples.retrieval_examples(results, "toy", to_text=False, per_group=2)
    assert sum(group.size for group in backwards) == 7
    assert all(answer.picture for group in backwards for answer in group.queries[0].rankings[0].answers)
