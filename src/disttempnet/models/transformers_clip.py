"""CLIPModel folders of the library transformers: the same towers under open_clip's names, and back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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
PREFIXES = (  # of parameters: transformers' and open_clip's
    ("vision_model.embeddings.class_embedding", "visual.class_embedding"),
    ("vision_model.embeddings.patch_embedding.", "visual.conv1."),
    ("vision_model.embeddings.position_embedding.weight", "visual.positional_embedding"),
    ("vision_model.pre_layrnorm.", "visual.ln_pre."),
    ("vision_model.post_layernorm.", "visual.ln_post."),
    ("vision_model.encoder.layers.", "visual.transformer.resblocks."),
    ("text_model.embeddings.token_embedding.", "token_embedding."),
    ("text_model.embeddings.position_embedding.weight", "positional_embedding"),
    ("text_model.final_layer_norm.", "ln_final."),
    ("text_model.encoder.layers.", "transformer.resblocks."),
)
LAYERS = (  # inside a layer
    (".layer_norm1.", ".ln_1."),
    (".layer_norm2.", ".ln_2."),
    (".mlp.fc1.", ".mlp.c_fc."),
    (".mlp.fc2.", ".mlp.c_proj."),
    (".self_attn.out_proj.", ".attn.out_proj."),
)
PROJECTIONS = (("visual_projection.weight", "visual.proj"), ("text_projection.weight", "text_projection"))  # transposed
TOP_KEYS = ("embed_dim", "quick_gelu", "vision_cfg", "text_cfg", "init_logit_bias", "init_logit_scale")
IGNORED = {
    "vision_cfg": {"patch_dropout", "timm_model_pretrained"},
    "text_cfg": {"hf_model_pretrained", "pad_id", "eos_id"},
}
TRANSLATED = {  # keys of open_clip that a CLIPModel has a place for
    "vision_cfg": {"layers", "width", "head_width", "mlp_ratio", "patch_size", "image_size"},
    "text_cfg": {"context_length", "vocab_size", "width", "heads", "layers", "mlp_ratio"},
}


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
        if key in dict(PROJECTIONS):
            found[dict(PROJECTIONS)[key]] = value.T
        else:
            found[_renamed(key, PREFIXES, LAYERS)] = value

    # open_clip keeps the projections of queries, keys and values as one matrix [3·D, D].
    for key in [key for key in found if ".self_attn.q_proj." in key]:
        parts = [key.replace("q_proj", f"{part}_proj") for part in "qkv"]
        if all(part in found for part in parts):
            joined = key.replace(".self_attn.q_proj.", ".attn.in_proj_")
            found[joined] = torch.cat([found.pop(part) for part in parts])
    return found


def _renamed(key: str, prefixes: Sequence[tuple[str, str]], layers: Sequence[tuple[str, str]]) -> str:
    """Return a parameter's name with the first prefix and the part of a layer replaced that it has."""
    for before, after in prefixes:
        if key.startswith(before):
            key = after + key.removeprefix(before)
            break
    for before, after in layers:
        key = key.replace(before, after)
    return key


def why_no_clip_model(architecture: Mapping[str, Any]) -> str:
    """Return why open_clip's `model_cfg` is not that of CLIP's own towers; empty if a CLIPModel computes the same."""
    from open_clip.model import CLIPTextCfg, CLIPVisionCfg

    # Towers of other libraries, and ResNets, are named by what they are.
    vision, text = architecture["vision_cfg"], architecture["text_cfg"]
    if vision.get("timm_model_name"):
        return f"its image tower is timm's {vision['timm_model_name']}"
    if text.get("hf_model_name"):
        return f"its text tower is Hugging Face's {text['hf_model_name']}"
    if "multimodal_cfg" in architecture:
        return "it is a CoCa, with a decoder"
    if not isinstance(vision.get("layers", 12), int):
        return "its image tower is a ResNet"
    for key in ("image_size", "patch_size"):
        if key in vision and not isinstance(vision[key], int):
            return f"vision_cfg.{key} = {vision[key]!r} is no square"
    if text.get("vocab_size", VOCABULARY) != VOCABULARY:
        return f"its vocabulary of {text['vocab_size']:,} is not that of CLIP's tokenizer"

    # Whatever has no place in a CLIPModel has to have the value that CLIP has.
    for section, known in (("vision_cfg", CLIPVisionCfg()), ("text_cfg", CLIPTextCfg())):
        for key, value in architecture[section].items():
            if key in TRANSLATED[section] | IGNORED[section]:
                continue
            if value != getattr(known, key, None) and value not in (None, {}):
                return f"{section}.{key} = {value!r} has no counterpart in CLIPModel"
    for key, value in architecture.items():
        if value and key not in TOP_KEYS:
            return f"{key} = {value!r} has no counterpart in CLIPModel"
    return ""


