"""`disttempnet import`: a checkpoint of the first code → a run folder.

Its files hold `{'model', 'optimizer', 'lr_scheduler', 'args', 'epoch'}` (checkpoint_best.pth) or `{'model'}` alone
(checkpoint_10.pth), with args.json beside them. The towers and the temperature networks are taken over to the letter.
The normalisers u were never saved, so that a run cannot go on from such a file; its weights can be trained on.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from disttempnet.config import config_from_table, dump_config
from disttempnet.errors import UserError
from disttempnet.io.files import read_object, write_atomically
from disttempnet.losses import Objective
from disttempnet.migrate.first_code import FIRST_CODE_FLAGS, first_code_settings
from disttempnet.migrate.flags import Values
from disttempnet.migrate.script import Word
from disttempnet.migrate.settings import RunSettings
from disttempnet.models import Towers, load_model
from disttempnet.models.weights import WRAPPERS, listed, misfit, read_training_state, refusal
from disttempnet.training.checkpoint import TrainState, save_checkpoint
from disttempnet.training.model import build_objective, resolved
from disttempnet.training.run_info import process_provenance

HEAD_WIDTH = 64  # of the first code's transformers: 768 / 12 and 512 / 8
CONTEXT = {"Transformer": 77, "distilbert-base-uncased": 30}
VIT_B_32 = {
    "embed_dim": 512,
    "vision_cfg": {"image_size": 224, "layers": 12, "width": 768, "patch_size": 32},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 512, "heads": 8, "layers": 12},
}
# arguments that the code itself adds to those of the command line
OF_THE_PROCESS = {
    "gpu", "rank", "dist_backend", "data_number", "test_coco_file", "coco_image_root", "val_flickr_file",
    "test_flickr_file", "flickr_image_root", "local_rank",
}  # fmt: skip
NETWORK_NAMES = {  # of a temperature network there → here
    "proj.weight": "weight", "proj.bias": "bias", "scaler": "scaler", "prototypes": "prototypes",
    "linear_1.weight": "out_weight_1", "linear_1.bias": "out_bias", "linear_2.weight": "out_weight_2",
}  # fmt: skip
LEARNED_BOUNDS = (0.001, 0.5)  # that code clamps a learned τ to these before every step


@dataclass
class ImportedRun:
    """A run folder that was written.

    Attributes:
        folder: of the run.
        checkpoint: in it.
        notes: what was taken over, left out and assumed.
    """

    folder: Path
    checkpoint: Path
    notes: list[str] = field(default_factory=list)


@dataclass
class _Parts:
    """The state dict of a file, sorted.

    Attributes:
        image, text: keys of the towers, without their prefixes.
        image_projection, text_projection: of ResNet-50 and of a Hugging Face encoder; else empty.
        networks: side → parameters of its temperature network.
        tau: a learned τ, or tables of them.
        logit_scale: never trained there.
        dropped: keys that are not needed.
    """

    image: dict[str, Tensor] = field(default_factory=dict)
    text: dict[str, Tensor] = field(default_factory=dict)
    image_projection: dict[str, Tensor] = field(default_factory=dict)
    text_projection: dict[str, Tensor] = field(default_factory=dict)
    networks: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    tau: dict[str, Tensor] = field(default_factory=dict)
    logit_scale: float | None = None
    dropped: list[str] = field(default_factory=list)


def import_checkpoint(
    path: Path, out: Path, given: Mapping[str, str] | None = None, text_encoder: str = ""
) -> ImportedRun:
    """Write a run folder from a checkpoint of the first code.

    Args:
        path: a .pth file.
        out: the run folder; it must not exist.
        given: arguments of that run by name (`rho`, `ita_type`), where the file and args.json do not have them.
        text_encoder: folder or Hub name with config and tokenizer of a Hugging Face text encoder; empty = its name.

    Raises:
        UserError: another kind of file, unknown or missing weights, an argument that is needed and not known.
    """
    if out.exists():
        raise UserError(f"--out {out}: exists already: choose another folder, or remove it")
    content = read_training_state(path, {"argparse.Namespace": argparse.Namespace})
    state, parts = _sorted(path, content)
    notes: list[str] = []
    arguments = _arguments(path, content, parts, given or {}, notes)

    # The towers, opened as any folder with an architecture is, which checks every key and shape.
    architecture, weights = _towers_of(path, parts, arguments, notes)
    towers = _opened(path, architecture, weights, text_encoder)

    # The config of that run, by the same tables as `migrate`, and its objective.
    settings = _settings(arguments, parts, notes)
    _name_run(settings, out)
    step = _step(path, content, arguments, settings, notes)
    known = towers.architecture == VIT_B_32
    target = out / "checkpoints" / f"step-{step:08d}"
    settings.table["model.name"] = "ViT-B-32" if known else f"local-dir:{target}"
    config = resolved(config_from_table(settings.nested(), str(path)))
    loss = build_objective(config, 1, towers.embed_dim)
    _fill_networks(path, loss, parts)

    # Say what was left, and write it as any checkpoint.
    left = sorted(content.keys() - {"model", "args", "epoch"} - state.keys())
    if left:
        notes.append(
            f"not taken over: {', '.join(left)} (u was never saved: this run cannot go on, a new one can begin)"
        )
    if parts.dropped:
        notes.append(f"not needed: {listed(parts.dropped, 8)}")
    scale = _logit_scale(parts, config.loss.arguments.get("temperature"))
    save_checkpoint(
        out, towers=towers, loss=loss, optimizers=[], config=config, index_digest=f"imported from {path.name}",
        logit_scale=scale, logit_bias=None, state=TrainState(step), keep=1,
    )  # fmt: skip
    write_atomically(out / "config.toml", dump_config(config))
    facts = {**process_provenance(), "imported": {"file": path.name, "notes": notes}, "model_notes": notes}
    write_atomically(out / "run.json", json.dumps(facts, indent=2, ensure_ascii=False) + "\n")
    return ImportedRun(out, target, notes)


def _sorted(path: Path, content: Any) -> tuple[dict[str, Tensor], _Parts]:
    """Return the state dict of a file, and its keys sorted by what they belong to.

    Raises:
        UserError: no state dict of the first code, or keys that it does not have.
    """
    state = content.get("model", content) if isinstance(content, Mapping) else None
    if not isinstance(state, Mapping) or not all(isinstance(value, Tensor) for value in state.values()):
        raise refusal(path, "it has no 'model' with weights, as checkpoints of DistTempNet's first code have")
    state = {WRAPPERS.sub("", str(key)).removeprefix("module."): value for key, value in state.items()}
    parts, unknown = _Parts(), list[str]()
    for key, value in state.items():
        head, _, rest = key.partition(".")
        if head == "visual_encoder":
            parts.image[rest] = value
        elif head == "text_encoder":
            (parts.dropped.append(key) if _is_not_needed(rest) else parts.text.update({rest: value}))
        elif head in ("vision_proj", "text_proj"):
            (parts.image_projection if head == "vision_proj" else parts.text_projection)[rest] = value
        elif found := re.fullmatch(r"criterion\.(image|text)_temp_gen\.(.+)", key):
            parts.networks.setdefault(found[1], {})[found[2]] = value
        elif key == "logit_scale":
            parts.logit_scale = float(value.reshape(-1)[0].exp())
        elif key in ("temp", "image_temp", "text_temp"):
            parts.tau[key] = value
        elif key in ("criterion.temperature", "criterion.image_tau", "criterion.text_tau"):
            parts.dropped.append(key)  # the same parameter under its second name
        else:
            unknown.append(key)
    if not parts.image or not parts.text:
        raise refusal(path, f"it has no visual_encoder and text_encoder, only {listed(state)}: not of the first code")
    if unknown:
        raise refusal(path, f"it has keys that the first code does not have: {listed(unknown)}")
    return state, parts


def _is_not_needed(key: str) -> bool:
    """Return whether a key of a text encoder changes no feature."""
    return key == "attn_mask" or key.endswith("position_ids") or key.startswith("pooler.")


def _arguments(path: Path, content: Any, parts: _Parts, given: Mapping[str, str], notes: list[str]) -> dict[str, Any]:
    """Return the arguments of the run: from the file, from args.json beside it, or given."""
    found = content.get("args") if isinstance(content, Mapping) else None
    if isinstance(found, argparse.Namespace):
        arguments = dict(vars(found))
    elif arguments := read_object(path.parent / "args.json"):
        notes.append(f"arguments of the run: from {path.parent / 'args.json'}")
    if not arguments:
        notes.append(
            "the file has no arguments, and there is no args.json beside it: where the command gives none, the code's "
            "defaults are assumed"
        )
    names = {name.lstrip("-").replace("-", "_") for name in FIRST_CODE_FLAGS}
    for name, value in given.items():
        if name not in names:
            raise UserError(f"{name}={value}: the first code has no argument of that name")
        arguments[name] = value
    if parts.networks:
        if arguments.setdefault("ita_type", "isogclr_tempnet") != "isogclr_tempnet":
            raise UserError(f"{path}: has temperature networks, but ita_type is {arguments['ita_type']!r}")
        if "rho" not in arguments:
            raise UserError(
                f"{path}: its temperature networks divide by ρ, which neither the file nor an args.json beside it has: "
                "add rho=9.5 (or what it was) to the command"
            )
    elif parts.tau:
        arguments.setdefault("ita_type", "clip")
        arguments.setdefault("learnable_temp", True)
        arguments.setdefault("personalized_tau", "temp" not in parts.tau)
    elif arguments.get("ita_type") == "isogclr":
        notes.append("τ of each sample was never saved: all begin at .01")
    if "ita_type" not in arguments:
        arguments["ita_type"] = "clip"
        notes.append("objective: unknown; taken for CLIP with a constant τ of .01 (add ita_type=… if it was another)")
    added = sorted(arguments.keys() - names)
    if unusual := [name for name in added if name not in OF_THE_PROCESS]:
        notes.append(f"arguments without a meaning here: {listed(unusual, 8)}")
    return arguments


def _towers_of(
    path: Path, parts: _Parts, arguments: Mapping[str, Any], notes: list[str]
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return architecture and weights of the towers in open_clip's names."""
    vit_text = "token_embedding.weight" in parts.text
    if "class_embedding" in parts.image and vit_text:
        return _vit(path, parts)
    if "class_embedding" in parts.image or vit_text or not parts.image_projection or not parts.text_projection:
        raise refusal(
            path,
            "its towers are neither ViT and text transformer, nor ResNet and a Hugging Face encoder with their "
            "projections vision_proj and text_proj",
        )
    return _resnet(parts, arguments, notes)


