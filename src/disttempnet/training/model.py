"""Towers and objective as one module, and the objective that a config describes."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from disttempnet.config import Config, LossConfig, out_of_bounds
from disttempnet.errors import UserError, unknown_name
from disttempnet.losses import (
    OBJECTIVES,
    Features,
    LossOutput,
    Objective,
    build_loss,
    has_normalisers,
    rebuild_loss,
    with_later_arguments,
)
from disttempnet.models import Towers, encode_images, encode_texts, is_random
from disttempnet.models.trunk import TOWER_SIDES, Trunk
from disttempnet.training.optim import refuse_unusable


class DualEncoder(nn.Module):
    """Both towers: uint8 images [b, 3, s, s] and tokens [b, L] → embeddings of any norm, each [b, D].

    Frozen towers record no graph.
    """

    def __init__(self, towers: Towers, autocast: torch.dtype | None, frozen: bool = False) -> None:
        super().__init__()
        self.module, self.autocast, self.frozen = towers.module, autocast, frozen
        self._towers = towers

    def forward(self, images: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        with autocast_to(self.autocast, images), torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen):
            image = encode_images(self._towers, images, normalize=False)
            return image, encode_texts(self._towers, tokens, normalize=False)


class CachedEncoder(nn.Module):
    """Towers of which locked trunks have run already: features [b, F] in place of what a trunk takes → embeddings.

    Args:
        towers: both.
        trunks: side → the trunk whose features are given; the other side is run in full.
        autocast: as of `DualEncoder`.
    """

    def __init__(self, towers: Towers, trunks: Mapping[str, Trunk], autocast: torch.dtype | None) -> None:
        super().__init__()
        self.autocast, self._towers = autocast, towers
        self.heads = nn.ModuleDict({side: trunk.head for side, trunk in trunks.items()})
        # only what is run is a part of this module: data parallel watches over no trunk
        self.module = None if len(trunks) == len(TOWER_SIDES) else towers.module

    def forward(self, images: Tensor, texts: Tensor) -> tuple[Tensor, Tensor]:
        with autocast_to(self.autocast, images):
            return self._side("image", images, encode_images), self._side("text", texts, encode_texts)

    def _side(self, side: str, inputs: Tensor, encode: Callable[..., Tensor]) -> Tensor:
        if side in self.heads:
            embeddings: Tensor = self.heads[side](inputs)
            return embeddings
        return encode(self._towers, inputs, normalize=False)


class Contrast(nn.Module):
    """The objective on embeddings [b, D] of any norm and ids [b], and on embeddings [b, R] of a reference model."""

    def __init__(self, loss: Objective, autocast: torch.dtype | None) -> None:
        super().__init__()
        self.loss, self.autocast = loss, autocast

    def forward(
        self, image: Tensor, text: Tensor, ids: Tensor, reference: tuple[Tensor, Tensor] | None = None
    ) -> LossOutput:
        with autocast_to(self.autocast, image):  # the objective switches it off, but reads the precision from it
            output: LossOutput = self.loss(Features.of(image, text, reference), ids)
        return output


class ContrastiveModel(nn.Module):
    """Towers and objective as one module: uint8 images [b, 3, s, s], tokens [b, L], ids [b] → LossOutput."""

    def __init__(self, encoder: nn.Module, contrast: nn.Module) -> None:
        super().__init__()
        self.encoder, self.contrast = encoder, contrast

    def forward(
        self, images: Tensor, tokens: Tensor, ids: Tensor, reference: tuple[Tensor, Tensor] | None = None
    ) -> LossOutput:
        output: LossOutput = self.contrast(*self.encoder(images, tokens), ids, reference)
        return output


def autocast_to(dtype: torch.dtype | None, like: Tensor) -> torch.autocast:
    """Autocast on the device of `like`; off where dtype is None."""
    return torch.autocast(like.device.type, dtype=dtype, enabled=dtype is not None)


def build_objective(config: Config, num_samples: int, embed_dim: int, bounds: bool = True) -> Objective:
    """Build the objective that `[loss]` describes.

    Args:
        config: of the run.
        num_samples: N of the source, the rows of its per-sample state.
        embed_dim: D, width of the features.
        bounds: refuse numbers outside their ranges. False for a run of an older version that allowed more.

    Raises:
        UserError: an unknown name or argument, or a value out of range.
    """
    row = OBJECTIVES.get(config.loss.name)
    try:
        for name in config.loss.arguments:  # build_loss has others, which are the run's
            if row is not None and name not in row.arguments:
                raise ValueError(unknown_name(f"argument of objective {config.loss.name}:", name, row.arguments))
        sizes: dict[str, Any] = {"num_samples": num_samples, "embed_dim": embed_dim, "seed": config.train.seed}
        sizes |= {"shard_state": True, "ring": config.train.ring}
        if bounds:
            return build_loss(config.loss.name, **sizes, **config.loss.arguments)
        return rebuild_loss(config.loss.name, **sizes, arguments=config.loss.arguments)
    except ValueError as error:
        raise UserError(f"[loss] {error}") from None


def resolved(config: Config, bounds: bool = True) -> Config:
    """Return the config with every argument of its objective filled in: defaults may change, a run's config must not.

    The name of its optimizer is checked too, before anything is read.

    Args:
        config: as read from a file.
        bounds: as for `build_objective`.

    Raises:
        UserError: an unknown objective, argument or optimizer, or a value out of range.
    """
    build_objective(config, 1, 8, bounds)
    refuse_unusable(config.optim, config.train.shard)
    arguments = {**OBJECTIVES[config.loss.name].arguments, **config.loss.arguments}
    return config.model_copy(update={"loss": LossConfig(name=config.loss.name, **arguments)})


def as_trained(config: Config) -> Config:
    """Return the resolved config of a saved run with the arguments that its version had no name for."""
    arguments = with_later_arguments(config.loss.name, config.loss.arguments, config.data.global_batch)
    return config.model_copy(update={"loss": LossConfig(name=config.loss.name, **arguments)})


def continued(config: Config, saved: Config) -> Config:
    """Return the config of a resumed run, with the defaults of the version that it began with.

    Args:
        config: as read from a file; arguments of its objective may be left out.
        saved: resolved, of the run, as it was saved.
    """
    trained = as_trained(saved)
    if trained == saved or saved.loss.name != config.loss.name:
        return config
    arguments = {**trained.loss.arguments, **config.loss.arguments}
    return config.model_copy(update={"loss": LossConfig(name=config.loss.name, **arguments)})


def values_out_of_bounds(config: Config) -> dict[str, str]:
    """Return dotted key or section → the fault of its value, as `config.out_of_bounds` does, and with [loss] too."""
    faults = out_of_bounds(config)
    try:
        build_objective(config, 1, 8)
    except UserError as error:
        faults["loss"] = str(error)
    return faults


def refuse_if_nothing_is_trained(config: Config, towers: nn.Module, loss: Objective) -> None:
    """Raise UserError if frozen towers would be random, or if locks leave nothing to train.

    Args:
        config: of the run.
        towers: the module, with its locks set.
        loss: the objective; its samples may be fewer than the run's.
    """
    frozen = config.train.freeze == "towers"
    if frozen and is_random(config.model.name, config.model.pretrained):
        raise UserError(
            'train.freeze = "towers" needs trained towers: set model.pretrained to an open_clip tag, a checkpoint '
            "folder or a run folder"
        )
    if config.train.ema and not any(p.requires_grad for p in towers.parameters()):
        raise UserError("train.ema averages the towers' weights, and none of them is trained: leave it out")
    if any(p.requires_grad for part in (towers, loss) for p in part.parameters()):
        return
    if loss.tracked_temperatures() is None:
        locks = 'train.freeze = "towers" leaves' if frozen else "model.lock_image and model.lock_text leave"
        one = "take one" if frozen else f"{config.model.name} has no head to train: unlock a tower, or take one"
        raise UserError(
            f"{locks} nothing to train: objective {config.loss.name} learns no temperature; {one} that does, such as "
            "disttempnet-v1 (network), fastclip-v3 (global τ) or isogclr (per-sample τ)"
        )


def refuse_if_no_normaliser(config: Config, loss: Objective) -> None:
    """Raise UserError if eval.normaliser_samples asks for the error of normalisers that the objective does not have."""
    if config.eval.normaliser_samples and not has_normalisers(loss):
        raise UserError(
            f"eval.normaliser_samples: objective {config.loss.name} has no normaliser that leaves the pair out: take "
            "another objective of the family, such as sogclr, or leave the key out"
        )


def compile_towers(towers: Towers) -> None:
    """Apply torch.compile to both towers, in place. The objective stays eager: its products are library calls."""
    module = towers.module
    module.visual.compile()
    (module.text if hasattr(module, "text") else module.transformer).compile()


def refuse_without_compiler(device: torch.device) -> None:
    """Raise UserError if torch.compile will find no compiler: PyTorch's runtime images have none.

    A GPU needs a C compiler (Triton), a CPU a C++ compiler.
    """
    variable, known = ("CC", ("gcc", "clang")) if device.type == "cuda" else ("CXX", ("g++", "clang++"))
    chosen = os.environ.get(variable)
    if not any(map(shutil.which, (chosen,) if chosen else known)):
        what = f"{variable}={chosen} does not exist" if chosen else f"there is neither {known[0]} nor {known[1]}"
        raise UserError(f"train.compile needs a compiler, and {what}: install one, or leave train.compile out")


@contextmanager
def compile_failure_named(recomputes: bool = False) -> Iterator[None]:
    """Turn a failure of torch.compile, whose own report has a hundred lines, into a UserError of one line.

    Args:
        recomputes: train.checkpoint_activations is on, which not every tower can be compiled with.
    """
    try:
        yield
    except RuntimeError as error:
        if type(error).__name__ not in ("BackendCompilerFailed", "InductorError"):
            raise
        lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
        what = next((line for line in lines if "error:" in line), lines[0])[:300]
        if recomputes:
            raise UserError(
                f"train.compile failed, with train.checkpoint_activations: {what}: leave one of them out"
            ) from None
        raise UserError(f"train.compile failed: {what}: fix the compiler, or leave train.compile out") from None
