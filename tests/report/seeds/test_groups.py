"""Groups of seeds: what belongs together, mean and spread against NumPy."""

from __future__ import annotations

import numpy as np
import pytest

from disttempnet.config import DataConfig, EvalConfig, TrainConfig
from disttempnet.errors import UserError
from disttempnet.losses import OBJECTIVES
from disttempnet.losses.registry import LATER_ARGUMENTS
from disttempnet.report.compact import CompactResult
from disttempnet.report.seeds.comparison import compare_groups
from disttempnet.report.seeds.groups import Cell, batch_label, cell_of, families
from tests.report.invented import result

TASK = "emoji-concepts"


def scores(acc1: float, **others: float) -> dict[str, dict[str, float]]:
    return {TASK: {"acc1": acc1, **others}}


def test_mean_and_sample_deviation_are_numpys() -> None:
    values = np.random.default_rng(0).uniform(size=7).tolist()
    cell = cell_of(values)
    assert cell is not None
    assert cell.mean == pytest.approx(np.mean(values), rel=1e-12)
    assert cell.std == pytest.approx(np.sqrt(np.var(values) * 7 / 6), rel=1e-12)
    assert cell.n == 7
    assert cell_of([0.25]) == Cell(0.25, None, 1)
    assert cell_of([]) is None


def test_runs_that_differ_only_in_seed_name_and_place_are_one_group() -> None:
    runs = [result("clip", seed, scores(0.1 * seed)) for seed in (3, 1, 2)]
    runs += [result("clip", 1, scores(0.9), run="clip-long", lr=9)]
    runs += [result("sogclr", 1, scores(0.2)), result("sogclr", 2, scores(0.9), finished=False)]
    comparison = compare_groups(runs)
    assert [(group.title, group.seeds) for group in comparison.groups] == [
        ("CLIP (clip)", [1, 2, 3]),
        ("CLIP (clip-long)", [1]),
        ("SogCLR", [1]),
    ]
    assert comparison.unfinished == ("sogclr--seed-2",)
    (cell,) = comparison.cells[0]
    assert cell is not None
    assert (cell.mean, cell.std, cell.n) == (pytest.approx(0.2), pytest.approx(0.1), 3)
    assert comparison.chance == (0.01,)


def test_what_the_result_does_not_depend_on_tells_no_runs_apart_nor_do_keys_that_old_lines_lack() -> None:
    old, new, slow = (result("clip", seed, scores(0.1 * seed)) for seed in (1, 2, 3))
    new.config["data"] |= {"transform": DataConfig.model_fields["transform"].default, "lanes": 8, "workers": 7}
    new.config["eval"] = {"tasks": [], "every_epochs": EvalConfig().every_epochs, "batch": 16}
    new.config["train"] |= {"freeze": TrainConfig.model_fields["freeze"].default, "log_every": 3, "compile": True}
    new.config["data"]["index"] = "elsewhere"
    slow.config["train"] |= {"checkpoint_every": 3, "keep": 9, "timeout_minutes": 99.0}
    assert [group.seeds for group in compare_groups([old, new, slow]).groups] == [[1, 2, 3]]
    new.config["data"]["gone"] = "a key of long ago"
    slow.config["data"]["lanes"] = 4
    assert [group.seeds for group in compare_groups([old, new, slow]).groups] == [[1], [2], [3]]


@pytest.mark.parametrize("loss", ["clip", "sogclr", "isogclr", "fastclip-v2", "siglip"])
def test_results_from_before_an_argument_came_are_grouped_with_new_ones_that_are_trained_alike(loss: str) -> None:
    old, new = (result(loss, seed, scores(0.1)) for seed in (1, 2))
    new.config["loss"] |= OBJECTIVES[loss].arguments
    old.config["loss"] |= {key: new.config["loss"][key] for key in OBJECTIVES[loss].arguments.keys() - LATER_ARGUMENTS}
    assert [group.seeds for group in compare_groups([old, new]).groups] == [[1, 2]]


