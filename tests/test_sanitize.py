"""Credentials, control characters and cells: what is hidden, what is escaped, and what stays as it is."""

from __future__ import annotations

import csv
import io
import pickle
import warnings

import pytest
from rich.table import Table

from disttempnet.errors import UserError, UserNotice, show_notices_plainly
from disttempnet.sanitize import (
    csv_cell,
    from_environment,
    markdown_cell,
    one_line,
    printable,
    redacted,
    redacted_table,
)
from disttempnet.terminal import console, say

PRESIGNED = (
    "https://b.s3.amazonaws.com/00000.tar?X-Amz-Algorithm=AWS4-HMAC-SHA256&X-Amz-Credential=AKIA1%2F20260101&"
    "X-Amz-Expires=3600&X-Amz-Security-Token=FwoG&X-Amz-Signature=5d2e"
)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("https://user:password@host/a.tar", "https://***@host/a.tar"),
        ("s3://AKIA:se@cret@bucket/{0..9}.tar", "s3://***@bucket/{0..9}.tar"),
        ("https://ghp_token@host/x and ftp://u:p@h", "https://***@host/x and ftp://***@h"),
        (
            PRESIGNED,
            "https://b.s3.amazonaws.com/00000.tar?X-Amz-Algorithm=***&X-Amz-Credential=***&"
            "X-Amz-Expires=***&X-Amz-Security-Token=***&X-Amz-Signature=***",
        ),
        ("az://c/x.tar?sv=2023&se=2027&sig=a%2Bb%3D", "az://c/x.tar?sv=***&se=***&sig=***"),
        ("http://h/{0..1}.tar?code=1&abc==&x=${TOK}", "http://h/{0..1}.tar?code=***&abc=***&x=${TOK}"),
        ("http://h/0.tar?bare&${SAS}&amp;v=1", "http://h/0.tar?***&${SAS}&amp;v=***"),
        (
            "http://h/folder?code=1&pass=2&userpass=3&encode=4",
            "http://h/folder?code=***&pass=***&userpass=***&encode=4",
        ),
        ("s3://AKIA:ab/cd+ef@bucket/x, s3://b/y", "s3://***@bucket/x, s3://b/y"),
        ('s3://AKIA:a"b@c/d@bucket/x', "s3://***@bucket/x"),
        ('{"a":"https://host:80","b":"x@y"}', '{"a":"https://host:80","b":"x@y"}'),
        ("http://127.0.0.1:8080/a@b.tar", "http://127.0.0.1:8080/a@b.tar"),
        ("http://[::1]:8080/a@b.tar", "http://[::1]:8080/a@b.tar"),
        ("https://user:${PASSWORD}@host/x@y.tar", "https://user:${PASSWORD}@host/x@y.tar"),
        ("https://h/x?AccessKey=1&AWSAccessKeyId=2&a=3", "https://h/x?AccessKey=***&AWSAccessKeyId=***&a=3"),
        ("https://h/x?api_key=1#access_token=2", "https://h/x?api_key=***#access_token=***"),
        ("<td>https://h/x?a=1&amp;token=abc</td>", "<td>https://h/x?a=1&amp;token=***</td>"),
        ('{"a":"s3://bucket","b":"x@y"}', '{"a":"s3://bucket","b":"x@y"}'),
        ("hf://datasets/org/name@main/x.tar", "hf://datasets/org/name@main/x.tar"),
        ("https://host/a@b?width=3&name=c", "https://host/a@b?width=3&name=c"),
        ("https://user:${PASSWORD}@host/x?token=${TOKEN}", "https://user:${PASSWORD}@host/x?token=${TOKEN}"),
        ("https://user:${A}b@host/?token=${A}b", "https://***@host/?token=***"),
        ("data.caption_key=long_caption train.epochs=3", "data.caption_key=long_caption train.epochs=3"),
    ],
)
def test_credentials_are_hidden_and_nothing_else(text: str, shown: str) -> None:
    assert redacted(text) == shown
    assert redacted(shown) == shown


