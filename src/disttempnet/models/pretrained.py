"""Towers that begin from checkpoints of their own: an image tower of timm, a text tower of Hugging Face.

open_clip joins them (CustomTextCLIP, TimmModel, HFTextEncoder) and projects both to one width. It cannot build
DistilBERT by itself: its table does not list it, and it passes every encoder an argument that only some know. Here the
encoder is made from its config and put in place.

A Hugging Face SOURCE is a folder (config.json, tokenizer files, weights) or a name of the hub.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import timm
from open_clip import CustomTextCLIP
from open_clip.hf_configs import arch_dict
from open_clip.hf_model import HFTextEncoder
from open_clip.tokenizer import HFTokenizer
from torch import nn

from disttempnet.errors import UserError
from disttempnet.models.weights import SUFFIXES, listed, misfit, read_weights, refuse_other_files, without_prefix

HF_CONFIG_NAME = "config.json"
NO_DROPOUT = ("dropout", "attention_dropout", "hidden_dropout_prob", "attention_probs_dropout_prob")

arch_dict["distilbert"] = {
    "config_names": {
        "context_length": "max_position_embeddings",
        "vocab_size": "vocab_size",
        "width": "dim",
        "heads": "n_heads",
        "layers": "n_layers",
    },
    "pooler": "cls_last_hidden_state_pooler",
}


def has_hf_text(architecture: dict[str, Any]) -> bool:
    """Whether open_clip's `model_cfg` asks for a text tower of Hugging Face."""
    return bool(architecture.get("text_cfg", {}).get("hf_model_name"))


def build_with_hf_text(architecture: dict[str, Any], source: str, with_weights: bool) -> CustomTextCLIP:
    """Towers of an architecture with a Hugging Face text tower; random but for that tower's encoder.

    Args:
        architecture: open_clip's `model_cfg`.
        source: where the encoder's config, which decides its kind and size, and its weights lie.
        with_weights: take the weights too; the projection is random in any case.

    Dropout is off: its masks would depend on which rows a rank holds, so that world size would show in the loss.

    Raises:
        UserError: transformers is not installed, or the encoder is of no kind that open_clip knows.
        OSError, ValueError, RuntimeError: what transformers raises on a source that it cannot read.
    """
    transformers = import_transformers()
    refuse_unreadable(source)
    with _code_named(source):
        config = transformers.AutoConfig.from_pretrained(source, trust_remote_code=False)
    if config.model_type not in arch_dict:
        raise UserError(f"{source}: a text tower of kind '{config.model_type}'; known: {', '.join(arch_dict)}")
    for name in NO_DROPOUT:
        if hasattr(config, name):
            setattr(config, name, 0.0)
    wanted = copy.deepcopy(architecture)
    wanted.pop("custom_text", None)
    text_cfg = wanted["text_cfg"]
    pooled = text_cfg.get("hf_pooler_type") == "cls_pooler"
    wanted["vision_cfg"]["timm_model_pretrained"] = False
    # CustomTextCLIP builds a text tower in any case: the smallest, until ours takes its place
    wanted["text_cfg"] = {"width": 1, "heads": 1, "layers": 1, "vocab_size": 1, "context_length": 1}
    module = CustomTextCLIP(**wanted)
    module.text = HFTextEncoder(
        source,
        output_dim=wanted["embed_dim"],
        config=config,
        pooler_type=text_cfg.get("hf_pooler_type"),
        proj_type=text_cfg.get("hf_proj_type", "linear"),
    )
    if with_weights:
        module.text.transformer = _encoder(transformers, source, config, pooled)
    if getattr(config, "is_encoder_decoder", False):
        module.text.transformer = module.text.transformer.encoder
    if not pooled and hasattr(module.text.transformer, "pooler"):
        module.text.transformer.pooler = None  # nothing would reach it, and data parallel wants no idle parameter
    module.context_length, module.vocab_size = text_cfg["context_length"], config.vocab_size
    return module


def refuse_unreadable(source: str) -> None:
    """Raise UserError where a folder has a file of weights that is none: a Git LFS pointer, a web page, code."""
    folder = Path(source)
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        if path.suffix == ".safetensors":
            refuse_other_files(path)
        elif path.match("pytorch_model*.bin"):
            read_weights(path)  # all of a pickle can be wrong


