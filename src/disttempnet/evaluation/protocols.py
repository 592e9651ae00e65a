"""How features become scores: zero-shot classification and image-text retrieval.

A protocol adds its metrics to a task's scores; tasks.toml names the protocols of a task.

Legend: n images, t distinct captions, C classes, T templates, D width; every feature row has unit norm.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import normalize

from disttempnet.evaluation.metrics import first_hit, mean_per_class_recall, recall_at, recall_chance
from disttempnet.evaluation.scores import Scores

RECALL_KS = (1, 5, 10)
THIRDS = ("head", "middle", "tail")


@dataclass(frozen=True)
class Features:
    """An embedded task.

    Attributes:
        images: [n, D].
        labels: int64 [n], the class of each image.
        classes: [C, D], from `classifier`.
        texts: [t, D], the distinct captions.
        image_of, text_of: int64 [p], image `image_of[k]` is captioned by text `text_of[k]`. An image may have
            several captions and a caption may belong to several images.
        third: int64 [n], the image's place in THIRDS by training frequency; empty where that is unknown.
    """

    images: Tensor
    labels: Tensor
    classes: Tensor
    texts: Tensor
    image_of: Tensor
    text_of: Tensor
    third: Tensor


def prompts(class_names: Sequence[str], templates: Sequence[str]) -> list[str]:
    """Every template of every class, class after class: C·T prompts."""
    return [template.replace("{c}", name) for name in class_names for template in templates]


def classifier(prompt_features: Tensor, templates: int) -> Tensor:
    """Prompt features [C·T, D] → class features [C, D]: normalise each, average, normalise again."""
    return normalize(normalize(prompt_features, dim=-1).unflatten(0, (-1, templates)).mean(1), dim=-1)


def classification(features: Features, scores: Scores) -> None:
    """The most similar class is the prediction: acc1, acc5, mean_per_class_recall.

    Where training frequencies are known also acc1_head, acc1_middle, acc1_tail, of the images of each third.
    """
    n, classes = len(features.images), len(features.classes)
    places = first_hit(features.images, features.classes, torch.arange(n), features.labels)
    for k in (1, 5):
        scores.add(f"acc{k}", recall_at(places, k), min(k, classes) / classes, n)
    scores.add("mean_per_class_recall", mean_per_class_recall(places, features.labels), 1 / classes, n)
    for i, name in enumerate(THIRDS if len(features.third) else ()):
        inside = places[features.third == i]
        scores.add(f"acc1_{name}", recall_at(inside, 1), 1 / classes, len(inside))


def retrieval(features: Features, scores: Scores) -> None:
    """recall@k of captions for images and of images for captions, and the mean over both ways and all k."""
    recalls, chances = [], []
    ways = {
        "image_to_text": (features.images, features.texts, features.image_of, features.text_of),
        "text_to_image": (features.texts, features.images, features.text_of, features.image_of),
    }
    for way, (queries, candidates, query_of, candidate_of) in ways.items():
        places = first_hit(queries, candidates, query_of, candidate_of)
        right_answers = torch.bincount(query_of, minlength=len(queries))
        for k in RECALL_KS:
            recalls.append(recall_at(places, k))
            chances.append(recall_chance(right_answers, len(candidates), k))
            scores.add(f"{way}_recall@{k}", recalls[-1], chances[-1], len(queries))
    trials = min(len(features.images), len(features.texts))
    scores.add("mean_recall", sum(recalls) / len(recalls), sum(chances) / len(chances), trials)


PROTOCOLS: dict[str, Callable[[Features, Scores], None]] = {
    "classification": classification,
    "retrieval": retrieval,
}
