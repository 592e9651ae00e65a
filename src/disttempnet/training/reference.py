"""The reference model of a run: embeddings of each batch's pairs, computed as it passes or read from disk."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from disttempnet.config import Config
from disttempnet.data import Batch, TrainingData
from disttempnet.data.loader import chosen_caption
from disttempnet.errors import UserError
from disttempnet.features.reference import ReferenceStores, reference_stores
from disttempnet.losses import GlobalContrastiveLoss, Objective
from disttempnet.models import Towers, encode_images, encode_texts, is_random, load_model
from disttempnet.models.text import trimming
from disttempnet.models.trunk import tokenizer_digest
from disttempnet.training.model import autocast_to
from disttempnet.training.run_folder import weights_folder

Embedded = tuple[Tensor, Tensor]  # image and text embeddings [b, R]
Reference = Callable[[Batch, int], Embedded]  # of this rank's rows, in an epoch


def refuse_reference(config: Config, loss: Objective) -> None:
    """Raise UserError unless a run has a reference model if and only if its objective takes one."""
    wanted = isinstance(loss, GlobalContrastiveLoss) and loss.referenced
    given = config.reference
    if wanted and not given.model:
        raise UserError(
            f"objective {config.loss.name} is steered by a reference model: set reference.model and "
            "reference.pretrained, as model.name and model.pretrained"
        )
    if given.model and not wanted:
        raise UserError(
            f"reference.model: objective {config.loss.name} takes no reference model: leave the section out, or take "
            "loss.name = drrho"
        )
    if given.model and is_random(given.model, given.pretrained):
        raise UserError("reference.pretrained: a reference needs weights: an open_clip tag, a checkpoint or run folder")
    if given.model and config.cached_sides and not given.cached:
        raise UserError("train.cache_features leaves a live reference nothing to see: set reference.cached = true")


def open_reference(
    config: Config, data: TrainingData, towers: Towers, device: torch.device, autocast: torch.dtype | None
) -> Reference:
    """Load the reference model of a run, and return what embeds its batches; every rank calls this.

    Args:
        config: of the run.
        data: its training data.
        towers: that are trained; a live reference sees their pixels and tokens.
        device: of this rank.
        autocast: dtype of the arithmetic; None = that of the weights.

    Raises:
        UserError: weights that cannot be loaded, or a live reference that reads other pixels or tokens.
    """
    given = config.reference
    with torch.random.fork_rng(devices=[]):  # a resumed run has its random state by now
        reference = load_model(given.model, weights_folder(given.pretrained))
    reference.module.eval().requires_grad_(False).to(device)
    if given.cached:
        stores = reference_stores(config, data.source, reference, device, autocast)
        return partial(_read, stores, config.train.seed)
    _refuse_other_inputs(reference, towers)
    return partial(_embed, reference, config.train.accumulate, autocast)


def _refuse_other_inputs(reference: Towers, towers: Towers) -> None:
    """Raise UserError where a live reference cannot take the batches of the towers."""
    advice = "set reference.cached = true, or take a model with the same input"
    if reference.image_size != towers.image_size:
        raise UserError(
            f"reference.model: takes images of {reference.image_size} pixels, the batches have {towers.image_size}: "
            f"{advice}"
        )
    if tokenizer_digest(reference.tokenizer) != tokenizer_digest(towers.tokenizer):
        raise UserError(f"reference.model: has another tokenizer than model.name: {advice}")


@torch.no_grad()
def _embed(reference: Towers, chunks: int, autocast: torch.dtype | None, batch: Batch, epoch: int) -> Embedded:
    """Embed a batch as it is augmented, in as many chunks as the towers do."""
    tokens = batch.tokens
    whole = getattr(reference.tokenizer, "context_length", None)
    if trimming(reference.module) is None and whole is not None:  # a batch may be trimmed for the towers
        tokens = F.pad(tokens, (0, max(0, whole - tokens.shape[1])))
    parts = zip(batch.images.tensor_split(chunks), tokens.tensor_split(chunks), strict=True)
    with autocast_to(autocast, batch.images):
        embedded = [(encode_images(reference, image), encode_texts(reference, text)) for image, text in parts]
    images, texts = zip(*embedded, strict=True)
    return torch.cat(images), torch.cat(texts)


def _read(stores: ReferenceStores, seed: int, batch: Batch, epoch: int) -> Embedded:
    """Read the embeddings of a batch's images, and of the captions that the epoch reads."""
    ids = batch.ids.cpu().numpy()
    for store in stores:
        if not store.unreadable.keys().isdisjoint(ids.tolist()):
            sample = next(sample for sample in ids.tolist() if sample in store.unreadable)
            raise UserError(
                f"{store.folder}: sample {sample} had no features when the reference was embedded "
                f"({store.unreadable[sample]}), and is read now: remove the folder, and it is embedded anew"
            )
    image = stores.image.read(ids)
    text = stores.text.read(ids, partial(chosen_caption, seed, epoch))
    device = batch.ids.device
    return image.to(device, non_blocking=True), text.to(device, non_blocking=True)
