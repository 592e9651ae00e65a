"""The two towers, through open_clip: by name, from its checkpoints and into checkpoints that it opens.

Own architectures are JSON files in models/, in open_clip's format. A saved model is a folder with
`open_clip_config.json` and `open_clip_model.safetensors`: `open_clip.create_model_and_transforms("local-dir:FOLDER")`
opens it, and so does `pretrained=FOLDER/open_clip_model.safetensors` where open_clip knows the architecture. With a
Hugging Face text tower the folder also holds that tower's config and tokenizer, and `load_model` opens it, offline.
"""

from __future__ import annotations

import functools
import importlib.util
import json
import logging
import pickle
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from disttempnet.errors import UserError, unknown_name

MODEL_FOLDER = Path(__file__).parent / "models"
WEIGHTS_NAME = "open_clip_model.safetensors"
CONFIG_NAME = "open_clip_config.json"


def _allow_torchvision_without_native_ops() -> None:
    """Let torchvision's Python part load where its compiled part cannot.

    The wheels that package registries carry for Linux are built for CUDA; beside a CPU-only torch their library
    does not load and `import torchvision` fails at registering two operators that this project never calls.
    Declaring these two is enough for everything used here (open_clip, timm, transforms).
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


_STUBS: list[torch.library.Library] = []  # an operator lives as long as the library object that declared it
_allow_torchvision_without_native_ops()

import open_clip  # noqa: E402
from open_clip.factory import load_checkpoint, load_state_dict  # noqa: E402

from disttempnet import pretrained as parts  # noqa: E402 (torchvision is imported there too)
from disttempnet.texts import Tokenizer, accept_trimmed, wordwise  # noqa: E402

open_clip.add_model_config(MODEL_FOLDER)

PREPROCESS = {"mean": open_clip.OPENAI_DATASET_MEAN, "std": open_clip.OPENAI_DATASET_STD}


class Resizing(NamedTuple):
    """How evaluation makes the towers' square of an image; what open_clip's `preprocess_cfg` says of it.

    Attributes:
        mode: `shortest` side to that of the square, and its centre; `longest` side, on black; `squash`, both sides.
        interpolation: `bicubic` or `bilinear`.
    """

    mode: str = "shortest"
    interpolation: str = "bicubic"


AS_CLIP = Resizing()


@dataclass(frozen=True)
class Towers:
    """An image and a text tower with what is needed to feed them.

    Attributes:
        module: open_clip's model: `encode_image(pixels [b, 3, s, s])` and `encode_text(tokens [b, L])`.
        tokenizer: list of captions → int64 tokens [b, L].
        architecture: open_clip's `model_cfg`, as written into `open_clip_config.json`.
        image_size: side of the square input in pixels.
        mean, std: per channel, of pixels scaled to [0, 1].
        resizing: how an image becomes that square; many published weights want another than CLIP's own.
    """

    name: str
    module: open_clip.CLIP
    tokenizer: Tokenizer
    architecture: dict
    image_size: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    resizing: Resizing = AS_CLIP

    @property
    def embed_dim(self) -> int:
        return int(self.architecture["embed_dim"])


def load_model(name: str, pretrained: str = "", *, image_pretrained: str = "", text_pretrained: str = "") -> Towers:
    """Build towers by name, randomly initialised or from weights.

    Args:
        name: an open_clip architecture (`ViT-B-32`), one of the package's own, `hf-hub:…` or `local-dir:FOLDER`.
        pretrained: weights of both towers: an open_clip tag, the path of a file (.safetensors, .pt), or a saved
            model's folder, which also says how its pixels are normalised.
        image_pretrained: weights of a timm image tower alone, and the normalisation that goes with them: a file, or
            a name that timm knows.
        text_pretrained: weights and tokenizer of a Hugging Face text tower alone: a folder, or a name of the hub.

    Raises:
        UserError: unknown name or tag, missing or unfitting weights, a damaged `open_clip_config.json`.
    """
    folder = _saved_folder(pretrained)
    weights = str(folder / WEIGHTS_NAME) if folder else pretrained
    schema = name.startswith(("hf-hub:", "local-dir:"))
    if not schema and name not in open_clip.list_models():
        raise UserError(unknown_name("model", name, open_clip.list_models()))
    given: dict = {}
    saved: dict = {}
    if folder and (folder / CONFIG_NAME).is_file():
        given, saved = _read_config(folder, "preprocess_cfg"), _read_config(folder, "model_cfg")
    silenced, root = logging.root.manager.disable, logging.getLogger()
    handlers = list(root.handlers)
    logging.disable(logging.WARNING)  # open_clip warns about random weights, which is what is asked for here
    try:
        # open_clip reads no weights beside a schema: a saved folder then stands for the one it began from
        origin = f"local-dir:{folder}" if schema and saved else name
        architecture = _architecture(origin)
        if "init_logit_bias" in saved:
            architecture["init_logit_bias"] = saved["init_logit_bias"]
        module, tokenizer = _build(origin, architecture, folder, weights, text_pretrained)
        _refuse_stretched_positions(module, weights)
        if image_pretrained:
            given = given | parts.load_image_tower(module, image_pretrained)
    except (RuntimeError, ValueError, OSError, SafetensorError, pickle.UnpicklingError) as error:
        named = {"weights": weights, "image weights": image_pretrained, "text weights": text_pretrained}
        what = ", ".join([f"model '{name}'", *(f"{kind} '{path}'" for kind, path in named.items() if path)])
        raise UserError(f"{what} cannot be loaded: {' '.join(str(error).split())[:300]}") from None
    finally:
        logging.disable(silenced)
        root.handlers[:] = handlers
    accept_trimmed(module)
    preprocess = {**PREPROCESS, **open_clip.get_model_preprocess_cfg(module), **given}
    size = preprocess["size"]
    return Towers(
        name=name,
        module=module,
        tokenizer=tokenizer,
        architecture=architecture,
        image_size=int(size if isinstance(size, int) else size[0]),
        mean=tuple(preprocess["mean"]),
        std=tuple(preprocess["std"]),
        resizing=Resizing(
            str(preprocess.get("resize_mode", "shortest")), str(preprocess.get("interpolation", "bicubic"))
        ),
    )


def _build(
    name: str, architecture: dict, folder: Path | None, weights: str, text_pretrained: str
) -> tuple[open_clip.CLIP, Tokenizer]:
    """The module, with the weights of both towers if there are any, and its tokenizer."""
    if parts.has_hf_text(architecture) and not name.startswith("hf-hub:") and (not weights or Path(weights).is_file()):
        local = _saved_folder(name.removeprefix("local-dir:")) if name.startswith("local-dir:") else None
        beside = [where for where in (folder, local) if where and (where / parts.HF_CONFIG_NAME).is_file()]
        source = text_pretrained or str(beside[0] if beside else architecture["text_cfg"]["hf_model_name"])
        module = parts.build_with_hf_text(architecture, source, with_weights=bool(text_pretrained))
        if not weights and local and (local / WEIGHTS_NAME).is_file():
            weights = str(local / WEIGHTS_NAME)
        if weights:
            load_checkpoint(module, weights, strict=True)
        return module, parts.hf_tokenizer(source, module)
    if text_pretrained:
        raise UserError(f"model '{name}' has no Hugging Face text tower that model.text_pretrained could be for")
    bias = {key: architecture[key] for key in ("init_logit_bias",) if key in architecture}
    module = open_clip.create_model(name, pretrained=weights or None, **bias)
    return module, wordwise(open_clip.get_tokenizer(name))


def _refuse_stretched_positions(module: open_clip.CLIP, weights: str) -> None:
    """open_clip fits the text positions of a file to a model with more or fewer of them by interpolation: captions
    lie at other places then, and scores are wrong without a word."""
    if not Path(weights).is_file() or Path(weights).suffix in (".npz", ".npy"):
        return  # a tag, or big_vision arrays: those stand for one architecture
    if weights.endswith(".safetensors"):
        with safe_open(weights, "pt") as file:
            shapes = {key: file.get_slice(key).get_shape() for key in file.keys()}  # noqa: SIM118 (no dict)
    else:
        shapes = {key: value.shape for key, value in load_state_dict(weights).items() if hasattr(value, "shape")}
    own = module.state_dict()
    for key in ("positional_embedding", "text.positional_embedding"):
        name = key if key in own else f"text.{key}"
        if key in shapes and name in own and shapes[key][0] != own[name].shape[0]:
            raise UserError(
                f"weights '{weights}' have {shapes[key][0]} text positions, the model has {own[name].shape[0]}: name "
                "the architecture that they were trained with, or open a saved folder as local-dir:FOLDER"
            )


def _saved_folder(pretrained: str) -> Path | None:
    """The folder of a saved model that a path means: itself, or its file of weights."""
    path = Path(pretrained)
    if path.name == WEIGHTS_NAME and (path.parent / CONFIG_NAME).is_file():
        return path.parent
    return path if pretrained and path.is_dir() else None


def _architecture(name: str) -> dict:
    if name.startswith("local-dir:"):
        return _read_config(Path(name.removeprefix("local-dir:")), "model_cfg")
    return open_clip.get_model_config(name.split("/")[-1] if name.startswith("hf-hub:") else name) or {}


def _read_config(folder: Path, section: str) -> dict:
    """A section of a folder's `open_clip_config.json`."""
    path = folder / CONFIG_NAME
    try:
        return dict(json.loads(path.read_text(encoding="utf-8"))[section])
    except (OSError, ValueError, TypeError, KeyError) as error:
        why = error.strerror if isinstance(error, OSError) else f"not an open_clip config with a '{section}'"
        raise UserError(f"{path}: {why}") from None


