"""One pass over a task's images, on one process or many, and its scores; nothing is random.

Of images that are classified, the predicted class and the place of the true one are kept. Of images that are compared
with texts of their own, the features are kept.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from disttempnet import distributed
from disttempnet.errors import UserError
from disttempnet.evaluation.class_features import ClassFeatures
from disttempnet.evaluation.encoder import FeatureEncoder, ProgressCallback, batches_of_this_rank
from disttempnet.evaluation.loader import ImageBatch
from disttempnet.evaluation.metrics import Prediction, predict
from disttempnet.evaluation.protocols import FREQUENCY_THIRDS, PROTOCOLS, Measured, TaskFeatures, cue_prompt
from disttempnet.evaluation.scores import Scores
from disttempnet.evaluation.tasks import Puzzle, TaskData


@dataclass(frozen=True)
class ScoredTask:
    """Scores of a task, and what they were computed from.

    Attributes:
        measured: input of the protocols.
        scores: the metrics; `corrupt` names the images that could not be decoded.
        kept: places in the task's samples of those that could be decoded.
        reasons: for each of the others, why not.
    """

    measured: Measured
    scores: Scores
    kept: list[int]
    reasons: tuple[str, ...]


def task_texts(data: TaskData) -> list[str]:
    """Return the texts that a task's images are compared with, each once: captions, and prompts of cues."""
    if data.puzzles:
        return list(dict.fromkeys(cue_prompt(puzzle.cue) for puzzle in data.puzzles))
    return list(dict.fromkeys(caption for sample in data.samples for caption in sample.captions))


def embed_task_texts(
    data: TaskData, encoder: FeatureEncoder, known: ClassFeatures, progress: ProgressCallback | None = None
) -> tuple[list[Tensor], Tensor]:
    """Return all that a task says in words: class features [C, D] of each head, and features [t, D] of `task_texts`.

    A caption that is also a prompt of a class is embedded once.
    """
    texts = task_texts(data)
    found: dict[str, Tensor | None] = dict.fromkeys(texts)
    heads = [known.features(head, encoder, progress, found) for head in data.heads]
    rest = [text for text, row in found.items() if row is None]
    table = distributed.all_sum(distributed.together(lambda: encoder.texts(rest, progress)))
    if len(rest) == len(texts):
        return heads, table
    found |= dict(zip(rest, table, strict=True))
    return heads, torch.stack([row for row in found.values() if row is not None])


def score_task(
    data: TaskData,
    encoder: FeatureEncoder,
    batches: Iterable[ImageBatch],
    heads: Sequence[Tensor],
    words: Tensor,
    progress: ProgressCallback | None = None,
) -> ScoredTask:
    """Score a task in one pass over its images.

    Every rank calls this with its own batches and gets the same.

    Args:
        data: the task.
        encoder: with its module in evaluation mode.
        batches: this rank's.
        heads: a classifier [C, D] for each of the task's.
        words: features of `task_texts`, in their order.

    Raises:
        UserError: no readable image, features that are not finite.
    """
    # Tables over the n samples, filled by all ranks: state, first class and place of the true one of each head [2, n],
    # and features [n, D] of tasks that compare images with texts of their own.
    n, name = len(data.samples), data.task.name
    matching = any(PROTOCOLS[protocol].matching for protocol in data.task.protocols)
    labels = torch.tensor(data.labels or [0] * n, dtype=torch.int64, device=encoder.device)
    seen = torch.zeros(n, dtype=torch.int64, device=encoder.device)  # 1 = scored, 2 = unreadable
    places = torch.zeros(len(heads), 2, n, dtype=torch.int64, device=encoder.device)
    features = torch.zeros(n if matching else 0, encoder.width, device=encoder.device)

    def one_pass() -> list[tuple[int, str]]:
        """Fill this rank's rows; return place and reason of unreadable samples."""
        mine, unreadable = len(batches_of_this_rank(n, encoder.batch)), []
        for number, batch in enumerate((batch for batch in batches if len(batch.valid)), 1):
            images, rows = encoder.images(batch.pixels), batch.rows
            if not images.isfinite().all():
                raise UserError(f"task '{name}': the towers give features that are not finite")
            seen[rows] = torch.where(batch.valid.to(encoder.device), 1, 2)
            for head, place in zip(heads, places, strict=True):
                place[:, rows] = torch.stack(predict(images, head, labels[rows]))
            if matching:
                features[rows] = images
            bad = (~batch.valid).nonzero().flatten().tolist()
            unreadable += [(batch.start + i, reason) for i, reason in zip(bad, batch.errors, strict=True)]
            if progress:
                progress(name, number, mine)
        return unreadable

    # The sums over ranks are the complete tables.
    unreadable = sorted(chain.from_iterable(distributed.gather_objects(distributed.together(one_pass))))
    seen, places = distributed.all_sum(seen), distributed.all_sum(places)
    if matching:
        features = distributed.all_sum(features)
    # Nothing can be scored without a readable image, or with features that are not finite.
    if not (seen == 1).any():
        first = next(iter(data.broken), "") or next((f"{data.samples[i].key}: {why}" for i, why in unreadable), "")
        raise UserError(f"task '{name}': none of its {n + len(data.broken)} samples can be read; {first or 'no data'}")
    if not words.isfinite().all() or not all(head.isfinite().all() for head in heads):
        raise UserError(f"task '{name}': the towers give features that are not finite")
    # Protocols score what could be read.
    kept = (seen == 1).nonzero().flatten()
    measured = _measured(data, kept, labels, places, features, words, [head.shape[0] for head in heads])
    if data.puzzles and not measured.puzzles:
        raise UserError(f"task '{name}': none of its puzzles has all its images")
    scores = Scores(samples=len(measured.puzzles) if data.puzzles else len(kept))
    scores.corrupt = tuple(data.samples[i].key for i, _ in unreadable)
    for protocol in data.task.protocols:
        PROTOCOLS[protocol].score(measured, scores)
    return ScoredTask(measured, scores, kept.tolist(), tuple(reason for _, reason in unreadable))