def _vit(path: Path, parts: _Parts) -> tuple[dict[str, Any], dict[str, Tensor]]:
    try:
        patches, text = parts.image["conv1.weight"], parts.text["token_embedding.weight"]
        positions, width = parts.image["positional_embedding"], patches.shape[0]
        architecture = {
            "embed_dim": parts.image["proj"].shape[1],
            "vision_cfg": {
                "image_size": math.isqrt(len(positions) - 1) * patches.shape[-1],
                "layers": _layers(parts.image),
                "width": width,
                "patch_size": patches.shape[-1],
            },
            "text_cfg": {
                "context_length": len(parts.text["positional_embedding"]),
                "vocab_size": text.shape[0],
                "width": text.shape[1],
                "heads": max(1, text.shape[1] // HEAD_WIDTH),
                "layers": _layers(parts.text),
            },
        }
    except (KeyError, IndexError) as error:
        raise refusal(path, f"its towers lack {error}") from None
    weights = {f"visual.{key}": value for key, value in parts.image.items()} | parts.text
    return architecture, weights


def _layers(tower: Mapping[str, Tensor]) -> int:
    return 1 + max((int(key.split(".")[2]) for key in tower if key.startswith("transformer.resblocks.")), default=-1)


def _resnet(parts: _Parts, arguments: Mapping[str, Any], notes: list[str]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    encoder = str(arguments.get("text_encoder", "distilbert-base-uncased"))
    size = int(arguments.get("image_res", 256))
    if "image_res" not in arguments:
        notes.append("image size: 256 pixels, the code's default (add image_res=… if it was another)")
    architecture = {
        "embed_dim": parts.image_projection["weight"].shape[0],
        "vision_cfg": {
            "timm_model_name": str(arguments.get("image_encoder", "resnet50")),
            "timm_model_pretrained": False,
            "timm_pool": "avg",
            "timm_proj": "linear",
            "timm_proj_bias": True,
            "image_size": size,
        },
        "text_cfg": {
            "hf_model_name": encoder,
            "hf_tokenizer_name": encoder,
            "hf_pooler_type": "cls_last_hidden_state_pooler",
            "hf_proj_type": "linear",
            "hf_proj_bias": True,
            "context_length": 30,
        },
    }
    weights = {f"visual.trunk.{key}": value for key, value in parts.image.items()}
    weights |= {f"visual.head.proj.{key}": value for key, value in parts.image_projection.items()}
    weights |= {f"text.transformer.{key}": value for key, value in parts.text.items()}
    weights |= {f"text.proj.{key}": value for key, value in parts.text_projection.items()}
    notes.append("pixels are normalised as for CLIP, as there")
    return architecture, weights


def _opened(path: Path, architecture: dict[str, Any], weights: Mapping[str, Tensor], text_encoder: str) -> Towers:
    """Return the towers of an architecture with these weights.

    Raises:
        UserError: a key is missing or of another shape; the encoder's config or tokenizer is not at hand.
    """
    wanted = json.loads(json.dumps(architecture))
    if "hf_model_name" in wanted["text_cfg"]:
        source = text_encoder or wanted["text_cfg"]["hf_model_name"]
        wanted["text_cfg"] |= {"hf_model_name": source, "hf_tokenizer_name": source}
    scale = {"logit_scale": torch.tensor(1 / 0.07).log()}  # the run's own follows when it is saved
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        described = {"model_cfg": wanted, "preprocess_cfg": {}}
        (folder / "open_clip_config.json").write_text(json.dumps(described), encoding="utf-8")
        file = folder / "open_clip_model.safetensors"
        save_file({key: value.contiguous() for key, value in {**weights, **scale}.items()}, file)
        try:
            towers = load_model(f"local-dir:{folder}")
        except UserError as error:
            hint = "" if text_encoder or "hf_model_name" not in wanted["text_cfg"] else _ABOUT_ENCODER
            named = str(error).replace(str(file), str(path)).replace(f"local-dir:{folder}", "the first code's towers")
            raise UserError(f"{named}{hint}") from None
    return replace(towers, name="", architecture=architecture)


_ABOUT_ENCODER = "; --text-encoder FOLDER names a folder with the encoder's config and tokenizer"


def _settings(arguments: dict[str, Any], parts: _Parts, notes: list[str]) -> RunSettings:
    """Return the config of the run, with the objective that its checkpoint can be opened with."""
    given: dict[str, tuple[Word, ...]] = {}
    for name, flag in FIRST_CODE_FLAGS.items():
        value = arguments.get(name.lstrip("-").replace("-", "_"))
        if value is None or value == "" or (flag.kind is bool and str(value).lower() in ("false", "0", "")):
            continue
        given[name] = () if flag.kind is bool else (Word(str(value)),)
    program = "clip_cc12m.py" if "--train-data" in given else "clip_cc3m.py"
    if "--world_size" not in given:
        notes.append("world_size: unknown; the batch in config.toml is that of one process")
    values = Values(FIRST_CODE_FLAGS, given, [], [])
    settings = first_code_settings(program, values, int(values["--world_size"]) if "--world_size" in given else 1)
    for key in ("model.image_pretrained", "model.text_pretrained"):
        settings.table.pop(key, None)  # the checkpoint has these weights
    if parts.networks:
        settings.table["loss.network"] = "dist-clamped"
        settings.table["loss.prototypes"] = len(parts.networks["image"].get("prototypes", ()))
        notes.append('temperature networks: to the letter, loss.network = "dist-clamped"')
    if parts.tau:
        _take_tau(settings, parts, notes)
    return settings


def _take_tau(settings: RunSettings, parts: _Parts, notes: list[str]) -> None:
    """Set a learned τ; of tables by that code's sample ids only the mean is left."""
    low, high = LEARNED_BOUNDS
    tau = float(torch.cat([value.double().reshape(-1).clamp(low, high) for value in parts.tau.values()]).mean())
    if "temp" not in parts.tau:
        for key in [key for key in settings.table if key.startswith("loss.")]:
            del settings.table[key]
        settings.table["loss.name"] = "clip-constant"
        notes.append(
            f"image_temp, text_temp: τ by sample ids of that code, which are not known here; kept: mean {tau:.4g}"
        )
    settings.table["loss.temperature"] = tau


def _name_run(settings: RunSettings, out: Path) -> None:
    settings.table["name"], settings.table["out"] = out.name, str(out.parent)


def _step(path: Path, content: Any, arguments: Mapping[str, Any], settings: RunSettings, notes: list[str]) -> int:
    """Return the step of the checkpoint, as far as it is known: epochs × samples / batch."""
    epoch = content.get("epoch") if isinstance(content, Mapping) else None
    if type(epoch) is int:
        epochs = epoch + 1
    elif found := re.search(r"checkpoint_(\d+)\.pth$", path.name):
        epochs = int(found[1])
    else:
        notes.append("step: unknown, 0 in the folder's name")
        return 0
    samples = arguments.get("train_num_samples") or arguments.get("data_number")
    if not samples:
        notes.append(f"step: {epochs} epochs of an unknown number of samples, 0 in the folder's name")
        return 0
    return epochs * math.ceil(int(samples) / settings.table["data.global_batch"])


def _fill_networks(path: Path, loss: Objective, parts: _Parts) -> None:
    """Load the temperature networks into the objective.

    Raises:
        UserError: one is missing, or has other keys or shapes.
    """
    if not parts.networks:
        return
    state = loss.state_dict()
    owner = next(key for key in state if key.endswith(".image.prototypes")).removesuffix("image.prototypes")
    wanted = {key: value for key, value in state.items() if key.startswith((f"{owner}image.", f"{owner}text."))}
    found = {
        f"{owner}{side}.{NETWORK_NAMES.get(name, name)}": value.reshape(-1) if name.startswith("linear_") else value
        for side, network in parts.networks.items()
        for name, value in network.items()
    }
    found = {
        key: value.reshape(wanted[key].shape) if _fits(value, wanted.get(key)) else value
        for key, value in found.items()
    }
    if wrong := misfit(found, wanted):
        raise refusal(path, f"its temperature networks are not those of the first code: {wrong}")
    loss.load_state_dict({**state, **found})


def _fits(value: Tensor, wanted: Tensor | None) -> bool:
    return wanted is not None and value.numel() == wanted.numel()


def _logit_scale(parts: _Parts, temperature: Any) -> float:
    """Return open_clip's logit scale: 1 / τ of one τ, else the file's own, which was never trained."""
    if isinstance(temperature, float) and not parts.networks:
        return 1 / temperature
    return parts.logit_scale or 1 / 0.07
