"""Examples for the report: predictions, retrievals, extremes of τ. Chosen by a rule, never by hand.

The rule: images or captions are grouped by the set of runs that get them right. Each group shows members evenly spread
over the data. The model of a run is its last checkpoint.

Legend: n images, t distinct captions, C classes, D width; R runs.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from disttempnet.evaluation import TaskResult, embed_samples, evaluate
from disttempnet.evaluation.datasets.open import load_task
from disttempnet.evaluation.tasks import EvaluationSample, find_task
from disttempnet.report.accuracy_by_tau import AccuracyBin, accuracy_by_tau
from disttempnet.report.bins import evenly_spread
from disttempnet.report.items import training_pairs
from disttempnet.report.read import RunRecord
from disttempnet.training.checkpoint import Run, load_run
from disttempnet.training.run_folder import list_checkpoints

PICTURE_SIDE = 128  # pixels; shown at 64, sharp on high-density screens
TRAINING_PAIRS = 20_000  # embedded for the gallery of τ; evenly spread over larger data
SHOWN_ANSWERS = 5
GALLERY = 10


class Answer(NamedTuple):
    """A candidate of a ranking: a text or, in image retrieval, a picture (data URI) with its caption."""

    text: str
    picture: str
    similarity: float
    right: bool


class Ranking(NamedTuple):
    """The best answers of a run; `place` is the rank of the first right one (from 1), `average` the mean similarity."""

    answers: list[Answer]
    place: int
    right_answer: Answer
    average: float


class Query(NamedTuple):
    """A query (a picture or a text) and the ranking of each run."""

    text: str
    picture: str
    rankings: list[Ranking]


class QueryGroup(NamedTuple):
    """Queries that the same runs answer right: `size` of `total` queries, some of them shown."""

    right: tuple[bool, ...]
    size: int
    total: int
    queries: list[Query]


class TemperaturePair(NamedTuple):
    """A training pair and its two temperatures."""

    picture: str
    caption: str
    image_tau: float
    text_tau: float


@dataclass(frozen=True)
class Gallery:
    """The extremes of τ on the training set of one run.

    Attributes:
        extremes: (side, "lowest" or "highest") → pairs, the most extreme first.
        image_tau, text_tau: float [n] of all embedded pairs.
        total: size of the training set, of which n are embedded.
    """

    extremes: dict[tuple[str, str], list[TemperaturePair]]
    image_tau: np.ndarray
    text_tau: np.ndarray
    total: int


def open_model(record: RunRecord) -> Run | None:
    """Return the model of the last checkpoint, on a GPU if there is one; None before the first checkpoint."""
    checkpoints = list_checkpoints(record.folder)
    if not checkpoints:
        return None
    run = load_run(checkpoints[-1])
    run.towers.module.to(_device())
    run.loss.to(_device())
    return run


def evaluate_models(runs: Sequence[Run], tasks: Sequence[str], batch: int) -> list[dict[str, TaskResult]]:
    """Return the results of each run on the tasks, features included."""
    found = [evaluate(run.towers, tasks, device=_device(), batch=batch) for run in runs]
    return [{task: r for task, r in results.items() if isinstance(r, TaskResult)} for results in found]


def zero_shot_examples(results: Sequence[TaskResult], task: str, per_group: int) -> list[QueryGroup]:
    """Return images of a task with the classes that each run finds most similar."""
    images = _images_of(task, results[0])
    names = results[0].class_names
    truth = results[0].labels.cpu()

    def query(i: int, scores: Sequence[Tensor]) -> Query:
        rankings = [_ranking(row, {int(truth[i])}, lambda c: (names[c], "")) for row in scores]
        return Query(names[int(truth[i])], picture(images[i]), rankings)

    similarities = [(r.image_features @ r.class_features.T).cpu() for r in results]
    right = torch.stack([s.argmax(1) == truth for s in similarities], 1)
    return _groups(right, per_group, lambda i: query(i, [s[i] for s in similarities]))


def accuracy_bins(run: Run, result: TaskResult) -> dict[str, list[AccuracyBin]]:
    """Return zero-shot accuracy by τ of the images and of their captions: side → bins; empty where τ does not vary."""
    if not len(result.class_features):
        return {}
    tau = run.loss.temperatures(result.image_features, result.text_features, None)
    if tau is None:
        return {}
    similarities = result.image_features @ result.class_features.T
    right = (similarities.argmax(1) == result.labels.to(similarities.device)).cpu().numpy()
    found = {
        side: accuracy_by_tau(of_side, right)
        for side, of_side in zip(("image", "text"), tau.cpu().numpy(), strict=True)
    }
    return {side: bins for side, bins in found.items() if bins}


def retrieval_examples(results: Sequence[TaskResult], task: str, to_text: bool, per_group: int) -> list[QueryGroup]:
    """Return captions retrieved for images of a task (`to_text`), or images retrieved for captions.

    The first caption of an image represents it. Equal captions are one candidate that belongs to several images.
    """
    # t distinct captions, and which images have each
    images, captions = _images_of(task, results[0]), results[0].captions
    texts = list(dict.fromkeys(captions))
    text_of = {text: t for t, text in enumerate(texts)}
    images_of: list[set[int]] = [set() for _ in texts]
    for i, caption in enumerate(captions):
        images_of[text_of[caption]].add(i)

    # similarities [n, t] of each run: images × distinct captions
    first_image = [min(members) for members in images_of]
    similarities = [(r.image_features @ r.text_features[first_image].T).cpu() for r in results]

    def text(place: int) -> tuple[str, str]:
        return texts[place], ""

    def image(place: int) -> tuple[str, str]:
        return captions[place], picture(images[place])

    # queries and candidates in the asked direction
    asked, answered = (image, text) if to_text else (text, image)
    relevant = [{text_of[caption]} for caption in captions] if to_text else images_of
    if not to_text:
        similarities = [s.T for s in similarities]

    def query(q: int) -> Query:
        return Query(*asked(q), [_ranking(s[q], relevant[q], answered) for s in similarities])

    # right [queries, R]: whether the best candidate of a run is a right one
    top = [s.argmax(1).tolist() for s in similarities]
    right = torch.tensor([[best[q] in relevant[q] for best in top] for q in range(len(relevant))])
    return _groups(right, per_group, query)


def temperature_gallery(run: Run, batch: int) -> Gallery | None:
    """Return the training pairs of lowest and highest τ; None where all τ are equal.

    Raises:
        UserError: the training data are missing or have changed.
    """
    # τ [n] of each side, over an even choice of the training pairs
    pairs = training_pairs(run)
    samples = pairs.read(evenly_spread(len(pairs), TRAINING_PAIRS))
    images, texts, kept = embed_samples(run.towers, samples, device=_device(), batch=batch)
    tau = run.loss.temperatures(images, texts, torch.tensor([item.id for item in kept], device=_device()))
    if tau is None:
        return None
    image_tau, text_tau = tau.double().cpu().numpy()
    if max(np.ptp(image_tau), np.ptp(text_tau)) < 1e-6:
        return None
    # the GALLERY lowest and highest of each side
    extremes = {}
    for side, tau in (("image", image_tau), ("text", text_tau)):
        order = np.argsort(tau, kind="stable")
        for end, chosen in (("lowest", order[:GALLERY]), ("highest", order[::-1][:GALLERY])):
            extremes[side, end] = [
                TemperaturePair(picture(kept[i]), kept[i].captions[0], float(image_tau[i]), float(text_tau[i]))
                for i in chosen
            ]
    return Gallery(extremes, image_tau, text_tau, len(pairs))


@lru_cache(maxsize=4096)
def picture(sample: EvaluationSample, side: int = PICTURE_SIDE) -> str:
    """Return the image of a sample as a WebP of at most `side` pixels in a data URI."""
    image = sample.image()
    image.thumbnail((side, side))
    buffer = io.BytesIO()
    image.save(buffer, "WEBP", quality=90)
    return "data:image/webp;base64," + base64.b64encode(buffer.getvalue()).decode()


def _images_of(task: str, result: TaskResult) -> list[EvaluationSample]:
    by_key = {sample.key: sample for sample in load_task(find_task(task)).samples}
    return [by_key[key] for key in result.keys]


def _ranking(scores: Tensor, right: set[int], show: Callable[[int], tuple[str, str]]) -> Ranking:
    order = torch.argsort(scores, descending=True, stable=True).tolist()
    place = next(place for place, candidate in enumerate(order) if candidate in right)

    def answer(candidate: int) -> Answer:
        return Answer(*show(candidate), float(scores[candidate]), candidate in right)

    shown = [answer(c) for c in order[:SHOWN_ANSWERS]]
    return Ranking(shown, place + 1, answer(order[place]), float(scores.mean()))


def _groups(right: Tensor, per_group: int, query: Callable[[int], Query]) -> list[QueryGroup]:
    """Return a group for each row pattern of right [queries, R], those that most runs get right first."""
    patterns: dict[tuple[bool, ...], list[int]] = {}
    for i, row in enumerate(right.tolist()):
        patterns.setdefault(tuple(row), []).append(i)
    groups = []
    for pattern in sorted(patterns, key=lambda p: (-sum(p), [not hit for hit in p])):
        members = patterns[pattern]
        # middles of equal parts: neither the first nor the last member is special
        parts = min(per_group, len(members))
        chosen = [members[(2 * k + 1) * len(members) // (2 * parts)] for k in range(parts)]
        groups.append(QueryGroup(pattern, len(members), len(right), [query(i) for i in chosen]))
    return groups


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
