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


def test_any_text_and_number_survives_a_round_trip(tmp_path: Path) -> None:
    """Quotes, backslashes, line breaks, DEL (which TOML wants escaped and JSON does not), sources, lists, 1e-300."""
    config = load_config(
        CONFIG_FOLDER / "debug.toml",
        [
            r'data.train=[{path="a \"b\" \\ \u007F\n\t é 猫.csv", weight=2.5}, {path="c", join_rows=false}]',
            'eval.tasks=["folder:/x, y", "z"]', "optim.eps=1e-300", "train.seed=9223372036854775807",
            'loss={name="clip", tau=0.05}',
        ],
    )  # fmt: skip
    text = dump_config(config)
    (tmp_path / "again.toml").write_text(text, encoding="utf-8")
    assert load_config(tmp_path / "again.toml") == config
    assert config.data.sources[0].path == 'a "b" \\ \x7f\n\t é 猫.csv'
    assert '[loss]\nname = "clip"\ntau = 0.05\n' in text


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
        ("data.train=''", "[data.train] must name a source, or a list of them, [{path = …}, …] (got '')"),
        ("data.train=[]", "[data.train] must name a source, or a list of them, [{path = …}, …] (got [])"),
        ("data.train={path='a'}", "[data.train] must name a source"),
        ("data.train=['a']", "[data.train] source 1 must be a table, {path = …} (got 'a')"),
        (
            "data.train=[{path='x'}, {pathh='x'}]",
            "[data.train] source 2: unknown key 'pathh'. Did you mean 'path'? Known: cache, cache_gb, caption_key,",
        ),
        ("data.train=[{weight=2}]", "[data.train] source 1: key 'path' is missing"),
        (
            "data.train=[{path='x', weight=0}]",
            "[data.train] source 1: key 'weight': must be a number above 0 and at most 1,000 (got 0)",
        ),
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


@pytest.mark.parametrize("name", ["2024-05-01", "2024", "1e-3", "true", "nan", "inf", "-5"])
def test_a_name_is_a_string_whatever_toml_makes_of_it(name: str) -> None:
    config = load_config(DEBUG, [f"name={name}", f"out={name}", f"data.train={name}", f"model.pretrained={name}"])
    assert (config.name, config.out, config.data.train, config.model.pretrained) == (name, name, name, name)


def test_another_objective_starts_from_its_own_defaults() -> None:
    config = load_config(CONFIG_FOLDER / "demo.toml", ["loss.gamma=0.5", "loss.name=sogclr"])
    assert config.loss.arguments == {"gamma": 0.5}
    assert load_config(CONFIG_FOLDER / "demo.toml", ["loss.rho=1.5"]).loss.arguments["gamma_decay_epochs"] == 4


def test_a_model_with_its_tag_is_name_and_pretrained() -> None:
    """`train` takes `open_clip:NAME/TAG` as `evaluate` does."""
    tagged = load_config(DEBUG, ["model.name=open_clip:ViT-B-32/laion2b_s34b_b79k"])
    assert (tagged.model.name, tagged.model.pretrained) == ("ViT-B-32", "laion2b_s34b_b79k")
    assert tagged == load_config(DEBUG, ["model.name=ViT-B-32", "model.pretrained=laion2b_s34b_b79k"])
    assert load_config(DEBUG, ["model.name=open_clip:ViT-B-32//w/a.pt"]).model.pretrained == "/w/a.pt"
    assert load_config(DEBUG, ["model.name=open_clip:RN50", "model.pretrained=openai"]).model.pretrained == "openai"
    with pytest.raises(UserError, match="has weights already"):
        load_config(DEBUG, ["model.name=open_clip:ViT-B-32/openai", "model.pretrained=laion400m_e31"])


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["train.exchange=bf16", "train.shard=true"], 'exchange = "bf16" is for DDP, shard exchanges with FSDP2'),
        (
            ["train.exchange=bf16", "train.freeze=towers", "model.pretrained=x"],
            'exchange is for trained towers: leave it out with freeze = "towers"',
        ),
    ],
)
def test_what_cannot_be_exchanged_in_bf16_is_refused(overrides: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_config(DEBUG, overrides)
    assert load_config(DEBUG, ["train.exchange=bf16"]).train.exchange == "bf16"
