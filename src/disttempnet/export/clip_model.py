"""Writer of a folder of transformers' CLIPModel, with tokenizer and image processor."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from disttempnet.errors import UserError
from disttempnet.export.check import CAPTIONS, expected_features, largest_difference, sample_pixels
from disttempnet.models import Towers
from disttempnet.models.pretrained import import_transformers
from disttempnet.models.transformers_clip import (
    HF_PREPROCESS_NAME,
    clip_model_config,
    clip_model_state,
    clip_processor_config,
    why_no_clip_model,
)


def write_clip_model(towers: Towers, folder: Path) -> str:
    """Write the towers as a CLIPModel folder, open it with transformers, and compare features.

    Args:
        towers: in evaluation mode, on the CPU.
        folder: an existing, empty one.

    Returns:
        What was checked, in words.

    Raises:
        UserError: the architecture is not CLIP's own; transformers is missing; features differ.
    """
    if why := why_no_clip_model(towers.architecture):
        raise UserError(f"--to transformers writes a CLIPModel, which cannot hold {towers.name}: {why}; try --to onnx")
    size, resizing = towers.image_size, towers.resizing
    processor = clip_processor_config(size, towers.mean, towers.std, resizing.mode, resizing.interpolation)
    transformers = import_transformers()

    # Fill transformers' own model, so that its strict check of names and shapes holds for every weight.
    state = clip_model_state({key: value.detach().float() for key, value in towers.module.state_dict().items()})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of transformers, about its own future
        model = transformers.CLIPModel(transformers.CLIPConfig(**clip_model_config(towers.architecture)))
        model.load_state_dict(state)
        model.save_pretrained(folder)
        clip_tokenizer(towers).save_pretrained(folder)
        (folder / HF_PREPROCESS_NAME).write_text(json.dumps(processor, indent=2) + "\n", encoding="utf-8")
        image, text = _features_of_folder(transformers, folder, sample_pixels(towers), towers)

    # Compare with the towers, through the folder's own tokenizer.
    expected_image, expected_text = expected_features(towers)
    difference = max(
        largest_difference("the CLIPModel of images", expected_image, image),
        largest_difference("the CLIPModel of captions", expected_text, text),
    )
    return f"opened by transformers; features of images and captions differ by at most {difference:.1e}"


def clip_tokenizer(towers: Towers) -> Any:
    """Return CLIP's tokenizer as one of transformers, with the towers' context length."""
    import open_clip

    transformers = import_transformers()
    simple = open_clip.SimpleTokenizer()
    vocabulary = {_special(token): number for token, number in simple.encoder.items()}
    return transformers.CLIPTokenizer(
        vocab=vocabulary,
        merges=sorted(simple.bpe_ranks, key=simple.bpe_ranks.__getitem__),
        model_max_length=towers.architecture["text_cfg"].get("context_length", 77),
    )


def _special(token: str) -> str:
    """Return a token of open_clip's vocabulary under transformers' name."""
    return {"<start_of_text>": "<|startoftext|>", "<end_of_text>": "<|endoftext|>"}.get(token, token)


def _features_of_folder(transformers: Any, folder: Path, pixels: Tensor, towers: Towers) -> tuple[Tensor, Tensor]:
    """Return unit features of images and `CAPTIONS` as transformers computes them from the folder."""
    model = transformers.CLIPModel.from_pretrained(folder, local_files_only=True).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (towers.mean, towers.std))
    tokens = tokenizer(list(CAPTIONS), padding=True, truncation=True, return_tensors="pt")
    with torch.inference_mode():
        image = _pooled(model.get_image_features(pixel_values=(pixels.float() / 255 - mean) / std))
        text = _pooled(model.get_text_features(**tokens))
    return normalize(image, dim=-1), normalize(text, dim=-1)


def _pooled(output: Any) -> Tensor:
    """Return the features of transformers' answer, which is a tensor before version 5."""
    return getattr(output, "pooler_output", output)
