"""The two towers, through open_clip: built by name, loaded from its checkpoints, saved as checkpoints that it opens.

The package's own architectures are JSON files in architectures/, in open_clip's format. A saved model is a folder with
`open_clip_config.json` and `open_clip_model.safetensors`. `open_clip.create_model_and_transforms("local-dir:FOLDER")`
opens it; so does `pretrained=FOLDER/open_clip_model.safetensors` if open_clip knows the architecture. With a Hugging
Face text tower the folder also holds that tower's config and tokenizer, and `load_model` opens it offline.

origin.py resolves names, weights.py reads files.
"""

from __future__ import annotations

import functools
import importlib.util
import json
import logging
import pickle
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from disttempnet.errors import UserError
from disttempnet.models.package import package_path
from disttempnet.models.weights import misfit, read_weights, refusal, without_prefix
from disttempnet.sanitize import brief

MODEL_FOLDER = Path(__file__).with_name("architectures")


def _allow_torchvision_without_native_ops() -> None:
    """Let torchvision's Python part load if its compiled part cannot.

    torchvision's wheels for Linux are built for CUDA. With a CPU-only torch their library does not load, and
    `import torchvision` fails as it registers two operators that this project never calls. Declaring these two is
    enough for open_clip, timm and the transforms.
    """
    spec = importlib.util.find_spec("torchvision")
    for folder in (spec.submodule_search_locations or []) if spec else []:
        for library in Path(folder).glob("_C*.so"):
            try:
                torch.ops.load_library(str(library))
            except OSError:
                stubs = torch.library.Library("torchvision", "FRAGMENT")
                for name in ("nms", "qnms"):
                    stubs.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
                _STUBS.append(stubs)


_STUBS: list[torch.library.Library] = []  # an operator lives as long as the library that declares it
_allow_torchvision_without_native_ops()

import open_clip  # noqa: E402
from open_clip.convert import convert_state_dict, load_big_vision_weights  # noqa: E402
from open_clip.model import convert_to_custom_text_state_dict, resize_pos_embed, resize_text_pos_embed  # noqa: E402
from open_clip.tokenizer import HFTokenizer  # noqa: E402
from timm.layers import resample_abs_pos_embed  # noqa: E402

from disttempnet.models import pretrained as parts  # noqa: E402 (torchvision is imported there too)
from disttempnet.models import transformers_clip  # noqa: E402
from disttempnet.models.origin import CONFIG_NAME as CONFIG_NAME  # noqa: E402
from disttempnet.models.origin import WEIGHTS_NAME as WEIGHTS_NAME  # noqa: E402
from disttempnet.models.origin import (  # noqa: E402
    Origin,
    find_origin,
    weights_lines,
)
from disttempnet.models.origin import is_random as is_random  # noqa: E402
from disttempnet.models.origin import read_target as read_target  # noqa: E402
from disttempnet.models.text import Tokenizer, accept_trimmed, trimming, wordwise  # noqa: E402

open_clip.add_model_config(MODEL_FOLDER)

PREPROCESS = {"mean": open_clip.OPENAI_DATASET_MEAN, "std": open_clip.OPENAI_DATASET_STD}


class Resizing(NamedTuple):
    """Resizing of an image to the towers' square in evaluation, as in open_clip's `preprocess_cfg`.

    Attributes:
        mode: `shortest` scales the shorter side and crops the centre, `longest` scales the longer side and pads with
            black, `squash` scales both.
        interpolation: `bicubic` or `bilinear`.
    """

    mode: str = "shortest"
    interpolation: str = "bicubic"


AS_CLIP = Resizing()
TEXT_POSITIONS = ("positional_embedding", "text.positional_embedding")
IMAGE_POSITIONS = ("visual.positional_embedding", "visual.trunk.pos_embed")
OPENAI = {"input_resolution", "context_length", "vocab_size"}  # keys beside the weights in OpenAI's own files


@dataclass(frozen=True)
class Towers:
    """An image and a text tower, with tokenizer and preprocessing.

    Attributes:
        name: as given to `load_model`.
        module: open_clip's model: `encode_image(pixels [b, 3, s, s])` and `encode_text(tokens [b, L])`.
        tokenizer: list of captions → int64 tokens [b, L].
        architecture: open_clip's `model_cfg`, as written into `open_clip_config.json`.
        image_size: side of the square input in pixels.
        mean, std: per channel, of pixels scaled to [0, 1].
        resizing: to that square; many published weights expect another one than CLIP's.
        notes: changes to the architecture or the weights that a reader of scores has to know, in words.
        weights: a line for each file or name that weights were read from; empty for random towers.
    """

    name: str
    module: open_clip.CLIP
    tokenizer: Tokenizer
    architecture: dict
    image_size: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    resizing: Resizing = AS_CLIP
    notes: tuple[str, ...] = ()
    weights: tuple[str, ...] = ()

    @property
    def embed_dim(self) -> int:
        return int(self.architecture["embed_dim"])


