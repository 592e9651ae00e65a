"""The report that the ending of a file asks for, in every format."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest

from disttempnet.errors import UserError, UserNotice
from disttempnet.report import build_report, write_report
from tests.report.synthetic import write_run


def test_a_page_and_compact_results_of_damaged_runs(tmp_path: Path) -> None:
    """Every file but the config is damaged: the page says what there is."""
    folder = write_run(tmp_path / "a")
    for name in ("run.json", "metrics.jsonl", "eval.jsonl"):
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content[: len(content) // 2] + b"\x00\n" + content[len(content) // 2 :])
    with pytest.warns(UserNotice):
        page = build_report([folder], tmp_path / "page.html")
    assert "DistTempNet" in page.read_text(encoding="utf-8")
    with pytest.warns(UserNotice):
        write_report([folder], tmp_path / "results.jsonl")
    assert json.loads((tmp_path / "results.jsonl").read_text())["seconds"] is None


def test_runs_are_read_once(tmp_path: Path) -> None:
    folders = [write_run(tmp_path / name) for name in ("a", "b")]
    for folder in folders:
        with (folder / "metrics.jsonl").open("a") as file:
            file.write("no JSON\n")
    with pytest.warns(UserNotice) as told:
        write_report(folders, tmp_path / "page.html")
    assert [str(notice.message).partition(": ")[0] for notice in told] == [str(f / "metrics.jsonl") for f in folders]


def test_the_baseline_of_every_report(tmp_path: Path) -> None:
    for name, title, acc1 in (("a", "A", 0.4), ("b", "B", 0.3)):
        for seed in (1, 2):
            folder = write_run(tmp_path / "grid" / f"{name}--seed-{seed}", title, acc1=acc1)
            config = (folder / "config.toml").read_text().replace("seed = 2024", f"seed = {seed}")
            (folder / "config.toml").write_text(config.replace("rho = 2.0", f"rho = {1 if name == 'a' else 2}.0"))
    for ending in ("html", "md", "csv"):
        for name, title in (("", "A"), ("a", "A"), ("b", "B")):
            text = write_report([tmp_path / "grid"], tmp_path / f"r.{ending}", (), name).read_text(encoding="utf-8")
            assert (f"difference to {title}, 95 %" if ending != "csv" else f",{title},") in text
            assert ("10.0" if title == "B" else "−10.0") in text or ending == "csv"
    with pytest.raises(UserError, match="unknown baseline 'c'"):
        write_report([tmp_path / "grid"], tmp_path / "r.md", (), "c")
    # single runs
    singles = [tmp_path / "grid" / f"{name}--seed-1" for name in "ab"]
    for name, words in (("", "Differences to A are"), ("b--seed-1", "Differences to B are"), ("B", "Differences to B")):
        assert words in write_report(singles, tmp_path / "r.html", (), name).read_text(encoding="utf-8")
    with pytest.raises(UserError, match=r"unknown baseline 'b--seed-2'. Did you mean 'b--seed-1'\?"):
        write_report(singles, tmp_path / "r.html", (), "b--seed-2")


FORMULA = "=HYPERLINK(1)|<b>x</b>\n| % \\input{x} \x1b[2J"


def test_titles_are_words_in_every_table(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "a", FORMULA)
    texts = {
        ending: write_report([folder], tmp_path / f"report.{ending}").read_text(encoding="utf-8")
        for ending in ("md", "csv", "tex", "html")
    }
    assert "| =HYPERLINK(1)\\|&lt;b&gt;x&lt;/b&gt;\\\\n\\| % \\\\input{x} \\\\x1b\\[2J | 1 |" in texts["md"]
    rows = list(csv.reader(texts["csv"].splitlines(keepends=True)))
    assert {row[0] for row in rows[1:]} == {"'=HYPERLINK(1)|<b>x</b>\\n| % \\input{x} \\x1b[2J"}
    assert r"\textbackslash{}input\{x\}" in texts["tex"]
    assert r"\input{x}" not in texts["tex"]
    assert "<b>x</b>" not in texts["html"]


SECRET = "https://user:hunter2@host/{0..9}.tar?token=hunter2"


@pytest.mark.parametrize("ending", ["html", "md", "tex", "csv", "jsonl"])
def test_credentials_of_earlier_versions_are_in_no_report(ending: str, tmp_path: Path) -> None:
    folder = write_run(tmp_path / "a", train="embedded:emoji/train")
    config = (folder / "config.toml").read_text()
    (folder / "config.toml").write_text(config.replace("embedded:emoji/train", SECRET))
    facts = json.loads((folder / "run.json").read_text())
    facts["command"] += f" data.train={SECRET}"
    (folder / "run.json").write_text(json.dumps(facts))
    out = write_report([folder], tmp_path / f"report.{ending}")
    assert "hunter2" not in out.read_text(encoding="utf-8")
    if ending in ("html", "jsonl"):
        assert "***@host" in out.read_text(encoding="utf-8")


def test_what_is_given_decides_the_page(tmp_path: Path) -> None:
    one = write_run(tmp_path / "grid" / "a")
    alone = write_report([one], tmp_path / "one.html").read_text()
    assert 'id="zero-shot"' in alone
    again = write_run(tmp_path / "after" / "a", acc1=0.5)  # the same config and seed after a change of the code
    two = write_report([one, again], tmp_path / "two.html").read_text()
    assert 'id="zero-shot"' in two
    (again / "config.toml").write_text((again / "config.toml").read_text().replace("seed = 2024", "seed = 7"))
    assert 'id="zero-shot"' not in write_report([one, again], tmp_path / "seeds.html").read_text()
    grouped = write_report([tmp_path / "grid"], tmp_path / "grid.html").read_text()
    assert 'id="zero-shot"' not in grouped


def test_mistakes_are_named(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "bad.jsonl").write_text('{"format": 1}\n')
    for path, message in (
        (tmp_path / "empty", "neither a run folder"),
        (tmp_path / "none", "not a run folder"),
        (tmp_path / "none.jsonl", "cannot be read"),
        (tmp_path / "bad.jsonl", "line 1 is not a compact result"),
    ):
        with pytest.raises(UserError, match=message):
            write_report([path], tmp_path / "table.md")
    with pytest.raises(UserError, match=r"table.pdf: unknown ending; give one of .html, .md"):
        write_report([write_run(tmp_path / "a")], tmp_path / "table.pdf")
    for out, message in (("bad.jsonl/new/x.md", "bad.jsonl is no folder"), ("empty.md", "it is a folder")):
        (tmp_path / "empty.md").mkdir(exist_ok=True)
        with pytest.raises(UserError, match=f"{out}: cannot be written: .*{message}"):
            write_report([tmp_path / "not even read"], tmp_path / out)
