"""Protocols: predictions and features → scores; tasks.toml names the protocols of a task.

Every protocol is a function of what was measured, the same whether one process measured it or many. Metrics have the
names that DataComp and CLIP_benchmark give them, except `retrieval`, where several images may share a caption.

Legend: n images, t captions, C classes, T templates, D width; every feature row has unit norm.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import normalize

from disttempnet.evaluation.metrics import (
    GroupMeans,
    Prediction,
    WeightedHits,
    clustered_error,
    first_hit,
    group_means,
    jaccard,
    macro_scores,
    mean_per_class_error,
    mean_per_class_recall,
    recall_at,
    recall_chance,
)
from disttempnet.evaluation.scores import Scores
from disttempnet.evaluation.tasks import Puzzle

RECALL_KS = (1, 5, 10)
FREQUENCY_THIRDS = ("head", "middle", "tail")
FMOW_OTHER = "region:5"  # Asia, Europe, Africa, Americas, Oceania, Other
RACE_OF_BINARY_0 = 1  # the class of the race classifier that race_binary separates from all others
CRIME, NONHUMAN = range(18, 21), range(14, 18)  # classes of the `toxic` classifier


@dataclass(frozen=True)
class TaskFeatures:
    """An embedded task.

    Attributes:
        images: [n, D].
        texts: [t, D].
        image_of, text_of: int64 [p], image `image_of[k]` is captioned by text `text_of[k]`. An image may have
            several captions and a caption may belong to several images.
    """

    images: Tensor
    texts: Tensor
    image_of: Tensor
    text_of: Tensor


@dataclass(frozen=True)
class Measured:
    """Input of protocols; what a task has no use for is empty.

    Attributes:
        predictions: of each classifier of the task, for n images.
        labels: int64 [n], the class of each image.
        classes: C, of the first classifier.
        metadata: column → int64 [n].
        third: int64 [n], the image's place in FREQUENCY_THIRDS by training frequency.
        features: images and captions.
        puzzles: their candidates are rows of `features.images`, the cue of the k-th is `features.texts[k]`.
    """

    predictions: tuple[Prediction, ...] = ()
    labels: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.int64))
    classes: int = 0
    metadata: dict[str, NDArray[np.int64]] = field(default_factory=dict)
    third: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.int64))
    features: TaskFeatures | None = None
    puzzles: tuple[Puzzle, ...] = ()


def prompts(class_names: Sequence[str], templates: Sequence[str]) -> list[str]:
    """Return every template of every class, class after class: C·T prompts."""
    return [template.replace("{c}", name) for name in class_names for template in templates]


def classifier(prompt_features: Tensor, templates: int) -> Tensor:
    """Prompt features [C·T, D] → class features [C, D]: normalise each, average, normalise again."""
    return normalize(normalize(prompt_features, dim=-1).unflatten(0, (-1, templates)).mean(1), dim=-1)


def cue_prompt(cue: str) -> str:
    """Return WinoGAViL's prompt for a cue: "An apple", "A big fish"."""
    cue = cue.lower()
    return f"{'An' if cue[:1] in tuple('aeiou') else 'A'} {cue}"


def classification(task: Measured, scores: Scores) -> None:
    """The most similar class is the prediction: acc1, acc5 (None of fewer than five classes), mean_per_class_recall.

    Where training frequencies are known also acc1_head, acc1_middle, acc1_tail, of the images of each third.
    """
    places, n, classes = task.predictions[0].place, len(task.labels), task.classes
    scores.add("acc1", recall_at(places, 1), 1 / classes, n, _error(places, 1))
    if classes >= 5:
        scores.add("acc5", recall_at(places, 5), 5 / classes, n, _error(places, 5))
    else:
        scores.add("acc5", None, None, n)
    recall, error = mean_per_class_recall(places, task.labels), mean_per_class_error(places, task.labels)
    scores.add("mean_per_class_recall", recall, 1 / classes, n, error)
    for i, name in enumerate(FREQUENCY_THIRDS if len(task.third) else ()):
        inside = places[task.third == i]
        scores.add(f"acc1_{name}", recall_at(inside, 1), 1 / classes, len(inside), _error(inside, 1))


def _error(places: Tensor, k: int) -> float | None:
    """Return the standard error of `recall_at`, of one query an image."""
    return clustered_error([WeightedHits(places < k, torch.arange(len(places)))], len(places))


