"""Every tutorial runs as it is written, on less data: its files, its commands in order, its Python, its output."""

from __future__ import annotations

import contextlib
import io
import re
import shlex
from collections.abc import Callable
from pathlib import Path

import pytest

from disttempnet.cli.main import main
from tests.evaluation.dataroot import write_data_root
from tests.evaluation.formats import picture
from tests.evaluation.toy import write_shard

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "docs" / "index.md", *sorted((ROOT / "docs" / "tutorials").glob("*.md"))]
INSTALLS = ("make ", "source ", "pip install ", "disttempnet completion ")  # lines of the first page that set up
# Keys that make runs small, in place of a page's own values.
SMALL = {
    "data.limit": "64",
    "data.global_batch": "32",
    "data.workers": "0",
    "eval.tasks": '["emoji-concepts"]',
    "eval.every_epochs": "1",
    "train.epochs": "1",
}
SMALL_OF = {
    "fine-tune.md": {"train.epochs": "2", "train.warm_statistics": "1", "eval.tasks": "[]"},
    "own-images.md": {"eval.tasks": "[]"},
}
TRAINED = re.compile(r"disttempnet (train \S+|compare \S+ --jobs)")


def write_pairs(folder: Path) -> None:
    """Captions, pictures and shards, as the tutorial on temperatures names them."""
    (folder / "captions.txt").write_text("a red apple\nsomething\n", encoding="utf-8")
    (folder / "photos").mkdir()
    for colour in ("red", "green"):
        (folder / "photos" / f"{colour}.png").write_bytes(picture(colour))
    (folder / "more").mkdir()
    for number in range(2):
        write_shard(folder / "more" / f"{number:05}.tar", [("a", "red", "a red thing"), ("b", "blue", "a blue one")])


def write_root(folder: Path) -> None:
    (folder / "datacomp").mkdir()
    write_data_root(folder / "datacomp")


def write_photos(folder: Path) -> None:
    for number, (colour, fruit) in enumerate([("red", "apple"), ("green", "pear")] * 40):
        path = folder / "photos" / f"{fruit}-{number}.png"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(picture(colour))
        path.with_suffix(".txt").write_text(f"a {colour} {fruit}, number {number}\n", encoding="utf-8")


FILES: dict[str, Callable[[Path], None]] = {
    "own-images.md": write_photos,
    "temperatures.md": write_pairs,
    "tasks-38.md": write_root,
}


def small(command: str, page: str) -> list[str]:
    """Return the words of a command, with the keys that make its runs small."""
    words = shlex.split(command, comments=True)
    if TRAINED.match(command):
        keys = SMALL | SMALL_OF.get(page, {})
        words = [word for word in words if word.partition("=")[0] not in keys]
        words += [f"{key}={value}" for key, value in keys.items()]
        if words[1] == "compare":
            words.append("seeds=[1]")
    return words[1:]


def run(command: str, page: str) -> str:
    """Run a line of a page in this process and return its output. `>` writes it to a file."""
    command, _, target = command.partition(" > ")
    assert command.startswith("disttempnet "), f"{page}: a test cannot run {command}"
    output = io.StringIO()
    with contextlib.redirect_stdout(output):
        assert main(small(command, page)) == 0, command
    if target:
        Path(target).write_text(output.getvalue(), encoding="utf-8")
    return output.getvalue()


def test_runs_are_made_small_in_place_of_the_pages_values() -> None:
    words = small("disttempnet train demo name=x train.epochs=20", "index.md")
    assert words[:3] == ["train", "demo", "name=x"]
    assert [word for word in words if word.startswith("train.epochs")] == ["train.epochs=1"]
    assert small("disttempnet evaluate runs/x", "index.md") == ["evaluate", "runs/x"]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_a_tutorial_runs_as_it_is_written(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "120")
    FILES.get(page.name, lambda folder: None)(tmp_path)
    blocks = re.findall(r"^```(\w+)\n(.*?)^```$", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    kinds = [kind for kind, _ in blocks]
    assert "sh" in kinds
    shown, names = "", {}
    for kind, text in blocks:
        if kind == "toml":
            name = re.match(r"# (\S+\.toml)\n", text)
            assert name, f"{page.name}: the file has no name: {text}"
            Path(name[1]).write_text(text, encoding="utf-8")
        elif kind == "sh":
            shown = "".join(run(line, page.name) for line in text.splitlines() if not line.startswith(INSTALLS))
        elif kind == "text":
            lines = [line.rstrip() for line in shown.splitlines()]
            assert [line for line in text.splitlines() if line not in lines] == []
        else:
            assert kind == "python"
            exec(text, names)
