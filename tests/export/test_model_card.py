"""The card says what the run's files say, and no place of this machine."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from disttempnet.errors import UserNotice
from disttempnet.evaluation.results.averages import counted_tags
from disttempnet.evaluation.results.records import RESULTS_FILE, write_records
from disttempnet.evaluation.results.summary import Subject, write_summary
from disttempnet.export.model_card import CardFacts, model_card, public_value, same_config
from disttempnet.models import Towers, load_model
from disttempnet.report.evaluations.compare import read_evaluations
from disttempnet.report.read import read_run
from tests.evaluation import published
from tests.report.synthetic import write_run


@pytest.fixture(scope="module")
def towers() -> Towers:
    torch.manual_seed(0)
    return load_model("demo-convnext-32")


def seeded(folder: Path, seed: int, acc1: float, **how: Any) -> Path:
    run = write_run(folder / f"mine--seed-{seed}", acc1=acc1, **how)
    text = (run / "config.toml").read_text()
    (run / "config.toml").write_text(re.sub(r"\nseed = \d+", f"\nseed = {seed}", text))
    return run


def card_of(folder: Path, towers: Towers, step: int = 40, **facts: Any) -> str:
    run = read_run(folder)
    fields = {"licence": "mit", "data": "", "evaluation": None, "seeds": same_config(run), **facts}
    return model_card(CardFacts("org/tiny", run=run, towers=towers, step=step, **fields))


def test_results_have_intervals_over_seeds(tmp_path: Path, towers: Towers) -> None:
    shares = {1: 0.40, 2: 0.46, 5: 0.43}
    for seed, acc1 in shares.items():
        seeded(tmp_path, seed, acc1)
    seeded(tmp_path, 7, 0.9, finished=False)
    seeded(tmp_path, 8, 0.9, epochs=4, spread=0)  # another objective
    card = card_of(tmp_path / "mine--seed-2", towers)
    reach = 4.302653 * np.std(list(shares.values()), ddof=1) / np.sqrt(3)
    interval = f"43.0 [{100 * (0.43 - reach):.1f}, {100 * (0.43 + reach):.1f}]"
    assert f"| Unseen renderings | zero-shot top-1 | 46.0 | 1.0 | {interval} |" in card
    assert "Over seeds 1, 2, 5: mean" in card
    assert "One seed" not in card


def test_notes_lose_places_not_facts(tmp_path: Path, towers: Towers) -> None:
    notes = ("weights '/home/me/runs/x/step-1' are a moving average over training steps (train.ema = 0.5)", "/only/x")
    card = card_of(seeded(tmp_path, 1, 0.4), replace(towers, notes=notes))
    assert "\n- Weights are a moving average over training steps (train.ema = 0.5).\n" in card
    assert "/home" not in card
    assert "/only" not in card


def test_one_seed_says_so(tmp_path: Path, towers: Towers) -> None:
    seeded(tmp_path, 1, 0.4)
    card = card_of(tmp_path / "mine--seed-1", towers)
    assert "of one seed. How much another seed would differ is unknown." in card
    assert "- One seed was trained" in card
    early = card_of(tmp_path / "mine--seed-1", towers, step=33)
    assert "This checkpoint was not evaluated during training." in early


def test_the_runs_facts(tmp_path: Path, towers: Towers) -> None:
    run = seeded(tmp_path, 1, 0.4)
    card = card_of(run, towers, data="Emoji | drawn")
    assert card.startswith("---\nlibrary_name: open_clip\n")
    for words in (
        "license: mit",
        "Emoji \\| drawn (`embedded:emoji/train`)",
        "| samples | 160 |",
        "| length | 40 steps of a run of 4 epochs |",
        "| device | cpu, 1 process |",
        "| `loss.rho` | `2.0` |",
        "arXiv 2404.04575",
        "Temperatures of samples and their network are in the run alone",
        "The weights: `mit`.",
    ):
        assert words in card
    assert "loss.dropout" not in card, "a default"
    assert "Nobody has said" in card_of(run, towers, licence="unknown")


def test_defaults_are_no_settings_of_the_run(tmp_path: Path, towers: Towers) -> None:
    """Lists among them, such as `lora.towers` of a run without LoRA."""
    card = card_of(seeded(tmp_path, 1, 0.4), towers)
    assert "| `loss.rho` |" in card
    assert "`lora." not in card


def test_no_place_of_this_machine(tmp_path: Path, towers: Towers) -> None:
    secret = tmp_path / "secret disk" / "{00000..00331}.tar"
    run = seeded(tmp_path, 1, 0.4, train=str(secret))
    text = (run / "config.toml").read_text().replace('pretrained = ""', 'pretrained = "/secret/weights.pt"', 1)
    (run / "config.toml").write_text(text)
    facts = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps({**facts, "command": f"disttempnet train {tmp_path}/x.toml"}))
    card = card_of(run, towers)
    assert "`{00000..00331}.tar`" in card
    assert "`weights.pt`" in card
    assert "secret" not in card
    assert str(tmp_path) not in card


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        ("/data/cc3m/{0..9}.tar", "{0..9}.tar"),
        ("~/photos", "photos"),
        ("../up/here", "here"),
        ("https://user:pw@host.example/a/b.tar?token=1", "b.tar"),
        ("C:\\data\\x.csv", "x.csv"),
        ("sentence-transformers/all-MiniLM-L6-v2", "sentence-transformers/all-MiniLM-L6-v2"),
        ("embedded:emoji/train", "embedded:emoji/train"),
        ([{"path": "/a/b", "weight": 2.0}], [{"path": "b", "weight": 2.0}]),
        (0.5, 0.5),
    ],
)
def test_public_values(value: Any, shown: Any) -> None:
    assert public_value(value) == shown


def test_what_exists_here_is_a_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "data" / "photos").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert public_value("data/photos") == "photos"


def test_an_evaluation_on_a_data_root(tmp_path: Path, towers: Towers) -> None:
    run = seeded(tmp_path, 1, 0.4)
    folder = run / "evaluation" / "step-00000040"
    folder.mkdir(parents=True)
    row = published.rows()[0]
    records = published.records(published.scores(row))
    write_records(folder / RESULTS_FILE, records.values())
    write_summary(folder, Subject("mine", "x"), records, counted_tags())
    card = card_of(run, towers, evaluation=read_evaluations([folder])[0])
    assert f"| Average over 38 | {100 * float(row['Average perf. on 38 datasets']):.1f} |" in card
    assert f"| ImageNet 1k | top-1 | {100 * float(row['ImageNet 1k']):.1f} |" in card.replace("zero-shot ", "")


def test_a_damaged_neighbour_is_named(tmp_path: Path, towers: Towers) -> None:
    run = seeded(tmp_path, 1, 0.4)
    (seeded(tmp_path, 2, 0.4) / "config.toml").write_text("[broken")
    with pytest.warns(UserNotice, match=r"left out of the seeds: .*mine--seed-2"):
        assert [one.seed for one in same_config(read_run(run))] == [1]
