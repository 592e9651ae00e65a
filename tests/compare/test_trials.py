"""Tuning: which settings are tried, which is chosen, and that the reported tasks are not asked for it."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from disttempnet.cli.main import main
from disttempnet.compare import trials as module
from disttempnet.compare.grid import Grid, load_grid
from disttempnet.compare.trials import CellTuning, chosen_settings, missing_trials, tuning_of
from disttempnet.config import Config
from disttempnet.errors import UserError
from disttempnet.report.compact import read_results
from disttempnet.report.seeds.comparison import compare_groups
from disttempnet.report.seeds.groups import families
from tests.compare.grids import write

TUNED = """
config = "debug.toml"
seeds = [1, 2]
[common]
eval.tasks = ["emoji-concepts", "emoji-renderings"]
"data.limit" = 64
[tune]
metric = "emoji-concepts/acc1"
[tune.values]
optim.lr = [1e-3, 2e-3]
[runs.clip]
loss = { name = "clip-constant" }
tune."loss.temperature" = [0.04, 0.08]
"""


def finish(grid: Grid, monkeypatch: pytest.MonkeyPatch, peak: tuple[float, float]) -> list[CellTuning]:
    """Return the tunings at the end, where the score falls from a peak (rate, τ), as each round would find it."""
    scores: dict[str, float] = {}

    def run(config: Config) -> None:
        at = math.log(config.optim.lr / peak[0]) ** 2 + math.log(config.loss.arguments["temperature"] / peak[1]) ** 2
        scores[config.name] = -at

    monkeypatch.setattr(module, "_score", lambda config, metric: scores.get(config.name))
    while waiting := missing_trials(grid, found := tuning_of(grid)):
        for config in waiting:
            run(config)
    return found


@pytest.mark.parametrize(
    ("peak", "widen", "chosen", "tried", "at_edge"),
    [
        ((1e-3, 0.04), 2, (1e-3, 0.04), 6, []),  # one step beyond each edge shows that the best is inside
        ((4e-3, 0.08), 2, (4e-3, 0.08), 7, []),
        ((1e-3, 0.16), 0, (1e-3, 0.08), 4, ["optim.lr", "loss.temperature"]),
        ((1e-3, 5.0), 2, (1e-3, 0.32), 7, ["loss.temperature"]),
    ],
)
def test_the_best_is_chosen_and_edges_are_widened(
    peak: tuple[float, float],
    widen: int,
    chosen: tuple[float, float],
    tried: int,
    at_edge: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    grid = load_grid(write(tmp_path, TUNED), [f"tune.widen={widen}"])
    assert grid.configs == ()  # no run before its setting is chosen
    (found,) = finish(grid, monkeypatch, peak)
    assert found.best == chosen
    assert len(found.scores) == tried
    assert found.at_edge == at_edge
    configs = grid.chosen(chosen_settings([found])).configs
    assert [(c.name, c.optim.lr, c.loss.arguments["temperature"]) for c in configs] == [
        (f"clip--seed-{seed}", *chosen) for seed in (1, 2)
    ]
    assert {c.eval.tasks for c in configs} == {("emoji-concepts", "emoji-renderings")}


def test_only_values_that_a_key_may_have_lie_beyond_an_edge(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = TUNED.replace("[0.04, 0.08]", "[0.5, 5.0]")  # a constant τ of 50 is refused
    (found,) = finish(load_grid(write(tmp_path, text)), monkeypatch, (1e-3, 100.0))
    assert max(setting[1] for setting in found.scores) == 5.0
    assert found.at_edge == ["loss.temperature"]


def test_every_cell_has_a_choice_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = TUNED + '[runs.sogclr]\nloss = { name = "sogclr" }\n[vary]\n"data.global_batch" = [16, 32]\n'
    grid = load_grid(write(tmp_path, text))
    assert [cell.name for cell in grid.cells] == [
        "clip--global_batch-16", "sogclr--global_batch-16", "clip--global_batch-32", "sogclr--global_batch-32"
    ]  # fmt: skip
    assert [list(cell.tuned) for cell in grid.cells][:2] == [["optim.lr", "loss.temperature"], ["optim.lr"]]
    waiting = missing_trials(grid, tuning_of(grid))
    assert len(waiting) == 2 * (4 + 2)
    assert {config.eval.tasks for config in waiting} == {("emoji-concepts",)}  # the other is asked once, at the end
    assert {config.train.seed for config in waiting} == {0}
    assert waiting[0].name == "clip--global_batch-16--lr-0.001--temperature-0.04--seed-0"
    assert waiting[0].folder == tmp_path / "out" / "tuning" / waiting[0].name


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("emoji-concepts/acc1", "imagenet/acc1", r"tune.metric: no run evaluates 'imagenet': add it to eval.tasks"),
        ("emoji-concepts/acc1", "validation/mean_recall", r"or give data.validation a share"),
        ("emoji-concepts/acc1", "acc1", r"key 'tune.metric'"),
        ("[tune.values]", "seed = 2\n[tune.values]", r"tune.seed = 2 is one of seeds"),
        ("[0.04, 0.08]", "0.04", r"runs.clip.tune: 'loss.temperature' is not a list of values"),
        ("[1e-3, 2e-3]", "[]", r"runs.clip.tune: 'optim.lr' is not a list of values"),
        ("loss.temperature", "loss.temprature", r"clip--lr-0.001--temprature-0.04--seed-0: .*unknown argument"),
        ('[tune]\nmetric = "emoji-concepts/acc1"\n[tune.values]\noptim.lr = [1e-3, 2e-3]', "", r"needs a \[tune\]"),
        ("[tune]", '[vary]\n"optim.lr" = [1.0]\n[tune]', r"'optim.lr' is tuned, and given a value too"),
        ("optim.lr = [1e-3", "train.seed = [1e-3", r"'train.seed' cannot be set there"),
    ],
)  # fmt: skip
def test_mistakes(old: str, new: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        load_grid(write(tmp_path, TUNED.replace(old, new, 1)))


def test_a_tuned_key_on_the_command_line_is_a_mistake(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"'optim.lr' is tuned, and given a value too"):
        load_grid(write(tmp_path, TUNED), ["optim.lr=1"])


def test_trials_then_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The real thing: two batches, two settings each, and one choice written beside the results."""
    text = TUNED.replace('tune."loss.temperature" = [0.04, 0.08]', "").replace("2e-3]", "0.1]")
    path = write(tmp_path, text + '[vary]\n"data.global_batch" = [16, 32]\n')
    assert main(["compare", str(path), "tune.widen=0"]) == 0
    out = tmp_path / "out"
    lines = [json.loads(line) for line in (out / "tuning.jsonl").read_text().splitlines()]
    assert [line["name"] for line in lines] == ["clip--global_batch-16", "clip--global_batch-32"]
    for line in lines:
        assert line["metric"] == "emoji-concepts/acc1"
        best = max(line["trials"], key=lambda trial: trial["score"])
        assert line["chosen"] == best["setting"]
        assert [trial["setting"] for trial in line["trials"]] == [{"optim.lr": 1e-3}, {"optim.lr": 0.1}]
    for trial in (out / "tuning").iterdir():
        (last,) = [json.loads(line)["results"] for line in (trial / "eval.jsonl").read_text().splitlines()][-1:]
        assert list(last) == ["emoji-concepts"]

    # one family over both batches, whatever was chosen, from folders and from the compact file alike
    for given in (out, out / "results.jsonl"):
        results = read_results([given])
        assert [result.tuned and result.tuned.chosen for result in results] == [
            next(line["chosen"] for line in lines if result.name.startswith(line["name"] + "--")) for result in results
        ]
        (family,) = families(compare_groups(results).groups)
        assert [group.batch for group in family] == [16, 32]

    capsys.readouterr()
    assert main(["compare", str(path), "tune.widen=0", "--list"]) == 0
    assert "4 of 4 runs are done" in capsys.readouterr().out
    assert main(["compare", str(path), "tune.widen=0", "seeds=[1, 2, 3]", "--list"]) == 0
    assert "4 of 6 runs are done" in capsys.readouterr().out