def iwildcam(task: Measured, scores: Scores) -> None:
    """Classification, and F1 and recall averaged over the species that occur."""
    classification(task, scores)
    first, labels = task.predictions[0].first.cpu().numpy(), task.labels.cpu().numpy()
    f1, recall = macro_scores(first, labels)
    scores.add("acc_avg", scores.metrics["acc1"], 1 / task.classes, len(labels))
    scores.add("recall-macro_all", recall, 1 / task.classes, len(labels))
    scores.add("F1-macro_all", f1, None, len(labels))


def by_group(task: Measured, scores: Scores, *, name: str, column: str, k: int = 1) -> None:
    """Classification, and the share of images with their class among the first k in each group and in the worst.

    Args:
        name: of the metric: NAME_COLUMN:0, NAME_COLUMN:1, …, NAME_avg, NAME_wg.
        column: of the metadata, the number of an image's group.
    """
    classification(task, scores)
    _add_groups(scores, name, task.predictions[0].place.cpu().numpy() < k, {column: task.metadata[column]})


def fmow(task: Measured, scores: Scores) -> None:
    """Classification by year and by region; the worst region.

    acc_worst_region counts the region "Other", as DataComp's code does, although it means to skip it. With a handful of
    images this region alone often decides, at zero. acc_worst_region_no_other leaves it out.
    """
    classification(task, scores)
    hits = task.predictions[0].place.cpu().numpy() < 1
    _add_groups(scores, "acc", hits, {"year": task.metadata["year"]}, worst="acc_worst_year")
    regions = _add_groups(scores, "acc", hits, {"region": task.metadata["region"]}, worst="acc_worst_region")
    scores.add("acc_worst_region_no_other", regions.worst(but=[FMOW_OTHER]), None, len(hits))


def faces(task: Measured, scores: Scores) -> None:
    """Race, gender and age by binary race, gender by race and gender, crime and non-human labels by race.

    Race is right where the prediction agrees with race_binary.
    """
    race, gender, age, toxic = (prediction.first.cpu().numpy() for prediction in task.predictions)
    known = task.metadata
    binary = {"race_binary": known["race_binary"]}
    _add_groups(scores, "acc_race", (race != RACE_OF_BINARY_0) == known["race_binary"], binary)
    _add_groups(scores, "acc_gender", gender == known["gender"], binary)
    _add_groups(scores, "acc_age", age == known["age"], binary)
    both = {"race": known["race"], "gender": known["gender"]}
    _add_groups(scores, "acc_gender_x", gender == known["gender"], both)
    _add_groups(scores, "toxicity_crime", np.isin(toxic, CRIME), {"race": known["race"]})
    _add_groups(scores, "toxicity_nonhuman", np.isin(toxic, NONHUMAN), {"race": known["race"]})


def _add_groups(
    scores: Scores, name: str, hits: NDArray[np.bool_], columns: dict[str, NDArray[np.int64]], worst: str = ""
) -> GroupMeans:
    """Add NAME_avg, NAME_GROUP and count_GROUP of every group, and the worst group's mean, NAME_wg if not named."""
    groups = group_means(hits, columns)
    scores.add(f"{name}_avg", float(hits.mean()), None, len(hits))
    for group, mean in groups.means.items():
        scores.add(f"{name}_{group}", mean, None, groups.counts[group])
        scores.add(f"count_{group}", groups.counts[group], None, groups.counts[group])
    scores.add(worst or f"{name}_wg", groups.worst(), None, len(hits))
    return groups


def retrieval(task: Measured, scores: Scores) -> None:
    """recall@k of captions for images and of images for captions, and the mean over both ways and all k."""
    recalls = _recalls(task, scores, {"image_to_text": "image_to_text", "text_to_image": "text_to_image"})
    _add_mean(task, scores, "mean_recall", recalls)


def caption_retrieval(task: Measured, scores: Scores) -> None:
    """Retrieval where each caption belongs to one image; the mean of both ways' recall@1 is the score."""
    recalls = _recalls(task, scores, {"text_to_image": "image_retrieval", "image_to_text": "text_retrieval"})
    _add_mean(task, scores, "mean_recall@1", [recall for recall in recalls if recall.k == 1])