@contextmanager
def _code_named(source: str) -> Iterator[None]:
    """Say that a source brings code of its own, which transformers would run if it were asked to."""
    try:
        yield
    except ValueError as error:
        if "trust_remote_code" not in str(error):
            raise
        raise UserError(
            f"{source}: needs code of its own (auto_map in its config or tokenizer), which is not run; encoders of "
            f"these kinds need none: {', '.join(arch_dict)}"
        ) from None


def _encoder(transformers: ModuleType, source: str, config: Any, pooled: bool) -> nn.Module:
    """The encoder with its weights; transformers draws at random what a file lacks, which is refused here."""
    encoder, found = transformers.AutoModel.from_pretrained(
        source, config=config, trust_remote_code=False, output_loading_info=True
    )
    lacking = sorted(key for key in found["missing_keys"] if pooled or not key.startswith("pooler."))
    if lacking:
        beside = sorted(found["unexpected_keys"])
        has = f"; has {listed(beside)}" if beside else ""
        raise UserError(
            f"model.text_pretrained: {source}: not weights of {config.model_type}: lacks {listed(lacking)}{has}"
        )
    return encoder.float()


def hf_tokenizer(source: str, module: CustomTextCLIP) -> HFTokenizer:
    """Captions → int64 tokens [b, L], padded to the architecture's context length L and truncated to it.

    The text tower's attention mask is `tokens != pad`, so both must mean the same by padding.
    """
    import_transformers()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # loader workers are the parallelism; it warns of forks
    with _code_named(source):
        tokenizer = HFTokenizer(source, context_length=module.context_length, trust_remote_code=False)
    pad, expected = tokenizer.tokenizer.pad_token_id, module.text.config.pad_token_id
    if pad != expected:
        raise UserError(f"{source}: its tokenizer pads with token {pad}, its model expects {expected}")
    return tokenizer


def save_hf_text(module: CustomTextCLIP, tokenizer: Any, folder: Path) -> None:
    """Write the encoder's config and the tokenizer's files, so that the folder needs no other source."""
    module.text.config.save_pretrained(folder)
    tokenizer.save_pretrained(str(folder))


def load_image_tower(module: nn.Module, source: str) -> dict[str, Any]:
    """Give the timm image tower of a model weights of its own; the projection stays as it is.

    Args:
        module: open_clip's model, changed in place.
        source: a file of weights (.safetensors, .pth), timm's or torchvision's, or a name that timm can download
            (`resnet50.tv_in1k`). A classifier in it is left out.

    Returns:
        `mean` and `std` that the weights want pixels normalised with, as timm knows them.

    Raises:
        UserError: no timm tower, no such file, or weights of another architecture.
    """
    trunk = getattr(module.visual, "trunk", None)
    if trunk is None:
        raise UserError("model.image_pretrained is for timm image towers; this model takes model.pretrained")
    own = trunk.state_dict()
    if Path(source).suffix in SUFFIXES or Path(source).is_file():
        if not Path(source).exists():
            raise UserError(f"model.image_pretrained: {source}: no such file")
        weights, known = without_prefix(source, read_weights(source, prefer_ema=True), own), trunk.pretrained_cfg
    else:
        whole = timm.create_model(source, pretrained=True)
        weights, known = whole.state_dict(), whole.pretrained_cfg
    heads = known.get("classifier") or ()
    heads = (heads,) if isinstance(heads, str) else tuple(heads)
    weights = {key: value for key, value in weights.items() if not key.startswith(tuple(f"{h}." for h in heads))}
    if wrong := misfit(weights, own):
        raise UserError(
            f"model.image_pretrained: {source}: not weights of timm's {trunk.pretrained_cfg['architecture']}: {wrong}"
        )
    trunk.load_state_dict(weights, strict=False)
    return {"mean": tuple(known["mean"]), "std": tuple(known["std"])}


def import_transformers() -> ModuleType:
    """The library, silent; UserError where it is not installed."""
    try:
        import transformers
    except ImportError:
        raise UserError(
            "a Hugging Face text tower needs transformers: python -m pip install 'disttempnet[hf]'"
        ) from None
    transformers.utils.logging.disable_progress_bar()
    return transformers