def load_model(
    name: str,
    pretrained: str = "",
    *,
    image_pretrained: str = "",
    text_pretrained: str = "",
    resize_positions: bool = False,
    context_length: int = 0,
    head: str = "",
) -> Towers:
    """Build towers by name, randomly initialised or with pretrained weights.

    Args:
        name: an open_clip architecture (`ViT-B-32`), one of the package's own, or the path of a JSON file with one.
            These are random unless `pretrained` is given. `hf-hub:ORG/NAME` and `local-dir:FOLDER` have weights.
        pretrained: weights of both towers: an open_clip tag, the path of a file (.safetensors, .pt), a folder written
            by save_model, open_clip or transformers (CLIPModel), `hf-hub:…` or `local-dir:…`. Their preprocessing is
            taken over.
        image_pretrained: weights of a timm image tower alone, with their normalisation: a file, a name in timm, or
            `package:MODULE/PATH`, a file in an installed package.
        text_pretrained: weights and tokenizer of a Hugging Face text tower alone: a folder, a name on the Hub, or
            `package:MODULE/PATH`.
        resize_positions: accept weights of another image size, and interpolate their position embeddings.
        context_length: tokens of a text; text positions of weights are interpolated to more, or cut to fewer; 0 = those
            of the architecture.
        head: projection on timm and Hugging Face towers, `linear` or `mlp`; empty = the architecture's own.

    Raises:
        UserError: unknown name or tag, missing weights or weights that do not fit, a damaged `open_clip_config.json`.

    Example:
        >>> towers = load_model("ViT-B-32", "openai")
        >>> features = encode_texts(towers, towers.tokenizer(["a photo of a cat"]))  # [1, 512]
    """
    image_pretrained = package_path(image_pretrained, "model.image_pretrained")
    text_pretrained = package_path(text_pretrained, "model.text_pretrained")

    # Silence libraries that warn about random weights, which may be intended here.
    silenced, root = logging.root.manager.disable, logging.getLogger()
    handlers = list(root.handlers)
    logging.disable(logging.WARNING)
    try:
        # Resolve the names to an architecture and a file, and read the file.
        origin = find_origin(name, pretrained, head)
        state, changes = _state(origin)
        architecture = {**origin.architecture, **changes}
        if context_length:
            architecture["text_cfg"] = {**architecture["text_cfg"], "context_length": context_length}

        # Build random towers, then fill them with the weights of both, or of the image tower.
        module, tokenizer = _build(name, architecture, origin, text_pretrained)
        notes = [*origin.notes, *(["QuickGELU, as OpenAI's weights expect"] if "quick_gelu" in changes else [])]
        if origin.weights is not None:
            notes += _fill(module, name, origin.weights, state, resize_positions, bool(context_length))
            notes += _squared(architecture)
        own = parts.load_image_tower(module, image_pretrained) if image_pretrained else {}
    except (RuntimeError, ValueError, OSError, pickle.UnpicklingError) as error:
        named = {"weights": pretrained, "image weights": image_pretrained, "text weights": text_pretrained}
        what = ", ".join([f"model '{name}'", *(f"{kind} '{path}'" for kind, path in named.items() if path)])
        raise UserError(f"{what} cannot be loaded: {brief(error)}") from None
    finally:
        logging.disable(silenced)
        root.handlers[:] = handlers

    # Let the text tower take trimmed tokens, and settle the preprocessing: CLIP's own unless the weights have another.
    accept_trimmed(module)
    preprocess = {**PREPROCESS, **origin.preprocess, **own}
    mode, interpolation = preprocess.get("resize_mode", "shortest"), preprocess.get("interpolation", "bicubic")
    size = module.visual.image_size
    return Towers(
        name=name,
        module=module,
        tokenizer=tokenizer,
        architecture=architecture,
        image_size=int(size if isinstance(size, int) else size[0]),
        mean=tuple(preprocess["mean"]),
        std=tuple(preprocess["std"]),
        resizing=Resizing(str(mode), str(interpolation)),
        notes=tuple(notes),
        weights=weights_lines(name, pretrained, origin.weights, image_pretrained, text_pretrained),
    )