def score_predictions(data: TaskData, kept: Tensor, prediction: Prediction, classes: int) -> Scores:
    """Score the predictions of a classifier that is not made of words.

    Args:
        data: the task.
        kept: places in its samples of those that are predicted [k], ascending.
        prediction: of these.
        classes: number of classes.
    """
    labels = torch.tensor(data.labels, dtype=torch.int64, device=kept.device)
    measured = Measured(
        predictions=(prediction,),
        labels=labels[kept],
        classes=classes,
        metadata={name: data.metadata[kept.cpu().numpy(), i] for i, name in enumerate(data.task.metadata)},
    )
    scores = Scores(samples=len(kept))
    for protocol in data.task.protocols:
        PROTOCOLS[protocol].score(measured, scores)
    return scores


def _measured(
    data: TaskData, kept: Tensor, labels: Tensor, places: Tensor, features: Tensor, words: Tensor, classes: list[int]
) -> Measured:
    """Return the input of protocols, of the readable images only."""
    on_host = kept.cpu().numpy()
    third = values_of_kept(data.third, kept)
    lost = [name for i, name in enumerate(FREQUENCY_THIRDS) if data.third and not (third == i).any()]
    if lost:
        raise UserError(
            f"task '{data.task.name}': none of its readable images is in the {lost[0]} by training frequency"
        )
    return Measured(
        predictions=tuple(Prediction(first[kept], place[kept]) for first, place in places),
        labels=labels[kept],
        classes=classes[0] if classes else 0,
        metadata={name: data.metadata[on_host, i] for i, name in enumerate(data.task.metadata)},
        third=third,
        **_matching(data, on_host.tolist(), features[kept], words) if len(features) else {},
    )


def _matching(data: TaskData, kept: list[int], images: Tensor, words: Tensor) -> dict[str, Any]:
    """Return features of the readable images and of the texts that belong to them, and `puzzles` if there are any."""
    row = {text: i for i, text in enumerate(task_texts(data))}
    if data.puzzles:
        place = {old: new for new, old in enumerate(kept)}
        puzzles = [p for p in data.puzzles if all(candidate in place for candidate in p.candidates)]
        cues = words[[row[cue_prompt(puzzle.cue)] for puzzle in puzzles]]
        moved = tuple(Puzzle(p.cue, tuple(place[c] for c in p.candidates), p.right) for p in puzzles)
        none = torch.zeros(0, dtype=torch.int64)
        return {"features": TaskFeatures(images, cues, none, none), "puzzles": moved}
    captions = [data.samples[i].captions for i in kept]
    if "caption_retrieval" in data.task.protocols:  # of equal captions each is a text of its own
        texts = [text for own in captions for text in own]
        text_of = list(range(len(texts)))
        image_of = [i for i, own in enumerate(captions) for _ in own]
    else:
        texts = list(dict.fromkeys(text for own in captions for text in own))
        number = {text: i for i, text in enumerate(texts)}
        pairs = [(i, number[text]) for i, own in enumerate(captions) for text in dict.fromkeys(own)]
        image_of, text_of = [i for i, _ in pairs], [t for _, t in pairs]
    features = words[[row[text] for text in texts]]
    return {"features": TaskFeatures(images, features, torch.tensor(image_of), torch.tensor(text_of))}


def values_of_kept(values: Sequence[int], kept: Tensor) -> Tensor:
    """Return the readable images' values as int64, on the device of `kept`; of no values, none."""
    every = torch.tensor(values, dtype=torch.int64, device=kept.device)
    return every[kept] if len(values) else every
