"""Small towers in the formats of others: a timm ResNet, a DistilBERT with a WordPiece tokenizer, an architecture.

Weights are random; the files are what timm and transformers themselves write.
"""

from __future__ import annotations

import json
from pathlib import Path

import disttempnet.models  # first: it lets torchvision load beside a CPU-only torch

import timm  # isort: skip
import torch
from safetensors.torch import save_file

WORDS = [
    "a",
    "the",
    "red",
    "green",
    "blue",
    "small",
    "large",
    "cat",
    "dog",
    "apple",
    "sits",
    "on",
    "two",
    "photo",
    "of",
]
CONTEXT = 12


def write_text_folder(folder: Path, pad_first: bool = True, full_size: bool = False) -> Path:
    """A DistilBERT (three narrow layers, or full_size) and a WordPiece tokenizer over WORDS, letters and ##letters."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordPiece
    from tokenizers.normalizers import BertNormalizer
    from tokenizers.pre_tokenizers import BertPreTokenizer
    from tokenizers.processors import BertProcessing
    from transformers import DistilBertConfig, DistilBertModel, PreTrainedTokenizerFast
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    letters = "abcdefghijklmnopqrstuvwxyz"
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    pieces = [*special, *letters, *(f"##{letter}" for letter in letters), *(w for w in WORDS if len(w) > 1)]
    if not pad_first:
        pieces[0], pieces[1] = pieces[1], pieces[0]
    vocabulary = {piece: number for number, piece in enumerate(pieces)}
    tokenizer = Tokenizer(WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer, tokenizer.pre_tokenizer = BertNormalizer(lowercase=True), BertPreTokenizer()
    tokenizer.post_processor = BertProcessing(("[SEP]", vocabulary["[SEP]"]), ("[CLS]", vocabulary["[CLS]"]))
    named = dict(zip(["pad_token", "unk_token", "cls_token", "sep_token", "mask_token"], special, strict=True))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **named).save_pretrained(folder)
    torch.manual_seed(3)
    narrow = {} if full_size else {"dim": 32, "n_layers": 3, "n_heads": 2, "hidden_dim": 64}
    config = DistilBertConfig(vocab_size=len(vocabulary), max_position_embeddings=64, **narrow)
    DistilBertModel(config).save_pretrained(folder)
    return folder


def write_image_weights(path: Path, name: str = "test_resnet") -> Path:
    """Weights of a timm model with its classifier, and BatchNorm statistics that are not those of a fresh one."""
    torch.manual_seed(4)
    state = timm.create_model(name).state_dict()
    for key, value in state.items():
        if key.endswith("running_mean"):
            value.normal_(0, 0.1)
        if key.endswith("running_var"):
            value.uniform_(0.5, 1.5)
    save_file(state, path)
    return path


def write_architecture(folder: Path, timm_name: str = "test_resnet", image_size: int = 32, embed_dim: int = 16) -> str:
    """The layout of RN50-DistilBERT with smaller towers; returns the name that `load_model` takes."""
    folder.mkdir(parents=True, exist_ok=True)
    shipped = json.loads((disttempnet.models.MODEL_FOLDER / "RN50-DistilBERT.json").read_text(encoding="utf-8"))
    shipped["embed_dim"] = embed_dim
    shipped["vision_cfg"] |= {"timm_model_name": timm_name, "image_size": image_size}
    shipped["text_cfg"]["context_length"] = CONTEXT
    config = {"model_cfg": shipped, "preprocess_cfg": {}}
    (folder / "open_clip_config.json").write_text(json.dumps(config), encoding="utf-8")
    return f"{folder}/open_clip_config.json"
