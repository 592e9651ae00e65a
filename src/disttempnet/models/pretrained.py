"""Towers with pretrained weights of their own: an image tower of timm, a text tower of Hugging Face.

open_clip joins them (CustomTextCLIP, TimmModel, HFTextEncoder) and projects both to one width. It cannot build
DistilBERT: its table does not list it, and it passes every encoder an argument that only some accept. Here the encoder
is built from its own config and put into open_clip's text tower.

A Hugging Face SOURCE is a folder (config.json, tokenizer files, weights) or a name on the Hub.
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
from disttempnet.models.efficientnet import with_timm_names
from disttempnet.models.hub import hub_fault
from disttempnet.models.weights import WEIGHT_SUFFIXES, listed, misfit, read_weights, refuse_other_files, without_prefix

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
    """Return whether open_clip's `model_cfg` has a Hugging Face text tower."""
    return bool(architecture.get("text_cfg", {}).get("hf_model_name"))


def build_with_hf_text(architecture: dict[str, Any], source: str, with_weights: bool) -> CustomTextCLIP:
    """Build the towers of an architecture with a Hugging Face text tower.

    Dropout is switched off: its masks would depend on the rows that a rank holds, so that the loss would depend on the
    world size.

    Args:
        architecture: open_clip's `model_cfg`.
        source: folder or Hub name of the encoder's config, which decides its kind and size, and of its weights.
        with_weights: load the weights too. The projection to [b, D] is always random.

    Raises:
        UserError: transformers is not installed, or the encoder is of a kind that open_clip does not know.
        OSError, ValueError, RuntimeError: raised by transformers for a source that it cannot read.
    """
    # Read the encoder's config, and switch its dropout off.
    transformers = import_transformers()
    refuse_unreadable(source)
    if not Path(source).is_dir():
        hub_fault()  # without a network only the cache is read, at once
    with _code_named(source):
        config = transformers.AutoConfig.from_pretrained(source, trust_remote_code=False)
    if config.model_type not in arch_dict:
        raise UserError(f"{source}: a text tower of kind '{config.model_type}'; known: {', '.join(arch_dict)}")
    text_cfg = architecture["text_cfg"]
    for name, value in (text_cfg.get("hf_model_config") or {}).items():
        setattr(config, name, value)
    for name in NO_DROPOUT:
        if hasattr(config, name):
            setattr(config, name, 0.0)

    # Refuse more tokens than the encoder has positions: indexing would fail, or be wrong, in the middle of training.
    length = architecture["text_cfg"]["context_length"]
    if (positions := _positions(config)) and length > positions:
        raise UserError(
            f"{source}: a text tower of kind '{config.model_type}' with {positions} positions cannot read "
            f"{length} tokens: lower model.context_length, or take another tower"
        )

    # Build the image tower. CustomTextCLIP always builds a text tower too: the smallest one, to be replaced.
    wanted = copy.deepcopy(architecture)
    wanted.pop("custom_text", None)
    wanted["vision_cfg"]["timm_model_pretrained"] = False
    wanted["text_cfg"] = {"width": 1, "heads": 1, "layers": 1, "vocab_size": 1, "context_length": 1}
    module = CustomTextCLIP(**wanted)

    # Build the text tower: encoder, pooling, projection to [b, D].
    module.text = HFTextEncoder(
        source,
        output_dim=wanted["embed_dim"],
        config=config,
        pooler_type=text_cfg.get("hf_pooler_type"),
        proj_type=text_cfg.get("hf_proj_type", "linear"),
    )
    if text_cfg.get("hf_proj_bias"):  # open_clip's has none; DistTempNet's first code has one
        module.text.proj = nn.Linear(module.text.proj.in_features, wanted["embed_dim"])
    module.context_length, module.vocab_size = text_cfg["context_length"], config.vocab_size

    # Load the encoder's weights; drop parts that open_clip does not use, as DDP refuses parameters without gradient.
    pooled = text_cfg.get("hf_pooler_type") == "cls_pooler"
    if with_weights:
        module.text.transformer = _encoder(transformers, source, config, pooled)
    if getattr(config, "is_encoder_decoder", False):  # open_clip itself takes the encoder since version 4
        module.text.transformer = getattr(module.text.transformer, "encoder", module.text.transformer)
    if not pooled and hasattr(module.text.transformer, "pooler"):
        module.text.transformer.pooler = None
    return module