def test_every_string_of_a_table_is_redacted() -> None:
    table = {"data": {"train": ({"path": "https://u:p@h", "weight": 2.0},), "workers": 2}, "name": "x"}
    assert redacted_table(table) == {
        "data": {"train": [{"path": "https://***@h", "weight": 2.0}], "workers": 2},
        "name": "x",
    }


def test_placeholders_come_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SHARDS_PASSWORD", "p w")
    monkeypatch.delenv("NOT_THERE", raising=False)
    assert from_environment("https://u:${SHARDS_PASSWORD}@h/{0..9}.tar") == "https://u:p w@h/{0..9}.tar"
    with pytest.raises(KeyError, match="NOT_THERE"):
        from_environment("https://${NOT_THERE}@h")


EVIL = "\x1b]52;c;aGk=\x07 \x1b[2J \x9b1m a\u202eb\r\u2028c\udc80 ü 日 👩\u200d🚀"
CLEAN = "\\x1b]52;c;aGk=\\x07 \\x1b[2J \\x9b1m a\\u202eb\\x0d\\u2028c\\udc80 ü 日 👩\u200d🚀"


def test_control_characters_are_escaped_and_other_letters_stay() -> None:
    assert printable(EVIL) == CLEAN
    assert printable("a\tb\nc") == "a\tb\nc"
    assert one_line("a\nb") == "a\\nb"


def test_lines_and_tables_reach_the_terminal_clean(capsys: pytest.CaptureFixture[str]) -> None:
    say(f"{EVIL} https://u:p@h")
    say(EVIL, error=True)
    table = Table("name", title=EVIL)
    table.add_row("[bold]\x1b[31m[/bold] :smile:")
    shown = console()
    shown.print(table)
    shown.print(EVIL, soft_wrap=True)
    out, err = capsys.readouterr()
    assert f"{CLEAN} https://***@h\n" in out
    assert err == f"{CLEAN}\n"
    assert "[bold]\\x1b[31m[/bold] :smile:" in out
    assert not [letter for letter in out + err if letter in "\x1b\x07\x9b\u202e\r\u2028\udc80"]


def test_a_terminal_still_has_its_colours(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    shown = console()
    shown.file = io.StringIO()
    shown.print("red \x1b[0m", style="red")
    assert shown.file.getvalue() == "\x1b[31mred \\x1b[0m\x1b[0m\n"


def test_errors_and_notices_are_one_clean_line(capsys: pytest.CaptureFixture[str]) -> None:
    error = UserError("https://u:p@h/\x1b[2J.tar: no\nsuch")
    assert str(error) == "https://***@h/\\x1b[2J.tar: no\\nsuch"
    assert str(pickle.loads(pickle.dumps(error))) == str(error)
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        show_notices_plainly()
        warnings.warn("https://u:p@h \x1b", UserNotice, stacklevel=1)
    assert capsys.readouterr().err == "warning: https://***@h \\x1b\n"


def test_cells_of_a_csv_are_no_formulas_and_numbers_stay_numbers() -> None:
    given = ["=1+2", "+cmd", "-x", "@sum", "\t=1", "\r=1", "-0.5", "+1e-3", "-inf", "a=1", "", -2.5, None, 3]
    kept = [csv_cell(value) for value in given]
    assert kept == [
        "'=1+2", "'+cmd", "'-x", "'@sum", "'\t=1", "'\r=1", "-0.5", "+1e-3", "-inf", "a=1", "", -2.5, None, 3,
    ]  # fmt: skip
    file = io.StringIO()
    csv.writer(file).writerow(kept)
    assert next(csv.reader([file.getvalue().partition("\r\n")[0]]))[6] == "-0.5"


def test_a_cell_of_markdown_stays_in_its_cell() -> None:
    assert markdown_cell("a|b\nc <img src=x> *d* [e](f) `g` &lt; & \\") == (
        "a\\|b\\\\nc &lt;img src=x&gt; \\*d\\* \\[e\\](f) \\`g\\` &amp;lt; & \\\\"
    )
    assert markdown_cell("34.5 (1.2) image_key & τ") == "34.5 (1.2) image_key & τ"
