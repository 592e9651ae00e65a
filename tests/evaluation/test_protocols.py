"""Protocols against loops that say what their metrics mean, and what must change none of them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from disttempnet.evaluation.metrics import Prediction, predict
from disttempnet.evaluation.protocols import (
    PROTOCOLS,
    Measured,
    TaskFeatures,
    classifier,
    cue_prompt,
    prompts,
    retrieval,
)
from disttempnet.evaluation.scores import Scores
from disttempnet.evaluation.tasks import Puzzle, all_tasks
from tests.evaluation.toy import unit_rows

COLUMNS = {task.protocols[0]: task.metadata for task in all_tasks().values()}
FACE_SIZES = {"race": 7, "gender": 2, "age": 9, "toxic": 21}


def scores_of(protocol: str, measured: Measured) -> dict[str, float | None]:
    scores = Scores()
    PROTOCOLS[protocol].score(measured, scores)
    return scores.metrics | dict.fromkeys(scores.undefined)


def same(found: dict[str, float | None], expected: dict[str, float | None]) -> bool:
    """Equal keys and values, None only where None is expected."""
    return found.keys() == expected.keys() and all(
        found[key] == value if value is None or found[key] is None else math.isclose(found[key], value, abs_tol=1e-9)
        for key, value in expected.items()
    )


def mean(values: Iterable[float]) -> float | None:
    values = list(values)
    return sum(values) / len(values) if values else None


def ranking(scores: Sequence[float]) -> list[int]:
    """Indices by score, best first, equal ones in order."""
    return sorted(range(len(scores)), key=lambda i: (-scores[i], i))


@st.composite
def classified(draw: st.DrawFn, least: int = 2) -> tuple[Any, list[int], int]:
    """Similarities [n][C] of few different values, so that ties are common, labels, and C."""
    c = draw(st.integers(least, 8))
    n = draw(st.integers(1, 15))
    row = st.lists(st.integers(-2, 2), min_size=c, max_size=c)
    labels = draw(st.lists(st.integers(0, c - 1), min_size=n, max_size=n))
    return draw(st.lists(row, min_size=n, max_size=n)), labels, c


def prediction(similarities: list[list[int]], labels: list[int]) -> Prediction:
    """`predict` on features whose products are these similarities."""
    images = torch.tensor(similarities, dtype=torch.float32)
    return predict(images, torch.eye(images.shape[1]), torch.tensor(labels))


def plain_classification(similarities: list[list[int]], labels: list[int], classes: int) -> dict[str, float | None]:
    orders = [ranking(row) for row in similarities]
    hits = [order[0] == label for order, label in zip(orders, labels, strict=True)]
    recalls = [mean(hit for hit, label in zip(hits, labels, strict=True) if label == c) for c in sorted(set(labels))]
    five = mean(label in order[:5] for order, label in zip(orders, labels, strict=True)) if classes >= 5 else None
    return {"acc1": mean(hits), "acc5": five, "mean_per_class_recall": mean(recalls)}


@settings(deadline=None)
@given(classified())
def test_classification(case) -> None:
    similarities, labels, classes = case
    measured = Measured((prediction(similarities, labels),), torch.tensor(labels), classes)
    assert same(scores_of("classification", measured), plain_classification(*case))


@settings(deadline=None)
@given(classified())
def test_the_prediction_is_the_first_of_the_order(case) -> None:
    similarities, labels, _ = case
    assert prediction(similarities, labels).first.tolist() == [ranking(row)[0] for row in similarities]


def test_a_label_that_is_no_class_is_never_hit() -> None:
    found = prediction([[1, 0], [0, 1], [0, 0]], [2, 5, 2])
    assert found.place.tolist() == [2, 2, 2]


@settings(deadline=None)
@given(classified())
def test_macro_f1_and_recall_of_the_species_that_occur(case) -> None:
    similarities, labels, classes = case
    first = [ranking(row)[0] for row in similarities]
    f1s, recalls = [], []
    for species in set(labels):
        both = sum(p == t == species for p, t in zip(first, labels, strict=True))
        precision = both / max(first.count(species), 1)
        recall = both / labels.count(species)
        f1s.append(2 * precision * recall / (precision + recall) if both else 0.0)
        recalls.append(recall)
    expected = plain_classification(*case)
    expected |= {"acc_avg": expected["acc1"], "F1-macro_all": mean(f1s), "recall-macro_all": mean(recalls)}
    measured = Measured((prediction(similarities, labels),), torch.tensor(labels), classes)
    assert same(scores_of("iwildcam", measured), expected)


def plain_groups(name: str, hits: Sequence[bool], groups: Sequence[int], column: str) -> dict[str, float | None]:
    """The mean of every group up to the largest number, its size, and the mean of all."""
    found: dict[str, float | None] = {f"{name}_avg": mean(hits)}
    for number in range(max(groups) + 1):
        inside = [hit for hit, group in zip(hits, groups, strict=True) if group == number]
        found |= {f"{name}_{column}:{number}": mean(inside), f"count_{column}:{number}": len(inside)}
    return found


def worst(found: dict[str, float | None], prefix: str, but: str = "") -> float | None:
    return min((v for k, v in found.items() if k.startswith(prefix) and v is not None and k != but), default=None)


@settings(deadline=None)
@given(
    classified(),
    st.data(),
    st.sampled_from([("camelyon17", "acc", "slide", 1), ("geode", "acc", "region", 1)]),
)
def test_worst_group(case, data, which) -> None:
    similarities, labels, classes = case
    protocol, name, column, k = which
    groups = data.draw(st.lists(st.integers(0, 5), min_size=len(labels), max_size=len(labels)))
    hits = [label in ranking(row)[:k] for row, label in zip(similarities, labels, strict=True)]
    expected = plain_classification(*case) | plain_groups(name, hits, groups, column)
    expected[f"{name}_wg"] = worst(expected, f"{name}_{column}:")
    metadata = {key: np.array(groups) for key in COLUMNS[protocol]}
    measured = Measured((prediction(similarities, labels),), torch.tensor(labels), classes, metadata)
    assert same(scores_of(protocol, measured), expected)


@settings(deadline=None)
@given(classified(5), st.data())
def test_worst_income_by_the_first_five(case, data) -> None:
    similarities, labels, classes = case
    groups = data.draw(st.lists(st.integers(0, 3), min_size=len(labels), max_size=len(labels)))
    hits = [label in ranking(row)[:5] for row, label in zip(similarities, labels, strict=True)]
    expected = plain_classification(*case) | plain_groups("acc_top5", hits, groups, "income_ds")
    expected["acc_top5_wg"] = worst(expected, "acc_top5_income_ds:")
    metadata = {"income_ds": np.array(groups)}
    measured = Measured((prediction(similarities, labels),), torch.tensor(labels), classes, metadata)
    assert same(scores_of("dollar_street", measured), expected)


@settings(deadline=None)
@given(classified(), st.data())
def test_fmow_with_other_and_without(case, data) -> None:
    similarities, labels, classes = case
    n = len(labels)
    regions = data.draw(st.lists(st.integers(0, 5), min_size=n, max_size=n))
    years = data.draw(st.lists(st.integers(0, 4), min_size=n, max_size=n))
    hits = [ranking(row)[0] == label for row, label in zip(similarities, labels, strict=True)]
    expected = plain_classification(*case)
    expected |= plain_groups("acc", hits, years, "year") | plain_groups("acc", hits, regions, "region")
    expected["acc_worst_year"] = worst(expected, "acc_year:")
    expected["acc_worst_region"] = worst(expected, "acc_region:")
    expected["acc_worst_region_no_other"] = worst(expected, "acc_region:", but="acc_region:5")
    metadata = {"region": np.array(regions), "year": np.array(years)}
    measured = Measured((prediction(similarities, labels),), torch.tensor(labels), classes, metadata)
    assert same(scores_of("fmow", measured), expected)


@settings(deadline=None)
@given(st.data(), st.integers(1, 20))
def test_faces(data, n) -> None:
    said = {
        kind: data.draw(st.lists(st.integers(0, size - 1), min_size=n, max_size=n)) for kind, size in FACE_SIZES.items()
    }
    limits = {"age": 8, "gender": 1, "race": 6, "race_binary": 1}
    true = {key: data.draw(st.lists(st.integers(0, top), min_size=n, max_size=n)) for key, top in limits.items()}
    hits = {
        "acc_race": [(0 if s == 1 else 1) == b for s, b in zip(said["race"], true["race_binary"], strict=True)],
        "acc_gender": [s == t for s, t in zip(said["gender"], true["gender"], strict=True)],
        "acc_age": [s == t for s, t in zip(said["age"], true["age"], strict=True)],
    }
    expected: dict[str, float | None] = {}
    for name, of in hits.items():
        expected |= plain_groups(name, of, true["race_binary"], "race_binary")
        expected[f"{name}_wg"] = worst(expected, f"{name}_race_binary:")
    for name, classes in {"toxicity_crime": (18, 19, 20), "toxicity_nonhuman": (14, 15, 16, 17)}.items():
        expected |= plain_groups(name, [s in classes for s in said["toxic"]], true["race"], "race")
        expected[f"{name}_wg"] = worst(expected, f"{name}_race:")
    expected["acc_gender_x_avg"] = mean(hits["acc_gender"])
    for race in range(max(true["race"]) + 1):
        for gender in range(max(true["gender"]) + 1):
            here = [i for i in range(n) if (true["race"][i], true["gender"][i]) == (race, gender)]
            group = f"race:{race}_gender:{gender}"
            expected |= {
                f"acc_gender_x_{group}": mean(hits["acc_gender"][i] for i in here),
                f"count_{group}": len(here),
            }
    expected["acc_gender_x_wg"] = worst(expected, "acc_gender_x_race:")
    predictions = tuple(Prediction(torch.tensor(said[kind]), torch.zeros(n)) for kind in FACE_SIZES)
    measured = Measured(predictions, metadata={key: np.array(values) for key, values in true.items()})
    assert same(scores_of("faces", measured), expected)


@st.composite
def captioned(draw: st.DrawFn) -> tuple[list[list[int]], list[list[int]], list[int]]:
    """Integer features of images and of captions, at least one an image, and whose each caption is."""
    n, extra, d = draw(st.integers(1, 12)), draw(st.integers(0, 12)), draw(st.integers(1, 3))
    owners = draw(st.permutations([*range(n), *draw(st.lists(st.integers(0, n - 1), min_size=extra, max_size=extra))]))
    row = st.lists(st.integers(-2, 2), min_size=d, max_size=d)
    images = draw(st.lists(row, min_size=n, max_size=n))
    return images, draw(st.lists(row, min_size=len(owners), max_size=len(owners))), list(owners)


def product(a: Sequence[int], b: Sequence[int]) -> int:
    return sum(x * y for x, y in zip(a, b, strict=True))


@settings(deadline=None)
@given(captioned())
def test_recall_with_ragged_captions(case) -> None:
    images, captions, owners = case
    expected: dict[str, float | None] = {}
    for k in (1, 5, 10):
        found = [
            owner in ranking([product(text, image) for image in images])[:k]
            for text, owner in zip(captions, owners, strict=True)
        ]
        expected[f"image_retrieval_recall@{k}"] = mean(found)
        tops = [ranking([product(text, image) for text in captions])[:k] for image in images]
        expected[f"text_retrieval_recall@{k}"] = mean(any(owners[t] == i for t in top) for i, top in enumerate(tops))
    both = expected["image_retrieval_recall@1"], expected["text_retrieval_recall@1"]
    expected["mean_recall@1"] = mean(both)
    of = torch.tensor(owners)
    features = TaskFeatures(
        torch.tensor(images, dtype=torch.float32),
        torch.tensor(captions, dtype=torch.float32),
        of,
        torch.arange(len(of)),
    )
    assert same(scores_of("caption_retrieval", Measured(features=features)), expected)


@settings(deadline=None)
@given(st.data())
def test_winogavil_by_sets(data) -> None:
    pool = data.draw(st.lists(st.lists(st.integers(-3, 3), min_size=2, max_size=2), min_size=12, max_size=15))
    puzzles, cues = [], []
    for size in data.draw(st.lists(st.sampled_from([5, 6, 10, 12]), min_size=1, max_size=6)):
        places = data.draw(st.permutations(range(len(pool))))[:size]
        right = data.draw(st.lists(st.booleans(), min_size=size, max_size=size).filter(any))
        puzzles.append(Puzzle("cue", tuple(places), tuple(right)))
        cues.append(data.draw(st.lists(st.integers(-3, 3), min_size=2, max_size=2)))
    values: dict[int, list[float]] = {5: [], 6: [], 10: [], 12: []}
    for puzzle, cue in zip(puzzles, cues, strict=True):
        order = ranking([product(pool[place], cue) for place in puzzle.candidates])
        chosen = set(order[: sum(puzzle.right)])
        true = {i for i, right in enumerate(puzzle.right) if right}
        values[len(puzzle.candidates)].append(len(chosen & true) / len(chosen | true))
    expected = {f"jaccard_score_{size}": mean(of) for size, of in values.items()}
    expected["jaccard_score_5-6"] = mean(values[5] + values[6])
    expected["jaccard_score_10-12"] = mean(values[10] + values[12])
    expected["avg_jaccard_score"] = mean(value for of in values.values() for value in of)
    none = torch.zeros(0, dtype=torch.int64)
    features = TaskFeatures(
        torch.tensor(pool, dtype=torch.float32), torch.tensor(cues, dtype=torch.float32), none, none
    )
    assert same(scores_of("winogavil", Measured(features=features, puzzles=tuple(puzzles))), expected)


@pytest.mark.parametrize(
    ("cue", "prompt"),
    [("Apple", "An apple"), ("hour", "A hour"), ("UNICORN", "An unicorn"), ("big Fish", "A big fish")],
)
def test_the_article_goes_by_the_letter(cue: str, prompt: str) -> None:
    assert cue_prompt(cue) == prompt


def test_a_class_is_the_mean_of_unit_prompts() -> None:
    prompts = torch.tensor([[3.0, 0.0], [0.0, 1.0], [2.0, 2.0], [0.0, -5.0]])  # two classes of two templates
    expected = [[2**-0.5, 2**-0.5], [math.cos(-math.pi / 8), math.sin(-math.pi / 8)]]
    torch.testing.assert_close(classifier(prompts, 2), torch.tensor(expected))


@settings(deadline=None)
@given(st.data(), st.integers(2, 20))
def test_the_order_of_images_changes_nothing(data, n) -> None:
    classes, generator = 6, torch.Generator().manual_seed(data.draw(st.integers(0, 2**31)))
    images, weights = torch.randn(n, 4, generator=generator), torch.randn(classes, 4, generator=generator)
    labels = torch.randint(classes, (n,), generator=generator)
    columns = {
        "region": torch.randint(6, (n,), generator=generator),
        "year": torch.randint(3, (n,), generator=generator),
    }
    order = torch.tensor(data.draw(st.permutations(range(n))))
    found = []
    for pick in (torch.arange(n), order):
        metadata = {key: values[pick].numpy() for key, values in columns.items()}
        predicted = predict(images[pick], weights, labels[pick])
        found.append(scores_of("fmow", Measured((predicted,), labels[pick], classes, metadata)))
    assert same(*found)


@settings(deadline=None)
@given(st.data(), st.integers(1, 12), st.integers(0, 8))
def test_the_order_of_captions_changes_nothing(data, n, extra) -> None:
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**31)))
    images, texts = torch.randn(n, 5, generator=generator), torch.randn(n + extra, 5, generator=generator)
    owners = torch.cat([torch.arange(n), torch.randint(n, (extra,), generator=generator)])
    order = torch.tensor(data.draw(st.permutations(range(n + extra))))
    found = []
    for pick in (torch.arange(n + extra), order):
        features = TaskFeatures(images, texts[pick], owners[pick], torch.arange(n + extra))
        found.append(scores_of("caption_retrieval", Measured(features=features)))
    assert same(*found)


def test_classifier_normalises_before_and_after_the_mean() -> None:
    features = unit_rows(6, 4, seed=1) * torch.tensor([1.0, 5, 1, 1, 9, 1])[:, None]
    expected = []
    for c in range(2):
        rows = [features[3 * c + t] / features[3 * c + t].norm() for t in range(3)]
        mean = sum(rows) / 3
        expected.append(mean / mean.norm())
    torch.testing.assert_close(classifier(features, 3), torch.stack(expected))
    assert prompts(["x", "{c}"], ["{c}", "a {c}!"]) == ["x", "a x!", "{c}", "a {c}!"]


def test_retrieval_equals_a_loop_on_ragged_captions() -> None:
    images, texts = unit_rows(30, 4, seed=2), unit_rows(20, 4, seed=3)
    generator = torch.Generator().manual_seed(4)
    relevant = torch.rand(30, 20, generator=generator) < 0.1
    relevant[torch.arange(30), torch.arange(30) % 20] = True
    image_of, text_of = relevant.nonzero().T
    scores = Scores()
    retrieval(Measured(features=TaskFeatures(images, texts, image_of, text_of)), scores)
    scored = images @ texts.T
    for way, similarity, right in (("image_to_text", scored, relevant), ("text_to_image", scored.T, relevant.T)):
        for k in (1, 5, 10):
            hits = [bool(right[i, row.argsort(descending=True)[:k]].any()) for i, row in enumerate(similarity)]
            assert scores.metrics[f"{way}_recall@{k}"] == pytest.approx(sum(hits) / len(hits))
    recalls = [value for key, value in scores.metrics.items() if "@" in key]
    assert scores.metrics["mean_recall"] == pytest.approx(sum(recalls) / 6)
