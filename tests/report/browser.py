"""Pages in headless Chromium: what is wider than the screen, bars, the background, and messages of the console."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import pytest

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
WIDTHS = (1400, 420)  # pixels of a desk and of a phone
OPTIONS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
    "--disable-background-networking", "--disable-component-update", "--disable-dev-shm-usage",
    "--enable-logging=stderr", "--window-size=1600,1200", "--virtual-time-budget=20000",
)  # fmt: skip

needs_browser = pytest.mark.skipif(CHROMIUM is None, reason="no chromium on PATH (apt-get install chromium)")

# Elements that lie in a box that scrolls by itself may be wider than the screen.
_MEASURE = """
const scrolls = e => e && (/auto|scroll|hidden/.test(e.ownerDocument.defaultView.getComputedStyle(e).overflowX)
  || scrolls(e.parentElement));
const found = {};
for (const frame of document.querySelectorAll("iframe")) {
  const page = frame.contentDocument, all = [...page.body.querySelectorAll("*")];
  found[frame.name] = {
    wide: all.filter(e => e.getBoundingClientRect().right > frame.clientWidth + 1 && !scrolls(e.parentElement))
      .map(e => e.tagName + "." + e.className),
    scroll: page.documentElement.scrollWidth - frame.clientWidth,
    bars: [...new Set(all.filter(e => e.className === "meter").map(e => e.getBoundingClientRect().width))],
    broken: [...page.images].filter(e => !e.complete || !e.naturalWidth).length,
    background: frame.contentWindow.getComputedStyle(page.body).backgroundColor,
  };
}
const out = document.createElement("pre");
out.id = "found";
out.textContent = JSON.stringify(found);
document.body.append(out);
"""


class Rendered(NamedTuple):
    """A page at a width.

    Attributes:
        wide: elements that are wider than the screen and do not scroll in a box of their own.
        scroll: pixels by which the whole page is wider than the screen.
        bars: the different full widths of its bars.
        broken: number of images that did not load.
        background: CSS colour.
    """

    wide: list[str]
    scroll: int
    bars: list[float]
    broken: int
    background: str


def rendered(pages: Mapping[str, str], dark: bool = False) -> dict[tuple[str, int], Rendered]:
    """Open pages (name → HTML) in Chromium, at each of `WIDTHS`; fail where its console has a message."""
    frames = "".join(
        f'<iframe name="{name} {width}" style="width:{width}px;height:900px;border:0" srcdoc="{html.escape(page)}">'
        "</iframe>"
        for name, page in pages.items()
        for width in WIDTHS
    )
    assert CHROMIUM is not None
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "pages.html")
        script = f'<script>addEventListener("load", () => {{ {_MEASURE} }})</script>'
        path.write_text(f"<!doctype html><meta charset=utf-8><body>{frames}{script}</body>", encoding="utf-8")
        mode = ["--blink-settings=preferredColorScheme=0"] if dark else []
        command = [CHROMIUM, *OPTIONS, *mode, f"--user-data-dir={folder}/profile", "--dump-dom", path.as_uri()]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=True)
    messages = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    assert not messages, "\n".join(messages)
    (text,) = re.findall(r'<pre id="found">(.*?)</pre>', done.stdout, re.DOTALL)
    found = {
        tuple(name.rsplit(" ", 1)): Rendered(**of_page) for name, of_page in json.loads(html.unescape(text)).items()
    }
    return {(name, int(width)): page for (name, width), page in found.items()}


def assert_readable(pages: Mapping[str, str]) -> None:
    """Check pages on both widths, light and dark."""
    backgrounds = []
    for dark in (False, True):
        for (name, width), page in rendered(pages, dark).items():
            place = f"{name} at {width} px"
            assert page.wide == [], place
            assert page.scroll <= 0, place
            assert page.broken == 0, place
            assert len(page.bars) <= 1, place
            backgrounds.append(page.background)
    assert len(set(backgrounds[: len(backgrounds) // 2])) == len(set(backgrounds[len(backgrounds) // 2 :])) == 1
    assert backgrounds[0] != backgrounds[-1]
