"""The site builds without a warning, asks nothing of other hosts, and its reference has all that the code has."""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

import pytest

import disttempnet
from disttempnet.cli.main import build_parser
from disttempnet.config import Config, Section
from disttempnet.losses import OBJECTIVES
from tools.build_site import ROOT, build, collect
from tools.draw_concepts import DRAWN, FIGURES

pytest.importorskip("zensical", reason="the extra `docs` is not installed")
# Attributes that make a browser fetch something at once; links that a reader clicks are free.
FETCHED = {"script": "src", "img": "src", "iframe": "src", "source": "src", "object": "data", "link": "href"}


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a site that was built as `make docs` builds it."""
    folder = tmp_path_factory.mktemp("site")
    build = [sys.executable, "-m", "tools.build_site", str(folder)]
    built = subprocess.run(build, cwd=ROOT, capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stdout + built.stderr
    return folder / "html"


class Tags(HTMLParser):
    """The tags of a page with their attributes, and its text."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data


def test_pages_fetch_nothing_from_other_hosts(site: Path) -> None:
    pages = sorted(site.rglob("*.html"))
    assert len(pages) > 15
    for page in pages:
        for tag, attributes in Tags(page).tags:
            fetched = attributes.get(FETCHED.get(tag, ""), "") or ""
            assert not re.match(r"(https?:)?//", fetched), f"{page.name}: <{tag}> {fetched}"
    for sheet in site.rglob("*.css"):
        assert not re.search(r"@import|url\(\s*[\"']?(https?:)?//", sheet.read_text(encoding="utf-8")), sheet


def test_links_lead_to_files_and_anchors_of_the_site(site: Path) -> None:
    pages = {page: Tags(page) for page in site.rglob("*.html") if page.name != "404.html"}
    anchors = {page: {found.get("id") for _, found in one.tags} for page, one in pages.items()}
    seen = 0
    for page, one in pages.items():
        for tag, attributes in one.tags:
            link = attributes.get("href") or ""
            if tag != "a" or not link or re.match(r"\w+:", link):
                continue
            name, _, anchor = unquote(link).partition("#")
            target = (page.parent / name).resolve() if name else page
            target = target / "index.html" if target.is_dir() else target
            assert target.is_file(), f"{page.name}: {link}"
            assert not anchor or target not in anchors or anchor in anchors[target], f"{page.name}: {link}"
            seen += 1
    assert seen > 500


def test_a_link_that_leads_nowhere_fails_the_build(tmp_path: Path) -> None:
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "index.md").write_text("# Page\n\n[lost](nowhere.md)\n", encoding="utf-8")
    (tmp_path / "mkdocs.yml").write_text("site_name: x\ndocs_dir: docs\nsite_dir: html\n", encoding="utf-8")
    assert build(tmp_path) == 1


def test_a_folder_with_files_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").touch()
    with pytest.raises(SystemExit, match="is not empty"):
        collect(tmp_path)


def test_every_page_is_in_the_navigation(tmp_path: Path) -> None:
    collect(tmp_path)
    config = (tmp_path / "mkdocs.yml").read_text(encoding="utf-8")
    pages = [path.relative_to(tmp_path / "docs").as_posix() for path in (tmp_path / "docs").rglob("*.md")]
    assert len(pages) > 15
    assert sorted(re.findall(r": (\S+\.md)$", config, re.MULTILINE)) == sorted(pages)


def commands(parser: argparse.ArgumentParser) -> Iterator[argparse.ArgumentParser]:
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for command in action.choices.values():
                yield command
                yield from commands(command)


def test_the_reference_has_every_command_and_argument(site: Path) -> None:
    text = Tags(site / "reference" / "commands.html").text
    found = list(commands(build_parser()))
    assert len(found) > 15
    for command in found:
        if any(isinstance(action, argparse._SubParsersAction) for action in command._actions):
            continue  # `data` does nothing by itself
        assert f"{command.prog}¶" in text
        for action in command._actions:
            for name in action.option_strings or [str(action.metavar or action.dest)]:
                assert isinstance(action, argparse._HelpAction) or name in text, f"{command.prog}: {name}"


def test_the_reference_has_every_key_with_its_meaning(site: Path) -> None:
    text = " ".join(Tags(site / "reference" / "config.html").text.split())
    keys = 0
    for name, field in Config.model_fields.items():
        section = field.annotation
        inner = section.model_fields if isinstance(section, type) and issubclass(section, Section) else {"": field}
        for key, one in inner.items():
            assert f"{name}.{key}".removesuffix(".") in text
            assert " ".join((one.description or "").replace("`", "").split()) in text
            keys += 1
    assert keys > 50


def test_the_reference_has_every_objective_with_its_arguments(site: Path) -> None:
    text = Tags(site / "reference" / "objectives.html").text
    sections = dict(zip(*[iter(re.split(r"\n([\w-]+)¶\n", text)[1:])] * 2, strict=True))
    assert sections.pop("Objectives")
    assert sections.keys() == OBJECTIVES.keys()
    for name, recipe in OBJECTIVES.items():
        for word in (recipe.formula, recipe.title, recipe.source, *recipe.arguments):
            assert word in sections[name], f"{name}: {word}"


def test_the_reference_has_every_public_name(site: Path) -> None:
    anchors = {attributes.get("id") for _, attributes in Tags(site / "reference" / "api.html").tags}
    assert {f"disttempnet.{name}" for name in disttempnet.__all__ if not name.startswith("_")} <= anchors


@pytest.mark.parametrize("name", DRAWN)
def test_the_figures_are_what_their_script_draws(name: str) -> None:
    """By what they say: coordinates may differ in the last digit elsewhere."""
    kept = (FIGURES / name).read_text(encoding="utf-8")
    assert "prefers-color-scheme: dark" in kept
    texts = re.findall(r"<text[^>]*>([^<]*)", kept)
    assert len(texts) > 20
    assert texts == re.findall(r"<text[^>]*>([^<]*)", DRAWN[name]())


def test_every_figure_has_a_script() -> None:
    assert {path.name for path in FIGURES.iterdir()} == DRAWN.keys()
