"""Every number that a config, a flag or an objective takes has a range; nonsense is one line that names it."""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator
from typing import Any, get_args

import numpy as np
import pytest
from pydantic import BaseModel

from disttempnet.cli.main import build_parser, main
from disttempnet.compare.grid import GridFile
from disttempnet.config import CONFIG_FOLDER, Config, LossConfig, SourceConfig, load_config
from disttempnet.errors import UserError
from disttempnet.io.ranges import Range, integers
from disttempnet.losses import ARGUMENT_RANGES, OBJECTIVES, build_loss

DEBUG = CONFIG_FOLDER / "debug.toml"


# ---- the type ----


@pytest.mark.parametrize(
    ("allowed", "inside", "outside"),
    [
        (
            integers(1, 8),
            [1, 8, 3.0, np.int64(2), np.float32(2)],
            [0, 9, 2.5, True, "3", None, math.nan, math.inf, 2**70],
        ),
        (Range(0, 1), [0, 1, 0.5, np.float32(0.5)], [-1e-9, 1.1, -math.inf, math.nan, False, [], np.bool_(True)]),
        (Range(0, 1, above=True), [1e-300, 1], [0, -0.0, 1.0000001]),
        (Range(0, 1, below=True), [0, 0.999], [1, 10**400]),
    ],
)
def test_a_range_holds_its_numbers_and_nothing_else(allowed: Range, inside: list, outside: list) -> None:
    for value in inside:
        assert allowed.check(value) == value
        assert type(allowed.check(value)) is (int if allowed.integer else float)
    for value in outside:
        with pytest.raises(ValueError, match=r"must be a (whole )?number (from|above|at least) "):
            allowed.check(value)


def test_a_range_says_what_is_in_it() -> None:
    assert str(integers(1, 65_536)) == "from 1 to 65,536"
    assert str(Range(0, 10, above=True)) == "above 0 and at most 10"
    assert str(Range(0, 1, below=True)) == "at least 0 and below 1"
    assert integers(0, 10**6).parse("1e3") == 1000
    with pytest.raises(argparse.ArgumentTypeError, match=r"must be a whole number from 0 to 9 \(got 9{5000}\)"):
        integers(0, 9).parse("9" * 5000)


# ---- config keys ----


