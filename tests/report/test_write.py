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
