"""Configs: strict keys with the nearest name, overrides, round trip, and that every shipped file loads."""

from __future__ import annotations

from pathlib import Path

import pytest

from disttempnet.cli.main import main
from disttempnet.compare.grid import load_grid
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


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("name = 'x'\n".encode("utf-16"), r"not UTF-8 text \(invalid start byte at byte 0\): save it as UTF-8"),
        (b"a = " + b"[" * 5000, "not valid TOML"),
        (b"a = " + b"9" * 5000, "not valid TOML"),
        (b"#" * 10_000_001, "over 10,000,000 characters: no config file"),
    ],
)
def test_what_is_no_toml_is_one_line(content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "own.toml").write_bytes(content)
    with pytest.raises(UserError, match=rf"own.toml: {message}") as caught:
        load_config(tmp_path / "own.toml")
    assert "\n" not in str(caught.value)


def test_a_byte_order_mark_is_passed_over(tmp_path: Path) -> None:
    (tmp_path / "own.toml").write_bytes(b"\xef\xbb\xbf" + DEBUG.read_bytes())
    assert load_config(tmp_path / "own.toml") == load_config(DEBUG)


@pytest.mark.parametrize("name", ["2024-05-01", "2024", "1e-3", "true", "nan", "inf", "-5"])
def test_a_name_is_a_string_whatever_toml_makes_of_it(name: str) -> None:
    config = load_config(DEBUG, [f"name={name}", f"out={name}", f"data.train={name}", f"model.pretrained={name}"])
    assert (config.name, config.out, config.data.train, config.model.pretrained) == (name, name, name, name)


def test_a_name_in_a_file_wants_quotes(tmp_path: Path) -> None:
    write(tmp_path, own="config = 'debug.toml'\nname = 2024-05-01\n")
    with pytest.raises(UserError, match=r"key 'name': must be a string, in quotes \(got 2024-05-01\)"):
        load_config(tmp_path / "own.toml")


def test_another_objective_starts_from_its_own_defaults() -> None:
    config = load_config(CONFIG_FOLDER / "demo.toml", ["loss.gamma=0.5", "loss.name=sogclr"])
    assert config.loss.arguments == {"gamma": 0.5}
    assert load_config(CONFIG_FOLDER / "demo.toml", ["loss.rho=1.5"]).loss.arguments["gamma_decay_epochs"] == 4


def write(folder: Path, **files: str) -> None:
    for name, text in files.items():
        (folder / f"{name}.toml").write_text(text, encoding="utf-8")


def test_a_file_holds_what_differs_from_the_config_it_names(tmp_path: Path) -> None:
    first = "config = 'debug.toml'\nname = 'first'\n[optim]\nlr = 0.5\n[loss]\nrho = 3.0\n"
    second = "config = 'first.toml'\nname = 'second'\n[data]\nlimit = 64\n[loss]\nname = 'sogclr'\n"
    write(tmp_path, first=first, second=second)
    base, one, two = (load_config(path) for path in (DEBUG, tmp_path / "first.toml", tmp_path / "second.toml"))
    assert (one.name, one.optim.lr, one.optim.warmup_steps) == ("first", 0.5, base.optim.warmup_steps)
    assert one.loss.arguments == {**base.loss.arguments, "rho": 3.0}, "key by key"
    assert (two.name, two.optim, two.data.limit, two.data.train) == ("second", one.optim, 64, base.data.train)
    assert (two.loss.name, two.loss.arguments) == ("sogclr", {}), "arguments belong to an objective"
    assert load_config(tmp_path / "second.toml", ["optim.lr=2.0"]).optim.lr == 2.0


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("config = 'loop.toml'", r"one.toml: its base configs form a circle"),
        ("config = 'nope.toml'", r"one.toml: config: .*nope.toml: no such file"),
        ("config = 3", r"one.toml: config must name a file, got 3"),
        ("config = 'debug.toml'\n[optim]\nrate = 1", r"one.toml: unknown key 'optim.rate'"),
    ],
)
def test_a_wrong_base_is_named(text: str, message: str, tmp_path: Path) -> None:
    write(tmp_path, one=text, loop="config = 'one.toml'")
    with pytest.raises(UserError, match=message):
        load_config(tmp_path / "one.toml")


def test_a_bare_name_means_a_shipped_config(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "cc12m_vitb32_v1").mkdir()  # a folder is no config
    for name in ("cc12m_vitb32_v1", "cc12m_vitb32_v1.toml"):
        assert load_config(name) == load_config(CONFIG_FOLDER / "cc12m_vitb32_v1.toml")
    assert load_grid("compare") == load_grid(CONFIG_FOLDER / "compare.toml")
    assert main(["launch", "demo", "--nodes", "1", "--gpus", "1", "--dry-run"]) == 0
    assert "train demo" in capsys.readouterr().out
    for name in ("nope", "folder/demo", "./debug.toml/x"):
        with pytest.raises(UserError, match="no such config file"):
            load_config(name)
    write(tmp_path, debug="config = 'demo.toml'\nname = 'mine'\n")
    assert load_config("debug.toml").name == "mine", "a file goes first"
    assert load_config("debug").name == load_config(DEBUG).name
