"""Gradient of a step: of all rows of a rank at once, or in chunks with the same result.

A contrastive loss compares all rows with each other, so plain accumulation over small batches is another objective.
Chunks keep the batch (gradient caching, arXiv 2101.06983):

    1  embed every chunk without a graph
    2  compute the objective once on all embeddings: its value, per-sample state, the gradients of its own parameters
       and of every embedding
    3  embed every chunk again, with its graph and the same random numbers, and backpropagate its embeddings' gradient

Memory is that of one chunk's graph; the price is a second forward pass of the towers. The embedding of a row must not
depend on other rows (no BatchNorm with the batch's statistics).
"""

from __future__ import annotations

from contextlib import nullcontext

import torch
from torch import Tensor

from disttempnet import distributed
from disttempnet.losses import LossOutput
from disttempnet.training.model import ContrastiveModel

RandomState = tuple[Tensor, Tensor | None]


class WholeBatch:
    """The gradient of this rank's rows in one pass; called with images, tokens, ids, and a reference's embeddings.

    Args:
        model: encoder and objective.
        device: of this rank.
        half: exchange the towers' gradients in bf16.
    """

    def __init__(self, model: ContrastiveModel, device: torch.device, half: bool = False) -> None:
        # DDP or FSDP2 averages the towers' gradients; the objective averages its own
        self.model = ContrastiveModel(distributed.data_parallel(model.encoder, device, half), model.contrast)

    def __call__(
        self, images: Tensor, tokens: Tensor, ids: Tensor, reference: tuple[Tensor, Tensor] | None = None
    ) -> LossOutput:
        output: LossOutput = self.model(images, tokens, ids, reference)
        if output.total.requires_grad:  # not with frozen towers and per-sample τ: the objective has updated its table
            output.total.backward()
        return output


class InChunks:
    """The same gradient, with the graph of one chunk at a time.

    Args:
        model: encoder and objective.
        device: of this rank.
        chunks: how many, of equal size up to one row.
        half: exchange the towers' gradients in bf16.
    """

    def __init__(self, model: ContrastiveModel, device: torch.device, chunks: int, half: bool = False) -> None:
        self.model, self.device, self.chunks = model, device, chunks
        # the objective averages its own gradients
        self.encoder = distributed.data_parallel(model.encoder, device, half)

    def __call__(
        self, images: Tensor, tokens: Tensor, ids: Tensor, reference: tuple[Tensor, Tensor] | None = None
    ) -> LossOutput:
        # Embed every chunk without a graph, and remember the random state at its start.
        parts = list(zip(images.tensor_split(self.chunks), tokens.tensor_split(self.chunks), strict=True))
        starts: list[RandomState] = []
        embeddings = []
        with torch.no_grad():
            for part in parts:
                starts.append(_random_state(self.device))
                embeddings.append(self.model.encoder(*part))

        # The objective on all embeddings [b, D]: its value, and the gradient of every embedding.
        trained = any(p.requires_grad for p in self.model.encoder.parameters())
        image, text = (torch.cat(side).requires_grad_(trained) for side in zip(*embeddings, strict=True))
        output: LossOutput = self.model.contrast(image, text, ids, reference)
        if output.total.requires_grad:
            output.total.backward()

        # Embed every chunk again, and backpropagate into the towers.
        if trained:
            self._backpropagate(parts, starts, image.grad, text.grad)
        return output

    def _backpropagate(
        self,
        parts: list[tuple[Tensor, Tensor]],
        starts: list[RandomState],
        image_gradient: Tensor | None,
        text_gradient: Tensor | None,
    ) -> None:
        """Embed every chunk again and backpropagate its gradient; the last chunk averages over ranks.

        Sharded towers average in every chunk: otherwise a rank would hold the full gradient.
        """
        assert image_gradient is not None
        assert text_gradient is not None
        gradients = zip(image_gradient.tensor_split(self.chunks), text_gradient.tensor_split(self.chunks), strict=True)
        with torch.random.fork_rng([self.device] if self.device.type == "cuda" else []):
            for number, (part, start, wanted) in enumerate(zip(parts, starts, gradients, strict=True), 1):
                _set_random_state(start, self.device)
                with nullcontext() if number == len(parts) else distributed.without_exchange(self.encoder):
                    sides = zip(self.encoder(*part), wanted, strict=True)
                    learned = [(side, gradient) for side, gradient in sides if side.requires_grad]  # not a locked one
                    torch.autograd.backward([side for side, _ in learned], [gradient for _, gradient in learned])


def _random_state(device: torch.device) -> RandomState:
    return torch.get_rng_state(), torch.cuda.get_rng_state(device) if device.type == "cuda" else None


def _set_random_state(state: RandomState, device: torch.device) -> None:
    torch.set_rng_state(state[0])
    if state[1] is not None:
        torch.cuda.set_rng_state(state[1], device)