def _positions(config: Any) -> int:
    """Return how many tokens a Hugging Face encoder reads at most; 0 where its positions are relative."""
    known = getattr(config, "max_position_embeddings", None) or 0
    # RoBERTa counts positions from the padding's number on
    begin = config.pad_token_id + 1 if config.model_type in ("roberta", "xlm-roberta") else 0
    return max(0, known - begin)


def refuse_unreadable(source: str) -> None:
    """Raise UserError if a file of weights in a folder is something else: a Git LFS pointer, a web page, code."""
    folder = Path(source)
    if not folder.is_dir():
        return
    for path in sorted(folder.iterdir()):
        if path.suffix == ".safetensors":
            refuse_other_files(path)
        elif path.match("pytorch_model*.bin"):
            read_weights(path)  # a pickle must be read to its end


@contextmanager
def _code_named(source: str) -> Iterator[None]:
    """Refuse a source that needs its own code, which transformers would only run with trust_remote_code."""
    try:
        yield
    except ValueError as error:
        if "trust_remote_code" not in str(error):
            raise
        raise UserError(
            f"{source}: needs code of its own (auto_map in its config or tokenizer), which is not run; encoders of "
            f"these kinds do not: {', '.join(arch_dict)}"
        ) from None


def _encoder(transformers: ModuleType, source: str, config: Any, pooled: bool) -> nn.Module:
    """Return the encoder with its weights. Missing weights, which transformers would draw at random, are refused."""
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
    """Return the tokenizer of a Hugging Face text tower: captions → int64 tokens [b, L].

    Tokens are padded and truncated to the architecture's context length L. The text tower's attention mask is
    `tokens != pad`, so tokenizer and model must pad with the same token.

    Raises:
        UserError: they do not.
    """
    import_transformers()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # loader workers are the parallelism; it warns of forks
    with _code_named(source):
        tokenizer = pad_right(HFTokenizer(source, context_length=module.context_length, trust_remote_code=False))
    pad, expected = tokenizer.tokenizer.pad_token_id, module.text.config.pad_token_id
    if pad != expected:
        raise UserError(f"{source}: its tokenizer pads with token {pad}, its model expects {expected}")
    return tokenizer


def pad_right(tokenizer: HFTokenizer) -> HFTokenizer:
    """Let a tokenizer pad after the text, in place, as open_clip itself does since version 4.

    The towers pool at the first token, the last or the end of text; tokenizers of decoders pad in front of it.
    """
    tokenizer.tokenizer.padding_side = "right"
    return tokenizer


def save_hf_text(module: CustomTextCLIP, tokenizer: Any, folder: Path) -> None:
    """Write the encoder's config and the tokenizer's files, so that the folder needs no other source."""
    module.text.config.save_pretrained(folder)
    tokenizer.save_pretrained(str(folder))


def load_image_tower(module: nn.Module, source: str) -> dict[str, Any]:
    """Load pretrained weights into the timm image tower of a model; its projection is unchanged.

    Args:
        module: open_clip's model, changed in place.
        source: a file of weights (.safetensors, .pth) of timm or torchvision, or a name that timm can download
            (`resnet50.tv_in1k`). A classifier in it is left out.

    Returns:
        `mean` and `std` of the pixels that the weights expect, as timm knows them.

    Raises:
        UserError: no timm tower, no such file, or weights of another architecture.
    """
    # Read the weights, from a file or through timm.
    trunk = getattr(module.visual, "trunk", None)
    if trunk is None:
        raise UserError("model.image_pretrained is for timm image towers; this model takes model.pretrained")
    own = trunk.state_dict()
    if Path(source).suffix in WEIGHT_SUFFIXES or Path(source).is_file():
        if not Path(source).exists():
            raise UserError(f"model.image_pretrained: {source}: no such file")
        known = trunk.pretrained_cfg
        weights = with_timm_names(source, known["architecture"], read_weights(source, prefer_ema=True), own)
        weights = without_prefix(source, weights, own)
    else:
        hub_fault()  # without a network only the cache is read, at once
        model = timm.create_model(source, pretrained=True)
        weights, known = model.state_dict(), model.pretrained_cfg

    # Leave the classifier out, and load the rest.
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
    """Import transformers without its progress bars; raise UserError if it is not installed."""
    try:
        import transformers
    except ImportError:
        raise UserError(
            "a Hugging Face text tower needs transformers: python -m pip install 'disttempnet[hf]'"
        ) from None
    transformers.utils.logging.disable_progress_bar()
    return transformers
