"""TOML files: base files, names of shipped configs, and files that are none."""

from __future__ import annotations

from pathlib import Path

import pytest

from disttempnet.cli.main import main
from disttempnet.compare.grid import load_grid
from disttempnet.config import CONFIG_FOLDER, load_config
from disttempnet.errors import UserError, UserNotice

DEBUG = CONFIG_FOLDER / "debug.toml"


def write(folder: Path, **files: str) -> None:
    for name, text in files.items():
        (folder / f"{name}.toml").write_text(text, encoding="utf-8")


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


def test_a_name_in_a_file_wants_quotes(tmp_path: Path) -> None:
    write(tmp_path, own="config = 'debug.toml'\nname = 2024-05-01\n")
    with pytest.raises(UserError, match=r"key 'name': must be a string, in quotes \(got 2024-05-01\)"):
        load_config(tmp_path / "own.toml")


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
    shipped = CONFIG_FOLDER / "cc12m_vitb32_v1.toml"
    for name in ("cc12m_vitb32_v1", "cc12m_vitb32_v1.toml"):
        assert load_config(name) == load_config(shipped)
    for name in ("configs/cc12m_vitb32_v1.toml", "configs/cc12m_vitb32_v1"):
        with pytest.warns(UserNotice, match=f"^{name}: no such file here; .*: {shipped}$"):
            assert load_config(name) == load_config(shipped)
    assert load_grid("compare") == load_grid(CONFIG_FOLDER / "compare.toml")
    assert main(["launch", "demo", "--nodes", "1", "--gpus", "1", "--dry-run"]) == 0
    assert "train demo" in capsys.readouterr().out
    for name in ("nope", "folder/demo", "./debug.toml/x", "configs/nope.toml", "a/configs/demo.toml"):
        with pytest.raises(UserError, match="no such config file"):
            load_config(name)
    write(tmp_path, debug="config = 'demo.toml'\nname = 'mine'\n")
    assert load_config("debug.toml").name == "mine", "a file goes first"
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "demo.toml").write_text("config = '../debug.toml'\nname = 'own'\n", encoding="utf-8")
    assert load_config("configs/demo.toml").name == "own"
    assert load_config("debug").name == load_config(DEBUG).name
