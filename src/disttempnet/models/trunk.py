"""The locked trunk of a tower, and the head that is trained on it.

A locked tower gives the same features for a sample in every epoch, so they can be computed once (features/). What is
kept is the output of the part that no training changes:

    tower                     trunk                              head
    timm                      the network, pooled                `visual.head`
    Hugging Face              the encoder, pooled                `text.proj`
    any, nothing trained      all of it: the embedding           none
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from open_clip.hf_model import HFTextEncoder
from open_clip.timm_model import TimmModel
from torch import Tensor, nn

from disttempnet.errors import UserError
from disttempnet.models.text import WordwiseTokenizer
from disttempnet.models.towers import Towers, encode_images, encode_texts

TOWER_SIDES = ("image", "text")
NOT_OF_A_TOWER = ("logit_scale", "logit_bias")
HEAD_KEYS = ("timm_proj", "timm_proj_bias", "timm_drop", "hf_proj_type", "hf_model_pretrained", "timm_model_pretrained")
# What of a Hugging Face config decides the output beside the weights, in the names of its architectures.
ENCODER_KEYS = (
    "model_type", "hidden_act", "activation", "layer_norm_eps", "num_attention_heads", "n_heads", "pad_token_id",
    "position_embedding_type", "sinusoidal_pos_embds", "is_decoder", "max_position_embeddings",
)  # fmt: skip
# Matrix kernels choose by the number of rows, and round differently for a few: batches are filled up to this many, so
# that a sample's features do not depend on how many samples are left. Measured on CPU: 16 and more rows are bit-equal.
LEAST_BATCH = 32
PROBES = ("a photo of a dog", "Two RED apples, 3 pears & a cat's tail", "naïve café – ½ 日本 🍎", "x" * 300, "")


@dataclass(frozen=True)
class Trunk:
    """The part of one tower that no training changes.

    Attributes:
        towers: both towers.
        side: `image` or `text`.
        owner: the module that holds the head.
        head_name: the head's attribute of `owner`; empty where all of the tower is the trunk.
    """

    towers: Towers
    side: str
    owner: nn.Module
    head_name: str

    @property
    def head(self) -> nn.Module:
        """The trained head on the trunk: features [b, F] → embeddings [b, D]."""
        head: nn.Module = getattr(self.owner, self.head_name) if self.head_name else nn.Identity()
        return head

    def __call__(self, inputs: Tensor) -> Tensor:
        """Uint8 images [b, 3, s, s], or int64 tokens [b, L] → features [b, F]."""
        encode = encode_images if self.side == "image" else encode_texts
        with self._without_head():
            return encode(self.towers, inputs, normalize=False)

    @contextmanager
    def _without_head(self) -> Iterator[None]:
        """Inside, the tower ends before its head."""
        if not self.head_name:
            yield
            return
        head = self.head
        setattr(self.owner, self.head_name, nn.Identity())
        try:
            yield
        finally:
            setattr(self.owner, self.head_name, head)

    def facts(self) -> dict[str, Any]:
        """All that the features of a sample depend on, apart from the sample: plain values, for JSON."""
        towers = self.towers
        cfg = dict(towers.architecture["vision_cfg" if self.side == "image" else "text_cfg"])
        facts: dict[str, Any] = {"side": self.side, "weights": self._weights_digest}
        if self.head_name:
            cfg = {key: value for key, value in cfg.items() if key not in HEAD_KEYS}
        else:
            facts["embed_dim"] = towers.embed_dim
        facts |= {"architecture": cfg, "quick_gelu": bool(towers.architecture.get("quick_gelu"))}
        if self.side == "image":
            facts |= {"image_size": towers.image_size, "mean": list(towers.mean), "std": list(towers.std)}
            facts["resizing"] = list(towers.resizing)
            return facts
        if isinstance(self.owner, HFTextEncoder):
            config = self.owner.config.to_dict()
            facts["encoder"] = {key: config[key] for key in ENCODER_KEYS if key in config}
            facts["pooler"] = type(self.owner.pooler).__name__
        facts["tokenizer"] = self._tokenizer_digest
        return facts

    # Training and evaluation ask for both, and neither changes while this trunk is in use.
    @cached_property
    def _tokenizer_digest(self) -> str:
        return tokenizer_digest(self.towers.tokenizer)

    @cached_property
    def _weights_digest(self) -> str:
        digest = hashlib.blake2b(digest_size=16)
        for name, value in sorted(_weights_of(self).items()):
            digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
            digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
        return digest.hexdigest()


def trunk_of(towers: Towers, side: str) -> Trunk:
    """The trunk of a tower whose locks are set.

    Raises:
        UserError: layers of the tower are trained.
    """
    module = towers.module
    owner = module.visual if side == "image" else getattr(module, "text", module)
    head_name = ""
    if isinstance(owner, TimmModel):
        head_name = "head"
    elif isinstance(owner, HFTextEncoder):
        head_name = "proj"
    if head_name and not any(p.requires_grad for p in getattr(owner, head_name).parameters()):
        head_name = ""  # nothing of the tower is trained: the embedding itself is kept
    trunk = Trunk(towers, side, owner, head_name)
    parameters = dict(module.named_parameters())
    if trained := [name for name in _weights_of(trunk) if name in parameters and parameters[name].requires_grad]:
        raise UserError(f"the features of the {side} tower cannot be cached: {trained[0]} is trained; lock all of it")
    return trunk


def filled(inputs: Tensor, rows: int = LEAST_BATCH) -> Tensor:
    """Return a batch of one tower with its first row repeated up to so many `rows`; an empty one as it is."""
    lacking = rows - len(inputs)
    if lacking <= 0 or not len(inputs):
        return inputs
    return torch.cat([inputs, inputs[:1].expand(lacking, *inputs.shape[1:])])


def _weights_of(trunk: Trunk) -> dict[str, Tensor]:
    """Parameters and buffers of the trunk, by their names in open_clip's model."""
    module, image = trunk.towers.module, trunk.side == "image"
    left_out = (f"{'visual' if image else 'text'}.{trunk.head_name}.",) if trunk.head_name else ()
    return {
        name: value
        for name, value in module.state_dict().items()
        if name.startswith("visual.") == image and name not in NOT_OF_A_TOWER and not name.startswith(left_out)
    }


def tokenizer_digest(tokenizer: Any) -> str:
    """Hex digest of what a tokenizer makes of texts: its vocabulary and rules, its length, and a few probes."""
    inner = tokenizer.tokenizer if isinstance(tokenizer, WordwiseTokenizer) else tokenizer
    digest = hashlib.blake2b(digest_size=16)
    fast = getattr(getattr(inner, "tokenizer", None), "backend_tokenizer", None)
    if fast is not None:
        state = json.loads(fast.to_str())
        digest.update(json.dumps([state.get(key) for key in FAST_PARTS], sort_keys=True).encode())
    elif hasattr(inner, "bpe_ranks"):
        digest.update(json.dumps([sorted(inner.encoder.items()), sorted(inner.bpe_ranks.items())]).encode())
    clean = getattr(inner, "clean_fn", None)
    digest.update(f"{getattr(inner, 'context_length', '')} {getattr(clean, '__name__', '')}".encode())
    digest.update(json.dumps(tokenizer(list(PROBES)).tolist()).encode())
    return digest.hexdigest()


# of a fast tokenizer's state; padding and truncation are settings of its last call
FAST_PARTS = ("normalizer", "pre_tokenizer", "model", "post_processor", "added_tokens")
