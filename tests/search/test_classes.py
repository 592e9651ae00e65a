"""Classes of images: probabilities against a plain loop, counts, and the lists that people give."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn.functional import normalize

from disttempnet.errors import UserError
from disttempnet.search import classes as module
from disttempnet.search.classes import DEFAULT_TEMPLATES, Classified, ClassTally, classify, read_classes, read_templates


@pytest.mark.parametrize("cells", [1 << 22, 7, 1])
def test_probabilities_are_a_softmax_of_cosine_over_tau(cells: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CELLS", cells)
    generator = torch.Generator().manual_seed(0)
    images = normalize(torch.randn(11, 6, generator=generator), dim=1)
    names = normalize(torch.randn(4, 6, generator=generator), dim=1)
    taus = {tuple(row): 0.02 + 0.01 * i for i, row in enumerate(images.tolist())}
    ids = np.arange(11) * 3
    parts = [(ids[:5], images[:5]), (ids[5:], images[5:])]

    def tau(rows: torch.Tensor) -> torch.Tensor:
        return torch.tensor([taus[tuple(row)] for row in rows.tolist()], dtype=torch.float64)

    found = list(classify(parts, names, tau))
    assert np.concatenate([part.ids for part in found]).tolist() == ids.tolist()
    first, second = (torch.cat([part.classes[:, i] for part in found]).tolist() for i in (0, 1))
    values = torch.cat([part.probabilities for part in found])
    for i, image in enumerate(images.double()):
        logits = [float(image @ name) / (0.02 + 0.01 * i) for name in names.double()]
        shares = [math.exp(one) / math.fsum(map(math.exp, logits)) for one in logits]
        order = sorted(range(4), key=lambda c: -shares[c])
        assert [first[i], second[i]] == order[:2]
        np.testing.assert_allclose(values[i].tolist(), [shares[c] for c in order[:2]], rtol=1e-12)


def test_a_tally_counts_and_keeps_both_ends() -> None:
    draw = np.random.default_rng(0)
    first, probability = draw.integers(0, 3, 60), np.round(draw.uniform(0.3, 1, 60), 1)  # many are equal
    tally = ClassTally(4, shown=5)
    for start in range(0, 60, 13):
        rows = slice(start, start + 13)
        two = torch.from_numpy(np.stack([first[rows], (first[rows] + 1) % 3], 1))
        shares = torch.from_numpy(np.stack([probability[rows], 0 * probability[rows]], 1))
        tally.add(Classified(np.arange(60)[rows], two, shares))
    for number in range(4):
        members = [i for i in range(60) if first[i] == number]
        assert tally.count[number] == len(members)
        assert tally.doubtful[number] == sum(probability[i] < 0.5 for i in members)
        assert tally.mean(number) == pytest.approx(np.mean(probability[members]) if members else 0, rel=1e-12)
        surest = sorted(members, key=lambda i: (-probability[i], i))[:5]
        assert tally.surest(number) == [(probability[i], i) for i in surest]
        least = sorted(members, key=lambda i: (probability[i], i))[:5]
        assert tally.least_sure(number) == [(probability[i], i) for i in least if i not in surest]
    assert tally.count[3] == 0


def test_classes_between_commas_or_a_line_each(tmp_path: Path) -> None:
    assert read_classes("a red apple, pear,plum") == (("a red apple", "pear", "plum"), [])
    file = tmp_path / "classes.txt"
    file.write_text("apple, red\n\n pear \n", encoding="utf-8")
    assert read_classes(str(file)) == (("apple, red", "pear"), [])
    file.write_bytes("Käse\nBrot\n".encode("latin-1"))
    assert read_classes(str(file)) == (("Käse", "Brot"), ["classes.txt is not UTF-8: read as Latin-1"])


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("apple", "--classes: no file, and one class: 'apple': name two or more, A,B,C, or a file with one a line"),
        ("apple,,pear", "--classes: an empty name between commas: 'apple,,pear'"),
        ("apple,pear,", "--classes: an empty name between commas: 'apple,pear,'"),
        ("apple,pear, apple", "--classes: class 'apple' is given 2 times"),
        ("one.txt", "one.txt: fewer than two classes: name two or more"),
        ("none.txt", "one.txt: fewer than two classes: name two or more"),
        ("twice.txt", "twice.txt: class 'pear' is given 2 times"),
    ],
)
def test_lists_that_are_none(given: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "one.txt").write_text("apple\n\n")
    (tmp_path / "twice.txt").write_text("apple\npear\n pear\n")
    if given == "none.txt":
        (tmp_path / "none.txt").write_text("\n \n")
        message = message.replace("one.txt", "none.txt")
    with pytest.raises(UserError) as error:
        read_classes(given)
    assert message in str(error.value)


def test_templates(tmp_path: Path) -> None:
    assert read_templates([]) == DEFAULT_TEMPLATES == ("a photo of a {c}.", "{c}")
    assert read_templates(["a {c}", "{c}!"]) == ("a {c}", "{c}!")
    file = tmp_path / "templates.txt"
    file.write_text("a {c}\n\nmany {c}s\n")
    assert read_templates([str(file)]) == ("a {c}", "many {c}s")
    file.write_text("a thing\n")
    with pytest.raises(UserError, match=r"'a thing' has no \{c\}"):
        read_templates([str(file)])
    with pytest.raises(UserError, match=r"--templates: 'a thing' has no \{c\} for the class name, and is no file"):
        read_templates(["{c}", "a thing"])