def fields(model: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, field in model.model_fields.items():
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            yield from () if kind is LossConfig else fields(kind, f"{prefix}{name}.")
        else:
            yield prefix + name, field


EVERY_KEY = [*fields(Config), *fields(SourceConfig, "source.")]


@pytest.mark.parametrize(("key", "field"), EVERY_KEY, ids=[key for key, _ in EVERY_KEY])
def test_every_number_of_a_config_has_a_range_and_every_truth_value_is_strict(key: str, field: Any) -> None:
    ranges = [one for one in field.metadata if isinstance(one, Range)]
    if field.annotation in (int, float):
        assert len(ranges) == 1, f"{key}: give it a Range, Annotated[int, integers(…)]"
        assert ranges[0].integer == (field.annotation is int)
        assert field.is_required() or ranges[0].check(field.default) == field.default
    if field.annotation is bool:
        assert any(getattr(one, "strict", False) for one in field.metadata), f"{key}: StrictBool"


@pytest.mark.parametrize(
    "key", [key for key, field in fields(Config) if field.annotation in (int, float)], ids=lambda key: key
)
def test_no_numeric_key_takes_nonsense(key: str) -> None:
    for value in ("true", "nan", "inf", "-inf", "1e300", str(2**70), "-1", "'3'", "[]", "{}", "9" * 5000):
        with pytest.raises(UserError, match=rf"^debug: key '{key}': must be a (whole )?number .*\(got ") as caught:
            load_config("debug", [f"{key}={value}"])
        assert len(str(caught.value)) < 250


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("name=..", "key 'name': must be 1 to 200 letters (a to z), digits, dots, _ or -, not dots alone (got '..')"),
        ("name=.", "not dots alone"),
        (f"name={'n' * 300}", "must be 1 to 200 letters"),
        ("out=''", "key 'out': must not be empty"),
        ("out=' '", "key 'out': must not be empty"),
        ("data.train=photos::", "[data.train] names an empty source beside '::': leave it out (got 'photos::')"),
        ("data.train=::photos", "names an empty source"),
        ("data.train=[{path=' '}]", "source 1: key 'path': must not be empty"),
        ("data.train=[{path='x', weight=inf}]", "key 'weight': must be a number above 0 and at most 1,000 (got inf)"),
        ("data.train=[{path='x', weight=1e9}]", "above 0 and at most 1,000 (got 1000000000.0)"),
        ("data.train=[{path='x', weight=true}]", "above 0 and at most 1,000 (got True)"),
        ("eval.tasks=['']", "key 'eval.tasks.0': must not be empty"),
        ("eval.tasks=emoji-concepts", """key 'eval.tasks': must be a list, ["…", "…"] (got 'emoji-concepts')"""),
        ("model.name=''", "key 'model.name': must not be empty"),
        ("optim.lr_end=0.5", "[optim] lr_end 0.5 is above lr 0.001: set optim.lr_end too"),
        ("train.epochs=2**70", "must be a whole number from 1 to 1,000,000 (got '2**70')"),
        ("train.compile=1", "key 'train.compile': must be true or false (got 1)"),
        ("train.precision=fp64", "key 'train.precision': must be 'auto', 'fp32' or 'bf16' (got 'fp64')"),
        ("loss=clip", "key 'loss': must be a section or table, with keys of its own (got 'clip')"),
        ("name=[2024-05-01]", "key 'name': must be a string, in quotes (got [datetime.date(2024, 5, 1)])"),
        (".epochs=3", "is not of the form section.key=value"),
        ("train..epochs=3", "is not of the form section.key=value"),
        ("out=\udcff", r"override 'out=\udcff' is not UTF-8 text"),
        (f"train.epochs={'[' * 5000}", "key 'train.epochs': must be a whole number"),
    ],
)
def test_other_nonsense_is_named_too(override: str, message: str) -> None:
    with pytest.raises(UserError) as caught:
        load_config(DEBUG, [override])
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_whole_numbers_may_be_written_as_floats() -> None:
    config = load_config("debug", ["data.limit=1e2", "train.epochs=3.0", "optim.lr=1"])
    assert (config.data.limit, config.train.epochs, config.optim.lr) == (100, 3, 1.0)
    assert [type(value) for value in (config.data.limit, config.train.epochs, config.optim.lr)] == [int, int, float]


def test_help_prints_the_ranges(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["disttempnet", "train", "--help"])
    with pytest.raises(SystemExit):
        main(["train", "--help"])
    printed = capsys.readouterr().out
    for key, field in fields(Config):
        for allowed in field.metadata:
            if isinstance(allowed, Range):
                line = next(line for line in printed.splitlines() if line.startswith(f"  {key}  ("))
                assert f"; {allowed})" in line


def test_a_grid_has_ranges_and_an_end(tmp_path: Any) -> None:
    from disttempnet.compare.grid import load_grid

    assert any(isinstance(one, Range) for one in get_args(get_args(GridFile.model_fields["seeds"].annotation)[0]))
    head = 'config = "debug.toml"\n[runs.a]\n'
    for seeds, message in [("[true]", "'seeds.0': must be a whole number"), ("[-1]", "got -1"), ("[0.5]", "got 0.5")]:
        (tmp_path / "grid.toml").write_text(f"seeds = {seeds}\n{head}")
        with pytest.raises(UserError, match=message):
            load_grid(tmp_path / "grid.toml")
    values = ", ".join(map(str, range(2, 150)))
    many = f"seeds = [1]\n{head}[vary]\ntrain.log_every = [{values}]\ntrain.keep = [{values}]\n"
    (tmp_path / "grid.toml").write_text(many)
    with pytest.raises(UserError, match="vary: over 10,000 choices: give fewer values"):
        load_grid(tmp_path / "grid.toml")


# ---- flags ----