def _state(origin: Origin) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the state dict of an origin's file, and the changes to the architecture that follow from it.

    These are a logit bias, and QuickGELU for OpenAI's own files.
    """
    if origin.weights is None or origin.weights.suffix == ".npz":
        return {}, {}
    state, changes = read_weights(origin.weights), dict[str, Any]()
    if transformers_clip.is_clip_model_state(state):
        if not origin.from_transformers:
            raise refusal(
                origin.weights,
                "it has the names of transformers' CLIPModel: name its folder, whose "
                f"{transformers_clip.HF_CONFIG_NAME} has the activation that it was trained with",
            )
        state = transformers_clip.open_clip_state(state)
    biases = [value for key, value in state.items() if key.split(".")[-1] == "logit_bias"]
    if biases and origin.architecture.get("init_logit_bias") is None:
        changes["init_logit_bias"] = float(biases[0])
    if state.keys() >= OPENAI and not origin.architecture.get("quick_gelu"):
        changes["quick_gelu"] = True
    return {key: value for key, value in state.items() if key not in OPENAI}, changes


def _build(name: str, architecture: dict, origin: Origin, text_pretrained: str) -> tuple[open_clip.CLIP, Tokenizer]:
    """Return a module, random except for the encoder of `text_pretrained`, and its tokenizer."""
    if parts.has_hf_text(architecture):
        beside = (
            origin.folder if origin.folder and (origin.folder / transformers_clip.HF_CONFIG_NAME).is_file() else None
        )
        source = text_pretrained or str(beside or architecture["text_cfg"]["hf_model_name"])
        module = parts.build_with_hf_text(architecture, source, with_weights=bool(text_pretrained))
        return module, parts.hf_tokenizer(source, module)
    if text_pretrained:
        raise UserError(f"model '{name}' has no Hugging Face text tower, which model.text_pretrained is for")
    wanted = deepcopy(architecture)
    wanted["vision_cfg"].pop("timm_model_pretrained", None)
    text_cfg = wanted["text_cfg"]
    # as open_clip's factory: these texts need a tower of their own, whatever the config says of it
    apart = text_cfg.get("text_arch") == "modern" or bool(text_cfg.get("variable_text"))
    kind = open_clip.CustomTextCLIP if wanted.pop("custom_text", False) or apart else open_clip.CLIP
    try:
        module = (open_clip.CoCa if "multimodal_cfg" in wanted else kind)(**wanted)
    except (TypeError, AttributeError, KeyError, AssertionError, ZeroDivisionError) as error:
        raise UserError(f"model '{name}': open_clip cannot build its architecture: {brief(error)}") from None
    return module, _tokenizer(name, architecture["text_cfg"], origin.folder)


def _tokenizer(name: str, text_cfg: dict, folder: Path | None) -> Tokenizer:
    """Return the tokenizer of one of open_clip's own text towers: captions → int64 tokens [b, L]."""
    if text_cfg.get("hf_tokenizer_name"):
        parts.import_transformers()
        return parts.pad_right(
            HFTokenizer(
                str(folder)
                if folder and (folder / "tokenizer_config.json").is_file()
                else text_cfg["hf_tokenizer_name"],
                context_length=text_cfg.get("context_length", 77),
                tokenizer_mode=text_cfg.get("tokenizer_mode"),
                **{**text_cfg.get("tokenizer_kwargs", {}), "trust_remote_code": False},
            )
        )
    kwargs = text_cfg.get("tokenizer_kwargs", {})
    if kind := text_cfg.get("tokenizer_type"):
        return _tokenizer_of_kind(kind, text_cfg, kwargs)
    if name in open_clip.list_models():
        return wordwise(open_clip.get_tokenizer(name, context_length=text_cfg.get("context_length", 77)))
    return wordwise(open_clip.SimpleTokenizer(context_length=text_cfg.get("context_length", 77), **kwargs))


def _squared(architecture: dict) -> list[str]:
    """Return the note on a tower that was trained on images of any shape (NaFlex, since open_clip 4)."""
    vision = architecture["vision_cfg"]
    if not str(vision.get("timm_model_name", "")).startswith("naflex"):
        return []
    return [f"NaFlex: images are squares of {vision.get('image_size', 224)} pixels, where open_clip keeps their shape"]