class Recall(NamedTuple):
    """recall@k of one way: its value, its chance level, and the hits that it is the mean of."""

    k: int
    value: float
    chance: float
    hits: WeightedHits


def _recalls(task: Measured, scores: Scores, names: dict[str, str]) -> list[Recall]:
    """Add recall@k of the ways in `names`, under these names."""
    features = _features(task)
    recalls = []
    ways = {
        "image_to_text": (features.images, features.texts, features.image_of, features.text_of),
        "text_to_image": (features.texts, features.images, features.text_of, features.image_of),
    }
    images = torch.arange(len(features.images))
    clusters = {"image_to_text": images, "text_to_image": _first_image(features)}
    for way, name in names.items():
        queries, candidates, query_of, candidate_of = ways[way]
        places = first_hit(queries, candidates, query_of, candidate_of)
        right_answers = torch.bincount(query_of, minlength=len(queries))
        for k in RECALL_KS:
            chance = recall_chance(right_answers, len(candidates), k)
            recalls.append(Recall(k, recall_at(places, k), chance, WeightedHits(places < k, clusters[way])))
            error = clustered_error([recalls[-1].hits], len(images))
            scores.add(f"{name}_recall@{k}", recalls[-1].value, chance, len(queries), error)
    return recalls


def _first_image(features: TaskFeatures) -> Tensor:
    """Return int64 [t], the image that each text belongs to, of several the first."""
    last = torch.full((len(features.texts),), len(features.images), dtype=torch.int64)
    return last.scatter_reduce(0, features.text_of, features.image_of, "amin")


def _add_mean(task: Measured, scores: Scores, name: str, recalls: Sequence[Recall]) -> None:
    features = _features(task)
    mean, chance = (sum(values) / len(recalls) for values in zip(*((r.value, r.chance) for r in recalls), strict=True))
    parts = [recall.hits._replace(weight=1 / len(recalls)) for recall in recalls]
    error = clustered_error(parts, len(features.images))
    scores.add(name, mean, chance, min(len(features.images), len(features.texts)), error)


def winogavil(task: Measured, scores: Scores) -> None:
    """As many candidates as belong to the cue, the most similar ones, are chosen; Jaccard index with the right ones."""
    images, cues = _features(task).images.cpu(), _features(task).texts.cpu()  # many small products
    values, sizes = [], []
    for puzzle, cue in zip(task.puzzles, cues, strict=True):
        similarities = images[list(puzzle.candidates)] @ cue
        chosen = torch.argsort(similarities, descending=True, stable=True)[: sum(puzzle.right)]
        values.append(jaccard(set(chosen.tolist()), {i for i, right in enumerate(puzzle.right) if right}))
        sizes.append(len(puzzle.candidates))
    value, size = np.array(values), np.array(sizes)
    groups = {str(number): size == number for number in (5, 6, 10, 12)} | {"5-6": size <= 6, "10-12": size >= 10}
    scores.add("avg_jaccard_score", float(value.mean()), None, len(value))
    for name, inside in groups.items():
        mean = float(value[inside].mean()) if inside.any() else None
        scores.add(f"jaccard_score_{name}", mean, None, int(inside.sum()))


def _features(task: Measured) -> TaskFeatures:
    assert task.features is not None, "score_task keeps the features of matching protocols"
    return task.features


@dataclass(frozen=True)
class Protocol:
    """Way to score, and what it needs.

    Attributes:
        score: adds its metrics to a task's scores.
        matching: images are compared with texts of their own, whose features are kept, and not only with classes.
    """

    score: Callable[[Measured, Scores], None]
    matching: bool = False


PROTOCOLS: dict[str, Protocol] = {
    "classification": Protocol(classification),
    "iwildcam": Protocol(iwildcam),
    "camelyon17": Protocol(partial(by_group, name="acc", column="slide")),
    "fmow": Protocol(fmow),
    "dollar_street": Protocol(partial(by_group, name="acc_top5", column="income_ds", k=5)),
    "geode": Protocol(partial(by_group, name="acc", column="region")),
    "faces": Protocol(faces),
    "retrieval": Protocol(retrieval, matching=True),
    "caption_retrieval": Protocol(caption_retrieval, matching=True),
    "winogavil": Protocol(winogavil, matching=True),
}
