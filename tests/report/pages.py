"""HTML pages of reports, parsed and checked."""

from __future__ import annotations

import base64
import re
from html.parser import HTMLParser
from pathlib import Path

from disttempnet.report import build_report

SECTIONS = ("results", "learning", "temperatures", "zero-shot", "retrieval", "provenance")

EVIL = "<script>alert(1)</script> & red"


class Page(HTMLParser):
    """Start tags with their attributes, ids, and visible text; void and balanced tags are checked."""

    VOID = frozenset({"img", "meta", "br", "link", "input"})

    def __init__(self, html: str) -> None:
        super().__init__()
        self.html, self.tags, self.words, self._open = html, [], [], []
        self.feed(html)
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self._open[-1:] not in (["style"], ["script"]):
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())

    @property
    def ids(self) -> list[str]:
        return [attributes["id"] for _, attributes in self.tags if "id" in attributes]


def page_of(folders: list[Path], out: Path) -> Page:
    assert build_report(folders, out) == out
    return Page(out.read_text(encoding="utf-8"))


def assert_self_contained(page: Page) -> None:
    for tag, attributes in page.tags:
        assert tag not in ("script", "link", "iframe", "object", "base")
        for name in ("src", "href", "srcset", "style", "data"):
            value = attributes.get(name) or ""
            assert value.startswith(("data:", "#")) or "//" not in value, (tag, name, value[:80])
    assert not re.search(r"@import|url\(", page.html)
    for encoded in re.findall(r"data:image/svg\+xml;base64,([^\"]+)", page.html):
        svg = base64.b64decode(encoded).decode()
        assert not re.search(r"(href|src)=\"(?!#|data:)", svg)
