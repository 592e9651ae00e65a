"""Configs: strict keys with the nearest name, overrides, round trip, and that every shipped file loads."""

from __future__ import annotations

from pathlib import Path

import pytest

from disttempnet.config import CONFIG_FOLDER, dump_config, load_config
from disttempnet.errors import UserError

DEBUG = CONFIG_FOLDER / "debug.toml"


@pytest.mark.parametrize(
    "path", sorted(set(CONFIG_FOLDER.glob("*.toml")) - set(CONFIG_FOLDER.glob("compare*.toml"))), ids=lambda p: p.stem
)
def test_shipped_configs_load_and_survive_a_round_trip(path: Path, tmp_path: Path) -> None:
    config = load_config(path)
    (tmp_path / "again.toml").write_text(dump_config(config), encoding="utf-8")
    assert load_config(tmp_path / "again.toml") == config


def test_overrides_are_toml_values_or_bare_words() -> None:
    config = load_config(DEBUG, ["optim.lr=2e-4", "name=other", "loss={name='clip'}", "eval.tasks=['emoji-concepts']"])
    assert (config.optim.lr, config.name, config.loss.name) == (2e-4, "other", "clip")
    assert config.loss.arguments == {}


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optim.learning_rate=1", "unknown key 'optim.learning_rate'"),
        ("data.global_bach=1", "Did you mean 'data.global_batch'"),
        ("trian.epochs=3", "Did you mean 'train'"),
        ("train.epochs=many", "train.epochs"),
        ("train.epochs=0", "train.epochs"),
        ("data.global_batch=30", "not a multiple of lanes"),
        ("name=a/b", "name"),
        ("train.epochs", "section.key=value"),
        ("name.x=1", "not a section"),
    ],
)
def test_mistakes_are_named_in_one_line(override: str, message: str) -> None:
    with pytest.raises(UserError) as caught:
        load_config(DEBUG, [override])
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_missing_key_missing_file_and_broken_toml_name_the_file(tmp_path: Path) -> None:
    (tmp_path / "short.toml").write_text("name = 'x'\n")
    with pytest.raises(UserError, match=r"short.toml: key 'data' is missing"):
        load_config(tmp_path / "short.toml")
    with pytest.raises(UserError, match=r"nope.toml: no such config file .*debug"):
        load_config(tmp_path / "nope.toml")
    (tmp_path / "broken.toml").write_text("name = \n")
    with pytest.raises(UserError, match=r"broken.toml: not valid TOML"):
        load_config(tmp_path / "broken.toml")


def test_another_objective_starts_from_its_own_defaults() -> None:
    config = load_config(CONFIG_FOLDER / "demo.toml", ["loss.gamma=0.5", "loss.name=sogclr"])
    assert config.loss.arguments == {"gamma": 0.5}
    assert load_config(CONFIG_FOLDER / "demo.toml", ["loss.rho=1.5"]).loss.arguments["gamma_decay_epochs"] == 4
