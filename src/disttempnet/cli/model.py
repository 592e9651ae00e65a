"""A model that a command takes: what names it, and its towers. Heavy imports wait until they are needed."""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import TYPE_CHECKING

from disttempnet.errors import UserError
from disttempnet.terminal import say

if TYPE_CHECKING:
    from disttempnet.evaluation.command import OpenedModel

TARGETS = (
    "a run folder, a checkpoint folder, NAME/TAG (ViT-B-32/openai), open_clip:NAME/FILE, a folder with an "
    "open_clip_config.json or of transformers' CLIPModel, hf-hub:ORG/NAME"
)


def add_resize_positions(parser: argparse.ArgumentParser) -> None:
    """Add the flag that accepts weights of another image size."""
    parser.add_argument(
        "--resize-positions",
        action="store_true",
        help="load weights of another image size: interpolate their position embeddings",
    )


def open_target(target: str, resize_positions: bool, random: bool = True) -> OpenedModel:
    """Return the towers of a run, a checkpoint or a model by name, with what is known of them.

    Args:
        target: one of `TARGETS`.
        resize_positions: accept weights of another image size.
        random: accept an architecture without weights, and say so in the notes.

    Raises:
        UserError: an unknown target, weights that cannot be used, or none where `random` is False.
    """
    from disttempnet.models import read_target

    if named := read_target(target, random):
        return _open_named(target, *named, resize_positions)
    if resize_positions:
        raise UserError(
            "--resize-positions is for named weights: the towers of a run have the image size of its config"
        )
    from disttempnet.evaluation.command import OpenedModel
    from disttempnet.losses import OBJECTIVES
    from disttempnet.training.checkpoint import load_run
    from disttempnet.training.run_info import process_provenance

    run = load_run(target)
    spec = OBJECTIVES[run.config.loss.name]
    title = f"{run.config.name} @ step {run.step}"
    return OpenedModel(
        towers=run.towers,
        title=title,
        model=run.config.model.name,
        pretrained=title,
        folder=run.folder,
        name=f"step-{run.step:08d}",
        config=run.config,
        loss=run.loss,
        objective={"name": run.config.loss.name, "title": spec.title, "formula": spec.formula},
        step=run.step,
        versions=process_provenance()["versions"],
        notes=run.towers.notes,
    )


def _open_named(target: str, model: str, pretrained: str, resize_positions: bool) -> OpenedModel:
    """Return towers that were not trained by a run."""
    import torch

    from disttempnet.distributed import is_main
    from disttempnet.distributed.launcher import launched
    from disttempnet.evaluation.command import OpenedModel
    from disttempnet.models import is_random, load_model
    from disttempnet.models.origin import FOLDER
    from disttempnet.training.run_info import process_provenance

    torch.manual_seed(0)  # random towers are the same every time
    towers = load_model(model, pretrained, resize_positions=resize_positions)
    launch = launched()
    first = is_main() and (launch is None or launch.rank == 0)  # the group may not be there yet
    for line in towers.weights if first and not model.startswith(FOLDER) else ():  # a named folder is where they are
        say(line, error=True)
    notes = (*towers.notes, *((f"random weights: {target} names none",) if is_random(model, pretrained) else ()))
    name = re.sub(r"[^A-Za-z0-9._]+", "-", f"{model}-{pretrained}").strip("-")
    versions = process_provenance()["versions"]
    return OpenedModel(towers, target, model, pretrained, Path(), name, versions=versions, notes=notes)
