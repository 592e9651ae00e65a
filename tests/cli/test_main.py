"""The command line: help that teaches, one clear line for what a user can fix, and a quick start."""

from __future__ import annotations

import io
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

from disttempnet.cli.main import main
from disttempnet.config import CONFIG_FOLDER
from disttempnet.errors import UserNotice, show_notices_plainly
from tests.data.conftest import png, write_shard

DEBUG = str(CONFIG_FOLDER / "debug.toml")


def fails(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(arguments) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1, lines
    return lines[0]


def test_help_and_config_errors_come_without_torch() -> None:
    code = f"""
import sys
from disttempnet.cli.main import main
for command in ("train", "temperature"):
    try:
        main([command, "--help"])
    except SystemExit:
        pass
main(["train", {DEBUG!r}, "optim.lrr=1"])
assert "torch" not in sys.modules, "torch was imported"
"""
    done = subprocess.run([sys.executable, "-c", code, "train"], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "optim.weight_decay" in done.stdout
    assert "log_u_image" in done.stdout
    assert "Did you mean 'optim.lr'" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "missing.toml"], "missing.toml: no such config file"),
        (["train", DEBUG, "data.train=/no/where"], "/no/where"),
        (["train", DEBUG, "model.name=ViT-B-23"], "Did you mean 'ViT-B-32'"),
        (["train", DEBUG, "loss.name=sogclip"], "unknown objective 'sogclip'. Did you mean 'sogclr'"),
        (["train", DEBUG, "loss.roh=2"], "unknown argument of objective disttempnet-v1: 'roh'. Did you mean 'rho'"),
        (["train", DEBUG, "--resume", "runs/none"], "runs/none: no checkpoint"),
        (["train", DEBUG, *(f"data.train=/x/{i}.tar" for i in range(3))], "'data.train' is given 3 times; quote"),
        (["evaluate", "runs/none"], "runs/none: no such run folder"),
        (["evaluate", "open_clip:ViT-B-32/no-such-tag"], "no-such-tag"),
        (["evaluate", "open_clip:demo-vit-32", "--out", f"{DEBUG}/x.json"], "is no folder"),
        (["report", "runs/none"], "runs/none"),
        (["temperature", "runs/none"], "runs/none: no such run folder"),
    ],
)
def test_what_a_user_can_fix_is_one_line(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert message in fails(capsys, *arguments)
    assert not list(tmp_path.iterdir()), "a refused command leaves nothing behind"


@pytest.mark.filterwarnings("default")
def test_what_a_user_should_know_is_one_line_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = warnings.showwarning
    more = ["loss.rho=9", "eval.tasks=[]", "train.stop_after_steps=1", f"out={tmp_path}"]
    assert main(["train", DEBUG, *more]) == 0
    printed = capsys.readouterr().err
    (line,) = [line for line in printed.splitlines() if "rho = 9" in line]
    assert line.startswith("warning: rho = 9 is not below log(N − 1) = 8.6 of 5,453 samples: ")
    assert "UserNotice" not in printed
    assert warnings.showwarning is before, "a program that calls main keeps its own way"


def test_other_warnings_are_shown_as_ever(capsys: pytest.CaptureFixture[str]) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        show_notices_plainly()
        warnings.warn("of others", stacklevel=1)
        warnings.warn("ours", UserNotice, stacklevel=1)
    assert [str(one.message) for one in caught] == ["of others"]
    assert capsys.readouterr().err == "warning: ours\n"


def test_unknown_flags_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["train", DEBUG, "--epochs", "3"])
    assert "unknown arguments: --epochs" in capsys.readouterr().err


def test_objectives_lists_every_name_with_what_it_needs(capsys: pytest.CaptureFixture[str]) -> None:
    from disttempnet import OBJECTIVES

    assert main(["objectives"]) == 0
    blocks = capsys.readouterr().out.strip().split("\n\n")
    assert [block.split()[0] for block in blocks] == list(OBJECTIVES)
    for block, recipe in zip(blocks, OBJECTIVES.values(), strict=True):
        words = block.split()
        assert {f"{key}={value!r}" for key, value in recipe.arguments.items()} <= set(words)
        assert recipe.formula in block
        assert recipe.source in block
        assert recipe.note.split() == (words[words.index("note") + 1 :] if recipe.note else [])
    assert "configs/cc12m_vitb32_v0.toml" in blocks[list(OBJECTIVES).index("disttempnet")]
    assert main(["objectives", "isogclr"]) == 0
    shown = capsys.readouterr().out
    # log u, τ and its momentum, two sides, four bytes each
    assert "state 24 bytes a sample" in shown
    assert "CLIP" not in shown
    assert "Did you mean 'sogclr'" in fails(capsys, "objectives", "sogcl")


def test_an_ascii_terminal_ends_no_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tables, and names of files and samples, hold what it cannot show: that is written as its number."""
    write_shard(tmp_path / "zwölf.tar", {"a": {"png": png(1), "txt": "é".encode()}, "τ": {"png": png(2)}})
    printed = []
    for arguments in (["data", "index", str(tmp_path / "zwölf.tar")], ["data", "index", "/gone/ü.json"]):
        texts = [io.BytesIO(), io.BytesIO()]
        for name, text in zip(("stdout", "stderr"), texts, strict=True):
            monkeypatch.setattr(sys, name, io.TextIOWrapper(text, encoding="ascii", write_through=True))
        printed.append((main(arguments), *(text.getvalue().decode("ascii") for text in texts)))
    (code, table, _), failed = printed
    assert code == 0
    assert "no caption" in table
    assert "zw\\xf6lf.tar:\\u03c4" in table.replace("\n", "")
    assert failed == (2, "", "disttempnet: /gone/\\xfc.json: no such listing\n")