def clip_model_config(architecture: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of transformers' CLIPConfig for open_clip's `model_cfg`; see `why_no_clip_model`."""
    from open_clip.model import CLIPTextCfg, CLIPVisionCfg

    vision = CLIPVisionCfg(**architecture["vision_cfg"])
    text = CLIPTextCfg(**architecture["text_cfg"])
    common = {**COMMON, "hidden_act": "quick_gelu" if architecture.get("quick_gelu") else "gelu"}
    dim = architecture["embed_dim"]
    return {
        "projection_dim": dim,
        "vision_config": {
            "hidden_size": vision.width,
            "intermediate_size": int(vision.width * vision.mlp_ratio),
            "num_hidden_layers": vision.layers,
            "num_attention_heads": vision.width // vision.head_width,
            "image_size": vision.image_size,
            "patch_size": vision.patch_size,
            "projection_dim": dim,
            **common,
        },
        "text_config": {
            "hidden_size": text.width,
            "intermediate_size": int(text.width * text.mlp_ratio),
            "num_hidden_layers": text.layers,
            "num_attention_heads": text.heads,
            "max_position_embeddings": text.context_length,
            "vocab_size": VOCABULARY,
            "projection_dim": dim,
            # the feature is read at the end of the text; transformers' tokenizer pads with the same token
            "bos_token_id": VOCABULARY - 2,
            "eos_token_id": VOCABULARY - 1,
            "pad_token_id": VOCABULARY - 1,
            **common,
        },
    }


def clip_model_state(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return open_clip's state dict under the names of a CLIPModel: the inverse of `open_clip_state`.

    A logit bias has no place there and is left out.
    """
    ours = {own: theirs for theirs, own in PROJECTIONS}
    prefixes = [(own, theirs) for theirs, own in PREFIXES]
    layers = [(own, theirs) for theirs, own in LAYERS]
    found: dict[str, Tensor] = {}
    for key, value in state.items():
        if key == "logit_bias":
            continue
        if key in ours:
            found[ours[key]] = value.T.contiguous()
            continue
        key = _renamed(key, prefixes, layers)
        before, joined, kind = key.partition(".attn.in_proj_")
        if joined:  # one matrix [3·D, D] of queries, keys and values
            for part, rows in zip("qkv", value.chunk(3), strict=True):
                found[f"{before}.self_attn.{part}_proj.{kind}"] = rows.contiguous()
        else:
            found[key] = value
    return found


def clip_processor_config(
    size: int, mean: Sequence[float], std: Sequence[float], mode: str, interpolation: str
) -> dict[str, Any]:
    """Return transformers' `preprocessor_config.json`, with the resizing that evaluation does.

    Raises:
        UserError: images are padded, which its CLIPImageProcessor does not do.
    """
    if mode not in ("shortest", "squash"):
        raise UserError(
            f"resize_mode '{mode}' pads images to a square, which transformers' CLIPImageProcessor cannot do"
        )
    square = {"height": size, "width": size}
    return {
        "image_processor_type": "CLIPImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"shortest_edge": size} if mode == "shortest" else square,
        "resample": {name: number for number, name in RESAMPLING.items()}[interpolation],
        "do_center_crop": mode == "shortest",
        "crop_size": square,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(mean),
        "image_std": list(std),
    }


def is_clip_model_state(state: Mapping[str, Tensor]) -> bool:
    """Return whether a state dict is that of a CLIPModel."""
    return "vision_model.embeddings.class_embedding" in state
