"""The command that is built has arguments that img2dataset knows, and the list that it reads means what was meant."""

import csv
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from disttempnet.cli.main import main
from disttempnet.data.tools.download import Download, download_result, write_headed

# the parameters of img2dataset.download, version 1.47.0
KNOWN = set(
    """url_list image_size output_folder processes_count resize_mode resize_only_if_bigger upscale_interpolation
    downscale_interpolation encode_quality encode_format skip_reencode output_format input_format url_col caption_col
    bbox_col thread_count number_sample_per_shard extract_exif save_additional_columns timeout enable_wandb
    wandb_project oom_shard_count compute_hash verify_hash distributor subjob_size retries disable_all_reencoding
    min_image_size max_image_area max_aspect_ratio incremental_mode max_shard_retry user_agent_token
    disallowed_header_directives""".split()  # noqa: SIM905
)
CC3M = 'a christmas tree\thttp://a.example/1.jpg\nan "odd caption\thttps://b.example/2.jpg?x=1\n'
CC12M = 'https://a.example/1.jpg\tone <PERSON>\nhttps://a.example/2.jpg\t"quoted" at the start\n'


def job(tmp_path: Path, text: str, name: str = "cc12m") -> Download:
    tsv = tmp_path / "list.tsv"
    tsv.write_text(text, encoding="utf-8")
    return Download(name, tsv, tmp_path / "out", 4, 16, 224)


def arguments(command: list[str]) -> dict[str, str]:
    assert all(word.startswith("--") for word in command[1::2])
    return {word.removeprefix("--"): value for word, value in zip(command[1::2], command[2::2], strict=True)}


def rows(path: Path) -> list[dict[str, str]]:
    """As img2dataset's CSV reader reads it: fields may be quoted."""
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file, delimiter="\t", strict=True))


