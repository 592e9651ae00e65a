"""`disttempnet migrate` from end to end: which command, what is reported, what is refused."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest

from disttempnet.cli.main import main
from disttempnet.errors import UserError
from disttempnet.migrate.command import migrate
from tests.migrate.scripts import FOUNDING, OPEN_CLIP

MAIN = "python -m training.main --train-data"
TWO = f"{MAIN} a.tar --lr 1e-3\n{MAIN} b.tar --new 3 --lr $lr\n"


def test_the_written_config_launches(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    script, out = tmp_path / "train.sbatch", tmp_path / "run.toml"
    script.write_text(FOUNDING, encoding="utf-8")
    assert main(["migrate", str(script), "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    assert "clip_cc12m.py of the first code, 8 processes" in printed
    assert "--train-num-samples 9184307: the index counts the samples" in printed
    launch = next(line.split()[1:] for line in printed.splitlines() if line.startswith("  disttempnet launch"))
    assert main([*launch, "--dry-run"]) == 0
    assert "#SBATCH --time=40:00:00\n" in capsys.readouterr().out
    assert main(["migrate", str(script), "--out", str(out)]) == 2
    assert "exists already" in capsys.readouterr().err


def test_without_out_the_config_is_all_that_is_printed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    script = tmp_path / "train.sh"
    script.write_text(OPEN_CLIP, encoding="utf-8")
    assert main(["migrate", str(script), "WORKERS=1"]) == 0
    printed = capsys.readouterr()
    assert tomllib.loads(printed.out)["data"]["workers"] == 1
    assert printed.err == ""


def test_one_of_several_commands_is_chosen_and_variables_are_given() -> None:
    with pytest.raises(UserError, match="2 training commands; choose one by --call N"):
        migrate(TWO, "s.sh")
    with pytest.raises(UserError, match=r"s.sh: --lr \$lr: lr is set nowhere in the script: add lr=VALUE"):
        migrate(TWO, "s.sh", number=2)
    with pytest.raises(UserError, match="--call 3: it has 2 training commands"):
        migrate(TWO, "s.sh", number=3)
    result = migrate(TWO, "s.sh", {"lr": "2e-3"}, number=2)
    assert tomllib.loads(result.text)["optim"]["lr"] == 2e-3
    assert "--new 3: open_clip has no such flag: unknown" in result.text


def test_processes_that_nothing_says_are_asked_for() -> None:
    text = "srun python -m training.main --train-data a.tar"
    with pytest.raises(UserError, match="said nowhere: give --processes N"):
        migrate(text, "s.sh")
    assert tomllib.loads(migrate(text, "s.sh", processes=4).text)["data"]["global_batch"] == 256


def test_a_command_in_a_loop_is_said() -> None:
    text = "for s in 1 2; do\n python -m training.main --train-data a.tar --seed $s --name run$s\ndone"
    with pytest.raises(UserError, match="s is set by a loop: add s=VALUE"):
        migrate(text, "s.sh")
    result = migrate(text, "s.sh", {"s": "2"})
    assert "is in a loop or a condition" in result.text
    assert tomllib.loads(result.text)["train"]["seed"] == 2


def test_lines_that_a_missing_backslash_cuts_off_are_said() -> None:
    """As in a published script: a blank behind the backslash, and a line without one."""
    result = migrate(f"{MAIN} a.tar \\\n --lr 1e-3 \\ \n --wd 0.1\n --epochs 3", "s.sh")
    dropped = dict(result.settings.dropped)
    assert dropped["--wd 0.1"].startswith("line 3 is no part of the command")
    assert dropped["--epochs 3"].startswith("line 4 is no part")
    assert (
        tomllib.loads(result.text)["optim"] | {"lr": 1e-3, "weight_decay": 0.2} == tomllib.loads(result.text)["optim"]
    )


def test_parts_that_are_known_only_elsewhere_are_to_be_filled_in() -> None:
    result = migrate("python -m training.main --train-data $DATA/a.tar --name x", "s.sh")
    assert result.settings.fill_in == [
        ("data.train (--train-data $DATA/a.tar)", "DATA is set nowhere in the script: add DATA=VALUE to the command")
    ]
    assert tomllib.loads(result.text)["data"]["train"] == "$DATA/a.tar"


def test_flags_that_a_function_is_called_with_are_to_be_filled_in() -> None:
    result = migrate(f'run() {{\n {MAIN} a.tar "$@" $MORE\n}}\nrun --lr 1e-3', "s.sh")
    assert [what for what, _ in result.settings.fill_in] == ["$@", "$MORE"]
    assert all("its flags are not read" in why for _, why in result.settings.fill_in)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("echo python clip_cc12m.py --lr 1", "no training command"),
        (
            "python evaluate.py --data_dir /d --use_model 'ViT-B-32 /c.pth'",
            r"import /c.pth .*--data-root /d",
        ),
        ("python 'x", "s.sh: the script's line 1: a quote"),
    ],
)
def test_what_trains_nothing_is_answered(text: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        migrate(text, "s.sh")


def test_files_that_are_no_scripts_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "x.pt").write_bytes(b"\x80\x02\xff\xfe")
    for name, said in (("x.pt", "not UTF-8 text"), ("none.sh", "cannot be read"), (".", "cannot be read")):
        assert main(["migrate", str(tmp_path / name)]) == 2
        assert said in capsys.readouterr().err
    assert main(["migrate", str(tmp_path / "x.pt"), "1x=3"]) == 2
    assert "NAME=VALUE" in capsys.readouterr().err
