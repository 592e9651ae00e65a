"""Emoji with captions and sample ids, two small towers, zero-shot accuracy: what the examples share.

Put your own data set and model in its place. A loop needs `ids` of the first and embeddings of the second.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from disttempnet import encode_images, encode_texts, load_model
from disttempnet.config import SourceConfig
from disttempnet.data import decode, eval_transform, open_source
from disttempnet.evaluation import evaluate

BATCH = 128  # samples of a step, over all processes
MODEL = "demo-vit-32"


def arguments(about: str | None, epochs: int = 6, pairs: bool = True) -> argparse.ArgumentParser:
    """Return the flags that examples have in common."""
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=epochs)
    parser.add_argument("--samples", type=int, default=None, help="the first so many samples (default: all 5,453)")
    if pairs:
        parser.add_argument("--objective", default="disttempnet-v1", help="a name of `disttempnet objectives`")
        parser.add_argument("--out", type=Path, default=Path("runs/examples"), help="folder of checkpoints")
        parser.add_argument("--resume", action="store_true", help="go on from the checkpoint in --out")
    return parser


class Emoji(Dataset):
    """Images uint8 [3, 32, 32], tokens int64 [20], and the id of the sample: its place in the data set.

    The loss keeps a few numbers for every id. So an id is the same in every epoch and on every process; the place in a
    batch is none.
    """

    def __init__(self, samples: int | None = None) -> None:
        towers, source = load_model(MODEL), open_source([SourceConfig(path="embedded:emoji/train")])
        ids, resize = source.usable[:samples].tolist(), eval_transform(towers.image_size)
        self.images = torch.stack([resize(decode(source.image_bytes(i))) for i in ids])
        self.tokens = towers.tokenizer([source.captions(i)[0] for i in ids])

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, i: int) -> dict[str, Tensor | int]:
        return {"images": self.images[i], "tokens": self.tokens[i], "ids": i}


class TwoTowers(nn.Module):
    """Images and tokens → embeddings of both, [b, D] each."""

    def __init__(self) -> None:
        super().__init__()
        self.towers = load_model(MODEL)
        self.both, self.embed_dim = self.towers.module, self.towers.embed_dim
        self.both.logit_scale.requires_grad_(False)  # the temperature is the loss's; DDP waits for every gradient

    def forward(self, images: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        return encode_images(self.towers, images, normalize=False), encode_texts(self.towers, tokens, normalize=False)


def epoch_line(epoch: int, mean_loss: float, metrics: Mapping[str, Tensor]) -> str:
    """Return a line about an epoch: its mean loss, and the mean τ of its last batch."""
    tau = f", τ {metrics['tau/image_mean']:.4f}" if "tau/image_mean" in metrics else ""
    return f"epoch {epoch}: loss {mean_loss:.4f}{tau}"


def zero_shot(model: TwoTowers) -> str:
    """Classify drawings of 83 concepts that no drawing in training shows; every process calls this."""
    scores = evaluate(model.towers, ["emoji-concepts"], device=next(model.parameters()).device)["emoji-concepts"]
    accuracy, chance = 100 * scores.metrics["acc1"], 100 * scores.chance["acc1"]
    return f"zero-shot accuracy {accuracy:.1f} % (chance {chance:.1f} %)"