@pytest.fixture
def program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An img2dataset that notes its arguments, and reports a shard."""
    folder = tmp_path / "bin"
    folder.mkdir()
    script = folder / "img2dataset"
    stats = {"count": 5, "successes": 3, "status_dict": {"success": 3, "HTTP Error 404: Not Found": 2}}
    script.write_text(
        f"#!/bin/sh\nprintf '%s\\n' \"$@\" > {folder}/arguments\n"
        f"printf '%s' {shlex.quote(json.dumps(stats))} > {tmp_path}/out/00000_stats.json\nexit $(cat {folder}/code)\n"
    )
    script.chmod(0o755)
    (folder / "code").write_text("0")
    monkeypatch.setenv("PATH", str(folder), prepend=":")
    monkeypatch.setattr("sys.executable", str(tmp_path / "nowhere" / "python"))
    return folder


def test_the_command_has_known_arguments_only(tmp_path: Path) -> None:
    one = job(tmp_path, CC12M)
    given = arguments(one.command)
    assert one.command[0] == "img2dataset"
    assert set(given) <= KNOWN
    expected = {
        "url_list": str(one.headed),
        "output_folder": str(tmp_path / "out"),
        "output_format": "webdataset",
        "input_format": "tsv",
        "url_col": "url",
        "caption_col": "caption",
        "image_size": "224",
        "processes_count": "4",
        "thread_count": "16",
        "resize_mode": "keep_ratio",
        "encode_quality": "95",
        "incremental_mode": "incremental",
    }
    assert expected.items() <= given.items()


@pytest.mark.parametrize("header", ["", "caption\turl\n"])
def test_either_order_of_columns(tmp_path: Path, header: str) -> None:
    one = job(tmp_path, header + CC3M)
    one.out.mkdir()
    assert write_headed(one) == 0
    assert rows(one.headed) == [
        {"url": "http://a.example/1.jpg", "caption": "a christmas tree"},
        {"url": "https://b.example/2.jpg?x=1", "caption": 'an "odd caption'},
    ]


def test_a_quotation_mark_swallows_nothing(tmp_path: Path) -> None:
    one = job(tmp_path, CC12M + "no tab\nhttps://a.example/3.jpg\tthree\r\n\tno url\n")
    one.out.mkdir()
    assert write_headed(one) == 2
    assert [row["caption"] for row in rows(one.headed)] == ["one <PERSON>", '"quoted" at the start', "three"]


def test_runs_it_and_counts(tmp_path: Path, program: Path, capfd: pytest.CaptureFixture[str]) -> None:
    one = job(tmp_path, CC12M)
    command = ["data", "download", "cc12m", "--tsv", str(one.tsv), "--out", str(one.out)]
    command += ["--processes", "4", "--threads", "16", "--image-size", "224"]
    assert main(command) == 0
    assert (program / "arguments").read_text().splitlines() == one.command[1:]
    said = capfd.readouterr().out
    assert "1 shards, 3 samples; 2 URLs failed" in said
    assert "HTTP Error 404" in said
    (program / "code").write_text("3")
    assert main(command) == 2
    assert "img2dataset ended with exit code 3" in capfd.readouterr().err
    one.tsv.write_text(CC3M, encoding="utf-8")
    assert main(command) == 2
    assert "was started with another list" in capfd.readouterr().err


def test_a_dry_run_prints_what_would_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one = job(tmp_path, CC3M, "cc3m")
    command = ["data", "download", "cc3m", "--tsv", str(one.tsv), "--out", str(one.out), "--dry-run"]
    assert main([*command, "--processes", "4", "--threads", "16", "--image-size", "224"]) == 0
    said = capsys.readouterr()
    assert shlex.split(said.out.replace("\\\n", "")) == one.command
    assert f"it reads {one.headed.name}, a copy of" in said.err
    assert not one.out.exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, r"list\.tsv: no such file; get it .* from https://storage\.googleapis\.com/conceptual_12m/cc12m\.tsv"),
        ("caption,url\n", "not a list of captions and URLs, separated by a tab: 'caption,url'"),
        ("", "not a list of captions"),
    ],
)
def test_what_is_no_list(tmp_path: Path, text: str | None, message: str, capsys: pytest.CaptureFixture[str]) -> None:

    if text is not None:
        (tmp_path / "list.tsv").write_text(text)
    assert main(["data", "download", "cc12m", "--tsv", str(tmp_path / "list.tsv"), "--out", str(tmp_path / "out")]) == 2
    assert re.search(message, capsys.readouterr().err)


def test_without_img2dataset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr("sys.executable", str(tmp_path / "python"))
    one = job(tmp_path, CC12M)
    assert main(["data", "download", "cc12m", "--tsv", str(one.tsv), "--out", str(one.out), "--threads", "0"]) == 2
    assert "--threads: must be a whole number from 1 to 1,024 (got 0)" in capsys.readouterr().err
    assert main(["data", "download", "cc12m", "--tsv", str(one.tsv), "--out", str(one.out)]) == 2
    assert "pip install 'disttempnet[download]'" in capsys.readouterr().err


def test_a_missing_list_is_told_without_torch(tmp_path: Path) -> None:
    code = f"""
import sys
from disttempnet.cli.main import main
assert main(["data", "download", "cc3m", "--tsv", "{tmp_path}/none.tsv", "--out", "{tmp_path}", "--dry-run"]) == 2
assert "torch" not in sys.modules, "torch was imported"
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "none.tsv: no such file; get it" in done.stderr


def test_the_note_that_a_killed_download_was_writing_is_passed_over(tmp_path: Path) -> None:
    whole = json.dumps({"count": 5, "successes": 3, "status_dict": {"success": 3, "timeout": 2}})
    (tmp_path / "00000_stats.json").write_text(whole)
    (tmp_path / "00001_stats.json").write_text(whole[:40])
    (tmp_path / "00002_stats.json").write_text("")
    assert download_result(tmp_path) == (1, 3, {"timeout": 2})
