"""CLIPModel folders of the library transformers: the same towers under open_clip's names."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from disttempnet.errors import UserError

HF_CONFIG_NAME = "config.json"
HF_PREPROCESS_NAME = "preprocessor_config.json"
VOCABULARY = 49408  # of CLIP's own tokenizer, which captions are encoded with here
TEXT = {
    "vocab_size": VOCABULARY, "hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 12,
    "num_attention_heads": 8, "max_position_embeddings": 77,
}  # fmt: skip
VISION = {
    "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12,
    "image_size": 224, "patch_size": 32,
}  # fmt: skip
COMMON = {"hidden_act": "quick_gelu", "layer_norm_eps": 1e-5}
RESAMPLING = {2: "bilinear", 3: "bicubic"}  # Pillow's numbers
PARAMETER_NAMES = (  # pattern in transformers' names → open_clip's
    (r"^vision_model\.embeddings\.class_embedding$", "visual.class_embedding"),
    (r"^vision_model\.embeddings\.patch_embedding\.", "visual.conv1."),
    (r"^vision_model\.embeddings\.position_embedding\.weight$", "visual.positional_embedding"),
    (r"^vision_model\.pre_layrnorm\.", "visual.ln_pre."),
    (r"^vision_model\.post_layernorm\.", "visual.ln_post."),
    (r"^vision_model\.encoder\.layers\.", "visual.transformer.resblocks."),
    (r"^text_model\.embeddings\.token_embedding\.", "token_embedding."),
    (r"^text_model\.embeddings\.position_embedding\.weight$", "positional_embedding"),
    (r"^text_model\.final_layer_norm\.", "ln_final."),
    (r"^text_model\.encoder\.layers\.", "transformer.resblocks."),
    (r"\.layer_norm([12])\.", r".ln_\1."),
    (r"\.mlp\.fc1\.", ".mlp.c_fc."),
    (r"\.mlp\.fc2\.", ".mlp.c_proj."),
    (r"\.self_attn\.out_proj\.", ".attn.out_proj."),
)


def open_clip_architecture(config: Mapping[str, Any], source: str) -> dict[str, Any]:
    """Return open_clip's `model_cfg` for the model that transformers' `config.json` describes.

    Args:
        config: content of that file; missing keys have the values of CLIP ViT-B/32, as in transformers.
        source: named in errors.

    Raises:
        UserError: not a CLIP of OpenAI's form.
    """
    # Only CLIPModel has the same computation in open_clip.
    kind = config.get("model_type")
    if kind != "clip" or config.get("architectures", ["CLIPModel"]) != ["CLIPModel"]:
        what = ", ".join(map(str, config.get("architectures") or [])) or f"kind {kind!r}"
        raise UserError(
            f"{source}: holds {what} of transformers; only CLIPModel is supported. For SigLIP and others use "
            "open_clip's own weights: open_clip:NAME/TAG, or a repository with an open_clip_config.json"
        )

    # Refuse activations, norms and vocabularies that open_clip's CLIP cannot have.
    vision = {**VISION, **COMMON, **config.get("vision_config", {})}
    text = {**TEXT, **COMMON, **config.get("text_config", {})}
    acts = {vision["hidden_act"], text["hidden_act"]}
    for wrong, why in (
        (len(acts) > 1 or not acts <= {"quick_gelu", "gelu"}, f"activations {sorted(acts)}, not quick_gelu or gelu"),
        ({vision["layer_norm_eps"], text["layer_norm_eps"]} != {1e-5}, "a layer_norm_eps other than 1e-5"),
        (text["vocab_size"] != VOCABULARY, f"a vocabulary of {text['vocab_size']}: its tokenizer is not CLIP's"),
    ):
        if wrong:
            raise UserError(f"{source}: a CLIPModel of transformers with {why}; open_clip has no such architecture")

    # Translate the sizes.
    return {
        "embed_dim": int(config.get("projection_dim", 512)),
        "quick_gelu": acts == {"quick_gelu"},
        "vision_cfg": {
            **_sizes(vision),
            "head_width": vision["hidden_size"] // vision["num_attention_heads"],
            "image_size": vision["image_size"],
            "patch_size": vision["patch_size"],
        },
        "text_cfg": {
            **_sizes(text),
            "heads": text["num_attention_heads"],
            "context_length": text["max_position_embeddings"],
            "vocab_size": text["vocab_size"],
        },
    }


def _sizes(config: Mapping[str, Any]) -> dict[str, Any]:
    width, inner = config["hidden_size"], config["intermediate_size"]
    ratio = inner / width
    if int(width * ratio) != inner:  # open_clip rounds their product down
        ratio = (inner + 0.5) / width
    return {"width": width, "layers": config["num_hidden_layers"], "mlp_ratio": ratio}


def open_clip_preprocess(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return open_clip's `preprocess_cfg` from transformers' `preprocessor_config.json`; missing keys stay out."""
    found = {"mean": config.get("image_mean"), "std": config.get("image_std")}
    found["interpolation"] = RESAMPLING.get(config.get("resample", 3), "bicubic")
    return {key: value for key, value in found.items() if value}


def open_clip_state(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the state dict of a CLIPModel under open_clip's names; other keys keep theirs."""
    found: dict[str, Tensor] = {}
    for key, value in state.items():
        if key.endswith("position_ids"):  # a counter that older versions saved
            continue
        if key in ("visual_projection.weight", "text_projection.weight"):
            found["visual.proj" if key.startswith("visual") else "text_projection"] = value.T
            continue
        for pattern, name in PARAMETER_NAMES:
            key = re.sub(pattern, name, key)
        found[key] = value

    # open_clip keeps the projections of queries, keys and values as one matrix [3·D, D].
    for key in [key for key in found if ".self_attn.q_proj." in key]:
        parts = [key.replace("q_proj", f"{part}_proj") for part in "qkv"]
        if all(part in found for part in parts):
            joined = key.replace(".self_attn.q_proj.", ".attn.in_proj_")
            found[joined] = torch.cat([found.pop(part) for part in parts])
    return found


def is_clip_model_state(state: Mapping[str, Tensor]) -> bool:
    """Return whether a state dict is that of a CLIPModel."""
    return "vision_model.embeddings.class_embedding" in state