def actions(parser: argparse.ArgumentParser) -> Iterator[tuple[str, argparse.Action]]:
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for inner in action.choices.values():
                yield from actions(inner)
        else:
            yield f"{parser.prog} {'/'.join(action.option_strings) or action.dest}", action


PATHS = ("FILE", "FILE.html", "FOLDER", "DIR", "PATH", "SPEC", "RUN", "ROOT", "RAW", "TASK")
TEXTS = {"disttempnet data task task"}  # a task's name


def test_every_flag_has_a_range_or_expands_home() -> None:
    for name, action in actions(build_parser()):
        if action.metavar in ("N", "GB", "PIXELS"):
            assert isinstance(getattr(action.type, "__self__", None), Range), name
        assert action.type not in (int, float), name
        if action.metavar in PATHS and name not in TEXTS:
            assert getattr(action.type, "__name__", "") == "path_argument", name


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["compare", "compare", "--jobs", "0"], "--jobs: must be a whole number from 1 to 1,024 (got 0)"),
        (["temperature", "runs/x", "--batch", "-1"], "--batch: must be a whole number from 1 to 65,536 (got -1)"),
        (["temperature", "runs/x", "--images", ""], "--images: must name a file or folder (got nothing"),
        (["temperature", "runs/x", "--gallery", "x.pdf"], "--gallery x.pdf: the page is an .html file"),
        (["data", "index", ""], "SPEC: must name a file or folder (got nothing"),
        (["data", "index", "photos::"], "'photos::' names an empty source beside '::'"),
        (["data", "index", "x", "--workers", "100000"], "--workers: must be a whole number from 0 to 1,024"),
        (["data", "index", "x", "--cache-gb", "inf"], "--cache-gb: must be a number above 0 and at most 1,000,000"),
        (["launch", "debug", "--seeds", "9" * 5000], "launch: --seeds: must be a whole number from 0"),
        (["train", "debug", "--resume", ""], "--resume: must name a file or folder"),
        (["demo", "--fresh", "--out", "x", "out=y"], "demo: --out and out=… are both given; give one"),
        (["trian"], "unknown command 'trian'. Did you mean 'train'?"),
        (["data", "indx"], "unknown command 'indx'. Did you mean 'index'?"),
        (["evaluate", "x", "--precision", "fp64"], "unknown --precision 'fp64'. Did you mean 'fp32'?"),
        (["train"], "the following arguments are required: config"),
    ],
)
def test_a_wrong_flag_is_one_line(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line


# ---- objectives ----


@pytest.mark.parametrize("name", OBJECTIVES)
def test_every_number_of_an_objective_has_a_range(name: str) -> None:
    for argument, default in OBJECTIVES[name].arguments.items():
        if isinstance(default, (bool, str)):
            assert argument not in ARGUMENT_RANGES
            wrong: list[Any] = [1, None]
        else:
            assert ARGUMENT_RANGES[argument].check(default) == default
            wrong = [True, math.nan, math.inf, -math.inf, 1e30, -1e30, "1", None, 2**70]
        for value in wrong:
            with pytest.raises(ValueError, match=f"^objective {name}: {argument} must be ") as caught:
                build_loss(name, num_samples=4, embed_dim=8, **{argument: value})
            assert repr(value) in str(caught.value)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"rho": -0.5}, "rho must be a number above 0 and at most 100, got -0.5"),
        ({"num_samples": True}, "num_samples must be a whole number from 1 to 1,000,000,000,000, got True"),
        ({"embed_dim": 8.5}, "embed_dim must be a whole number from 1 to 65,536, got 8.5"),
        ({"seed": -1}, "seed must be a whole number from 0"),
    ],
)
def test_wrong_numbers_of_an_objective_are_named(given: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_loss("tempnet", **{"num_samples": 4, "embed_dim": 8, **given})


def test_numpy_numbers_are_numbers() -> None:
    given = {"rho": np.float32(2.5), "prototypes": np.int64(3), "seed": np.int64(1)}
    loss = build_loss("tempnet", num_samples=np.int64(9), embed_dim=np.int32(8), **given)
    assert loss.rho == 2.5