def _tokenizer_of_kind(kind: str, text_cfg: dict, kwargs: dict) -> Tokenizer:
    """Return a tokenizer of a `tokenizer_type`, which configs name since open_clip 4.

    Raises:
        UserError: it is another one than tiktoken's, or tiktoken is not installed.
    """
    if kind != "tiktoken":
        raise UserError(f"a text tower of tokenizer_type '{kind}'; known: tiktoken")
    if importlib.util.find_spec("tiktoken") is None:
        raise UserError("its tokenizer needs tiktoken: python -m pip install tiktoken")
    # An open_clip that builds such a text tower has this class.
    made: Tokenizer = open_clip.tokenizer.TikTokenTokenizer(
        encoding_name=text_cfg.get("tiktoken_name", "cl100k_base"),
        context_length=text_cfg.get("context_length", 77),
        **{key: value for key, value in kwargs.items() if key in ("add_bos", "add_eos", "clean")},
    )
    return made


def _fill(
    module: open_clip.CLIP, name: str, path: Path, state: dict[str, Tensor], resize: bool, other_length: bool
) -> list[str]:
    """Load the weights of a file into a module, in place; returns notes on changes to them.

    Args:
        module: the towers.
        name, path: for messages.
        state: of the file, in open_clip's names or older variants; empty for the arrays of big_vision.
        resize: interpolate image positions to another number of them.
        other_length: do so with text positions.

    Raises:
        UserError: they are of another model.
    """
    if path.suffix == ".npz":
        if other_length:
            raise UserError("model.context_length: text positions of big_vision's arrays are not changed: leave it out")
        _fill_from_big_vision(module, name, path)
        return []
    own = module.state_dict()
    state = _as_open_clip(module, without_prefix(path, state, [key for key in own if key.startswith("visual.")]))
    if wrong := misfit(state, own, (*TEXT_POSITIONS, *IMAGE_POSITIONS)):
        raise refusal(path, f"not weights of {name}: {wrong}")
    notes = _fit_text_positions(module, path, state, own, other_length)
    notes += _fit_image_positions(module, path, state, own, resize)
    module.load_state_dict(state, strict=False)
    return notes


def _fill_from_big_vision(module: open_clip.CLIP, name: str, path: Path) -> None:
    try:
        load_big_vision_weights(module, str(path))
    except Exception as error:  # open_clip looks its arrays up one by one, whatever the model
        raise refusal(path, f"not big_vision's weights of {name}: {brief(error)}") from None