@pytest.mark.parametrize("loss", ["tempnet", "fastclip-v0", "fastclip-v3"])
def test_results_from_before_a_default_changed_are_other_runs(loss: str) -> None:
    old, new, clamped = (result(loss, seed, scores(0.1)) for seed in (1, 2, 3))
    for run in (new, clamped):
        run.config["loss"] |= OBJECTIVES[loss].arguments
    clamped.config["loss"]["tau_gradient_limit"] = 5.0
    old.config["loss"] |= {key: new.config["loss"][key] for key in OBJECTIVES[loss].arguments.keys() - LATER_ARGUMENTS}
    assert [group.seeds for group in compare_groups([old, new, clamped]).groups] == [[1, 3], [2]]
    # without what an old u adds there is nothing to clamp
    for run in (old, new, clamped):
        run.config["loss"]["tau_gradient"] = "batch"
    assert [group.seeds for group in compare_groups([old, new, clamped]).groups] == [[1, 2, 3]]


def test_negative_values_are_no_separators() -> None:
    runs = [result("clip", 1, scores(0.1), varied=f"--bias-{bias}--lr-1e-3", bias=bias) for bias in (-0.5, 2)]
    assert [g.title for g in compare_groups(runs).groups] == ["CLIP, bias -0.5, lr 1e-3", "CLIP, bias 2, lr 1e-3"]


def test_what_varies_is_in_the_title_and_batches_form_families() -> None:
    runs = [
        result(loss, seed, scores(0.1), batch=batch, varied=f"--lr-1e-3--global_batch-{batch}")
        for loss in ("clip", "sogclr")
        for batch in (512, 32)
        for seed in (1, 2)
    ]
    runs.append(result("tempnet", 1, scores(0.1)))
    groups = compare_groups(runs).groups
    assert [group.title for group in groups][:2] == ["CLIP, lr 1e-3, batch 512", "CLIP, lr 1e-3, batch 32"]
    found = families(groups)
    assert [[group.batch for group in family] for family in found] == [[32, 512], [32, 512]]
    assert [family[0].line for family in found] == ["CLIP, lr 1e-3", "SogCLR, lr 1e-3"]


def grid_of(*cells: tuple[int, int, float], loss: str = "clip") -> list[CompactResult]:
    """Runs of a grid that varies batch, epochs and rate, two seeds each."""
    runs = []
    for batch, epochs, lr in cells:
        for seed in (1, 2):
            varied = f"--global_batch-{batch}--epochs-{epochs}--lr-{lr}"
            runs.append(result(loss, seed, scores(0.1), batch=batch, varied=varied, lr=lr))
            runs[-1].config["train"]["epochs"] = epochs
    return runs


def test_keys_that_change_one_to_one_with_the_batch_join_its_line() -> None:
    runs = grid_of((16, 5, 0.1), (64, 20, 0.1), (16, 5, 0.2), (64, 20, 0.2), (256, 77, 0.1))
    runs += grid_of((64, 20, 0.1), (16, 5, 0.1), loss="sogclr")
    groups = compare_groups(runs).groups
    assert groups[0].title == "CLIP, batch 16, epochs 5, lr 0.1"
    assert {group.following for group in groups} == {("train.epochs",)}
    found = families(groups)
    assert [(family[0].line, [group.batch for group in family]) for family in found] == [
        ("CLIP, lr 0.1", [16, 64, 256]),
        ("CLIP, lr 0.2", [16, 64]),
        ("SogCLR, lr 0.1", [16, 64]),
    ]
    assert batch_label(found) == "global batch (train.epochs with it)"


@pytest.mark.parametrize(
    "cells", [[(16, 5), (16, 20), (64, 5), (64, 20)], [(16, 5), (64, 5)], [(16, 5), (64, 20), (256, 5)]]
)
def test_keys_that_change_otherwise_keep_lines_apart(cells: list[tuple[int, int]]) -> None:
    groups = compare_groups(grid_of(*((batch, epochs, 0.1) for batch, epochs in cells))).groups
    assert {group.following for group in groups} == {()}
    for family in families(groups):
        assert family[0].line == f"CLIP, epochs {family[0].results[0].config['train']['epochs']}, lr 0.1"
        assert len({group.results[0].config["train"]["epochs"] for group in family}) == 1
    assert batch_label(families(groups)) == "global batch"


def test_nothing_finished_and_a_seed_given_twice_are_errors() -> None:
    with pytest.raises(UserError, match="none of the runs is finished"):
        compare_groups([result("clip", 1, scores(0.1), finished=False)])
    twice = [result("clip", 1, scores(0.1)), result("clip", 1, scores(0.1), run="clip-again")]
    with pytest.raises(UserError, match="seed 1 of clip--seed-1, clip-again--seed-1 was given 2 times"):
        compare_groups(twice)