def save_model(towers: Towers, folder: Path, logit_scale: float, logit_bias: float | None = None) -> None:
    """Write the towers as a folder that open_clip opens.

    Args:
        folder: an existing folder; files of the same name are replaced.
        logit_scale: the inverse temperature exp(·) that open_clip's zero-shot code multiplies similarities with.
        logit_bias: what it adds to them then (SigLIP); None leaves the towers' own, which most have not.
    """
    from safetensors.torch import save_file

    weights = {key: value.detach().cpu().contiguous() for key, value in towers.module.state_dict().items()}
    weights["logit_scale"] = torch.tensor(logit_scale).log().to(weights["logit_scale"].dtype)
    architecture = towers.architecture
    if logit_bias is not None:
        weights["logit_bias"] = torch.full_like(weights["logit_scale"], logit_bias)
        architecture = {**architecture, "init_logit_bias": logit_bias}
    save_file(weights, folder / WEIGHTS_NAME)
    if parts.has_hf_text(architecture):
        parts.save_hf_text(towers.module, towers.tokenizer, folder)
    config = {
        "model_cfg": architecture,
        "preprocess_cfg": {
            "mean": list(towers.mean),
            "std": list(towers.std),
            "interpolation": towers.resizing.interpolation,
            "resize_mode": towers.resizing.mode,
        },
    }
    (folder / CONFIG_NAME).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def encode_images(towers: Towers, pixels: Tensor, normalize: bool = True) -> Tensor:
    """uint8 pixels [b, 3, s, s] → features [b, D], unit if normalize; pixels are scaled on their device."""
    mean, std = (_channels(tuple(values), pixels.device) for values in (towers.mean, towers.std))
    scaled = pixels.float().div_(255).sub_(mean).div_(std)
    # channels last: convolutions run up to 1.7 times faster on CPU, and on tensor cores
    return towers.module.encode_image(scaled.contiguous(memory_format=torch.channels_last), normalize=normalize)


@functools.cache
def _channels(values: tuple[float, ...], device: torch.device) -> Tensor:
    """[1, 3, 1, 1] on a device; kept, since the host waits for a GPU with every number that it sends there."""
    return torch.tensor(values, device=device).view(1, 3, 1, 1)


def encode_texts(towers: Towers, tokens: Tensor, normalize: bool = True) -> Tensor:
    """int64 tokens [b, L], trimmed or not (texts.py) → features [b, D], unit if normalize."""
    return towers.module.encode_text(tokens, normalize=normalize)