def _as_open_clip(module: open_clip.CLIP, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return a state dict in this module's names and shapes; older files have others for text tower and scale."""
    state = dict(convert_state_dict(module, state))
    own = module.state_dict()
    if "positional_embedding" in state and "positional_embedding" not in own:
        state = convert_to_custom_text_state_dict(state)
    if "text.positional_embedding" in state and "positional_embedding" in own:
        state = {key.removeprefix("text."): value for key, value in state.items()}
    if "logit_bias" in own and "logit_scale" in state:  # a model without one adds nothing
        state.setdefault("logit_bias", torch.zeros_like(state["logit_scale"]))
    for key in ("logit_scale", "logit_bias"):
        if key in state and key in own and state[key].numel() == 1:
            state[key] = state[key].reshape(own[key].shape)
    counters = [key for key in state if key.endswith("embeddings.position_ids") and key not in own]
    return {key: value for key, value in state.items() if key not in counters}


def _fit_text_positions(
    module: open_clip.CLIP, path: Path, state: dict[str, Tensor], own: dict[str, Tensor], wanted: bool
) -> list[str]:
    """Bring text positions of weights to the number of the model, in place; refuse another one unless it is wanted.

    More positions are interpolated: every caption lies at other ones than in pretraining. Fewer are the first ones:
    a causal tower gives short captions the same features with them; in others a caption ends elsewhere.

    Raises:
        UserError: another number that was not asked for, or fewer positions of a tower that is not causal.
    """
    for key in TEXT_POSITIONS:
        if key not in own or len(state[key]) == len(own[key]):
            continue
        before, now = len(state[key]), len(own[key])
        what = f"weights '{path}' have {before} text positions, the model has {now}"
        if not wanted:
            # open_clip would interpolate them, and scores would be wrong in silence
            raise UserError(
                f"{what}: name the architecture that they were trained with, open a saved folder as local-dir:FOLDER, "
                "or train with another number by model.context_length"
            )
        if now > before:
            resize_text_pos_embed(state, module)
            return [f"{what}, to which they were interpolated: train it before captions are embedded"]
        if trimming(module) is None:
            raise UserError(f"{what}: only causal text towers can do with fewer: leave model.context_length out")
        state[key] = state[key][:now]
        return [f"{what}: the first ones are kept"]
    return []


def _fit_image_positions(
    module: open_clip.CLIP, path: Path, state: dict[str, Tensor], own: dict[str, Tensor], resize: bool
) -> list[str]:
    """Interpolate the image positions of weights of another image size, in place; refuse them without `resize`."""
    key = next((key for key in IMAGE_POSITIONS if key in own), None)
    if key is None or state[key].shape == own[key].shape:
        return []
    before, now = (value.shape[-2] for value in (state[key], own[key]))
    what = f"weights '{path}' are of another image size: {before} image positions, the model has {now}"
    if not resize:
        raise UserError(
            f"{what}: name the architecture of their size, or interpolate them with model.resize_positions=true "
            "(evaluate, embed: --resize-positions)"
        )
    if key == IMAGE_POSITIONS[0]:
        resize_pos_embed(state, module)
    else:
        trunk = module.visual.trunk
        state[key] = resample_abs_pos_embed(
            state[key], list(trunk.patch_embed.grid_size), num_prefix_tokens=trunk.num_prefix_tokens
        )
    return [f"{what}, to which they were interpolated"]


def save_model(
    towers: Towers, folder: Path, logit_scale: float, logit_bias: float | None = None, ema: float = 0.0
) -> None:
    """Write the towers as a folder that open_clip opens.

    Args:
        towers: to save.
        folder: an existing folder; files of the same name are replaced.
        logit_scale: open_clip's zero-shot code multiplies similarities by it: one over τ.
        logit_bias: added to them (SigLIP); None keeps the towers' own, if they have one.
        ema: decay of the moving average that the weights are (train.ema), which a note says when they are opened; 0 =
            they are none.
    """
    from safetensors.torch import save_file

    # Write the weights, with scale and bias of the objective.
    weights = {key: value.detach().cpu().contiguous() for key, value in towers.module.state_dict().items()}
    weights["logit_scale"] = torch.tensor(logit_scale).log().to(weights["logit_scale"].dtype)
    architecture = towers.architecture
    if logit_bias is not None:
        weights["logit_bias"] = torch.full_like(weights["logit_scale"], logit_bias)
        architecture = {**architecture, "init_logit_bias": logit_bias}
    save_file(weights, folder / WEIGHTS_NAME)

    # Write what is needed to open them: the text tower's own files, architecture and preprocessing.
    if parts.has_hf_text(architecture):
        parts.save_hf_text(towers.module, towers.tokenizer, folder)
    config: dict[str, Any] = {
        "model_cfg": architecture,
        "preprocess_cfg": {
            "mean": list(towers.mean),
            "std": list(towers.std),
            "interpolation": towers.resizing.interpolation,
            "resize_mode": towers.resizing.mode,
        },
    }
    config |= {"train_ema": ema} if ema else {}
    (folder / CONFIG_NAME).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def encode_images(towers: Towers, pixels: Tensor, normalize: bool = True) -> Tensor:
    """Embed images: pixels [b, 3, s, s] → features [b, D].

    Args:
        towers: on the device of the pixels.
        pixels: uint8, 0 to 255; they are scaled and normalised here.
        normalize: return unit features.

    Raises:
        ValueError: pixels of another type; floats are usually scaled already.
    """
    if pixels.dtype != torch.uint8:
        raise ValueError(
            f"pixels must be uint8, 0 to 255, got {pixels.dtype}: encode_images scales and normalises them"
        )
    mean, std = (_channels(tuple(values), pixels.device) for values in (towers.mean, towers.std))
    scaled = pixels.float().div_(255).sub_(mean).div_(std)
    # channels last: convolutions run up to 1.7 times faster on CPU, and on tensor cores
    return towers.module.encode_image(scaled.contiguous(memory_format=torch.channels_last), normalize=normalize)


@functools.cache
def _channels(values: tuple[float, ...], device: torch.device) -> Tensor:
    """Return [1, 3, 1, 1] on a device; cached, as each transfer to a GPU makes the host wait."""
    return torch.tensor(values, device=device).view(1, 3, 1, 1)


def encode_texts(towers: Towers, tokens: Tensor, normalize: bool = True) -> Tensor:
    """Embed texts: int64 tokens [b, L], trimmed or not (text.py) → features [b, D], unit if `normalize`."""
    return towers.module.encode_text(tokens, normalize=normalize)
