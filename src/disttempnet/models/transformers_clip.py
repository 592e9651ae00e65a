"""A CLIP in the folder of the library transformers, as open_clip has it: the same towers under other names."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from disttempnet.errors import UserError

CONFIG_NAME = "config.json"
PREPROCESS_NAME = "preprocessor_config.json"
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
NAMES = (
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
    """open_clip's `model_cfg` of the model that transformers' `config.json` describes.

    Args:
        config: what that file holds; keys that it lacks have the values of CLIP ViT-B/32, as transformers has it.
        source: named in errors.

    Raises:
        UserError: a model that is no CLIP of OpenAI's form.
    """
    kind = config.get("model_type")
    if kind != "clip" or config.get("architectures", ["CLIPModel"]) != ["CLIPModel"]:
        what = ", ".join(map(str, config.get("architectures") or [])) or f"kind {kind!r}"
        raise UserError(
            f"{source}: holds {what} of transformers; of these CLIPModel alone is read. For SigLIP and others take "
            "open_clip's own weights: open_clip:NAME/TAG, or a repository with an open_clip_config.json"
        )
    vision, text = ({**d, **COMMON, **config.get(k, {})} for d, k in ((VISION, "vision_config"), (TEXT, "text_config")))
    acts = {vision["hidden_act"], text["hidden_act"]}
    for wrong, why in (
        (len(acts) > 1 or not acts <= {"quick_gelu", "gelu"}, f"activations {sorted(acts)}, not quick_gelu or gelu"),
        ({vision["layer_norm_eps"], text["layer_norm_eps"]} != {1e-5}, "another layer_norm_eps than 1e-5"),
        (text["vocab_size"] != VOCABULARY, f"a vocabulary of {text['vocab_size']}: its tokenizer is not CLIP's"),
    ):
        if wrong:
            raise UserError(f"{source}: a CLIPModel of transformers with {why}; open_clip has no such architecture")
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
    """open_clip's `preprocess_cfg` from transformers' `preprocessor_config.json`; keys that it lacks stay out."""
    found = {"mean": config.get("image_mean"), "std": config.get("image_std")}
    found["interpolation"] = RESAMPLING.get(config.get("resample", 3), "bicubic")
    return {key: value for key, value in found.items() if value}


def open_clip_state(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state dict of a CLIPModel under open_clip's names; what is none of its keeps its own."""
    found: dict[str, Tensor] = {}
    for key, value in state.items():
        if key.endswith("position_ids"):  # a counter that older versions saved
            continue
        if key in ("visual_projection.weight", "text_projection.weight"):
            found["visual.proj" if key.startswith("visual") else "text_projection"] = value.T
            continue
        for pattern, name in NAMES:
            key = re.sub(pattern, name, key)
        found[key] = value
    for key in [key for key in found if ".self_attn.q_proj." in key]:
        parts = [key.replace("q_proj", f"{part}_proj") for part in "qkv"]
        if all(part in found for part in parts):
            joined = key.replace(".self_attn.q_proj.", ".attn.in_proj_")
            found[joined] = torch.cat([found.pop(part) for part in parts])
    return found


def has_its_names(state: Mapping[str, Tensor]) -> bool:
    """Whether a state dict is that of a CLIPModel."""
    return "vision_model.embeddings.class_embedding" in state
