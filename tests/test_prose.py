"""README, CHANGELOG and docs/ have short sentences: the middle one has at most 17 words, nine of ten at most 30."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[1]
MEDIAN, NINTH_TENTH = 17, 30  # words a sentence
FEWEST_WORDS = 3  # of a sentence; shorter ones are labels
# Pages that do not pass yet. The list may only shrink: a page of it that passes fails the test.
TOO_LONG = {"docs/evaluation.md", "docs/performance.md", "docs/results_scratch.md"}
# Text that is no prose: fenced code, comments, then whole lines of tables, headings and indented code.
NOT_PROSE = (
    re.compile(r"^( *)(```|~~~).*?^\1\2 *$", re.MULTILINE | re.DOTALL),
    re.compile(r"<!--.*?-->", re.DOTALL),
    re.compile(r"^ *[|#>].*$|^(?<=\n) {4,}(?![-*\d]).*$", re.MULTILINE),
)
BLOCK = re.compile(r"\n\s*\n|\n(?= *(?:[-*+]|\d+\.) )")  # paragraphs, and each item of a list
LABEL = re.compile(r"^ *(?:[-*+]|\d+\.) +")
ABBREVIATIONS = re.compile(r"\b(e\.g|i\.e|cf|vs|etc|al)\.", re.IGNORECASE)
END = re.compile(r"(?<=[.!?])[\"”)*]*\s+")


def pages() -> list[Path]:
    return sorted([ROOT / "README.md", ROOT / "CHANGELOG.md", *(ROOT / "docs").rglob("*.md")])


def sentences(text: str) -> Iterator[str]:
    """Yield the sentences of a page's prose. A code span is a word, a link its text."""
    for pattern in NOT_PROSE:
        text = pattern.sub("", text)
    text = re.sub(r"!?\[([^\]]*)\]\([^)]*\)", r"\1", text)
    text = re.sub(r"`[^`]+`", "code", text)
    text = re.sub(r"<[^>\s][^>]*>", " ", text)
    for block in BLOCK.split(text):
        flat = ABBREVIATIONS.sub(r"\1", " ".join(LABEL.sub("", block.strip("\n")).split()))
        yield from (sentence for sentence in END.split(flat) if length(sentence) >= FEWEST_WORDS)


def length(sentence: str) -> int:
    """Return how many words a sentence has; a sign such as = or – is none."""
    return sum(any(character.isalnum() for character in word) for word in sentence.split())


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def quantiles(page: Path) -> tuple[float, float]:
    """Return the words of a page's middle sentence, and how many nine of ten do not exceed."""
    lengths = [length(sentence) for sentence in sentences(page.read_text(encoding="utf-8"))]
    return (float(np.median(lengths)), float(np.quantile(lengths, 0.9, method="inverted_cdf"))) if lengths else (0, 0)


def test_sentences_are_found_as_a_reader_finds_them() -> None:
    text = """# A heading of no account

A first sentence, with `code of three words` and [a link](https://example.org/a.b). And a second, e.g. with .07!

```sh
never. a sentence. in code
```

| a table | is. no. prose |
|---|---|

- An item of a list that
  goes on. It ends here.
- **Short.** A second item without its stop
"""
    assert [length(sentence) for sentence in sentences(text)] == [8, 6, 8, 3, 6]


@pytest.mark.parametrize("page", pages(), ids=name_of)
def test_sentences_are_short(page: Path) -> None:
    median, ninth_tenth = quantiles(page)
    passes = median <= MEDIAN and ninth_tenth <= NINTH_TENTH
    if name_of(page) in TOO_LONG:
        assert not passes, f"{name_of(page)} passes: take it off TOO_LONG"
        return
    longest = sorted(sentences(page.read_text(encoding="utf-8")), key=length)[-8:]
    shown = "\n".join(f"{length(sentence)}: {sentence}" for sentence in reversed(longest))
    assert passes, f"{name_of(page)}: median {median:g}, nine of ten {ninth_tenth:g} words\n{shown}"


def test_the_list_of_long_pages_names_pages() -> None:
    assert {name_of(page) for page in pages()} >= TOO_LONG
