"""`~` means home wherever a path is read."""

from __future__ import annotations

from pathlib import Path

import pytest

from disttempnet.cli.main import build_parser
from disttempnet.compare.grid import load_grid
from disttempnet.config import dump_config, load_config
from disttempnet.data.builtin.cache import cache_folder
from disttempnet.errors import UserError
from disttempnet.io.paths import expand_home


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("HOME", str(tmp_path))
    return str(tmp_path)


@pytest.mark.parametrize(
    ("text", "full"),
    [
        ("~/x", "HOME/x"),
        ("~", "HOME"),
        ("~/a::~/b::c", "HOME/a::HOME/b::c"),
        ("folder:~/photos", "folder:HOME/photos"),
        ("open_clip:local-dir:~/m", "open_clip:local-dir:HOME/m"),
        ("s3://bucket/~x", "s3://bucket/~x"),
        ("a~b", "a~b"),
        ("./~", "./~"),
        ("", ""),
    ],
)
def test_what_home_is(text: str, full: str, home: str) -> None:
    assert expand_home(text) == full.replace("HOME", home)


def test_a_home_that_is_not_known_is_named() -> None:
    with pytest.raises(ValueError, match=r"'~no.such.user/x': unknown home folder: write the full path"):
        expand_home("~no.such.user/x")
    with pytest.raises(UserError, match=r"key 'out': '~no.such.user/x': unknown home folder"):
        load_config("debug", ["out=~no.such.user/x"])


def test_every_path_of_a_config_is_expanded(home: str, tmp_path: Path) -> None:
    text = """config = "~/base.toml"
name = "x"
out = "~/runs"
[data]
train = [{ path = "~/a", index = "~/i", cache = "~/c", images = "~/p" }]
[model]
name = "local-dir:~/m"
pretrained = "~/w"
[eval]
tasks = ["folder:~/t"]
data_root = "~/d"
"""
    (tmp_path / "base.toml").write_text('config = "debug.toml"\n')
    (tmp_path / "own.toml").write_text(text)
    config = load_config("~/own.toml")
    (source,) = config.data.sources
    found = [config.out, source.path, source.index, source.cache, source.images]
    found += [config.model.name, config.model.pretrained, config.eval.tasks[0], config.eval.data_root]
    wanted = ["/runs", "/a", "/i", "/c", "/p", "local-dir:/m", "/w", "folder:/t", "/d"]
    assert [one.replace(home, "") for one in found] == wanted
    assert "~" not in dump_config(config)
    alone = load_config("debug", ["data.train=~/a::b", "model.image_pretrained=~/r", "model.text_pretrained=~/t"])
    assert [one.path for one in alone.data.sources] == [f"{home}/a", "b"]
    assert (alone.model.image_pretrained, alone.model.text_pretrained) == (f"{home}/r", f"{home}/t")


def test_a_cache_in_the_environment_is_expanded(home: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "~/shared")
    monkeypatch.setenv("DISTTEMPNET_CACHE", "")
    assert cache_folder() == Path(home, "shared", "disttempnet")
    monkeypatch.setenv("DISTTEMPNET_CACHE", "~/own")
    assert cache_folder() == Path(home, "own")
    monkeypatch.setenv("DISTTEMPNET_CACHE", "~no.such.user/own")
    with pytest.raises(UserError, match=r"no home folder is known \(HOME is not set\): set DISTTEMPNET_CACHE"):
        cache_folder()


def test_a_grid_and_flags_expand_too(home: str, tmp_path: Path) -> None:
    (tmp_path / "base.toml").write_text('config = "debug.toml"\n')
    (tmp_path / "grid.toml").write_text('config = "~/base.toml"\nout = "~/grid"\nseeds = [1]\n[runs.a]\n')
    assert load_grid("~/grid.toml").out == tmp_path / "grid"
    assert load_grid("~/grid.toml", ["out=2024-05-01"]).out == Path("2024-05-01")
    options = build_parser().parse_args(["evaluate", "~/run", "--data-root=~/d", "--tasks", "folder:~/t"])
    assert (options.target, options.data_root, options.tasks) == (f"{home}/run", f"{home}/d", [f"folder:{home}/t"])
