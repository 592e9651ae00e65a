"""Origins of towers: names resolved to an architecture, a file of weights and the preprocessing that goes with them.

A name is an architecture of open_clip or of the package, a JSON file with one, or a place that has an architecture and
its weights: `local-dir:FOLDER` and `hf-hub:ORG/NAME`. Only the first two give towers without weights.
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import open_clip
from open_clip.pretrained import download_pretrained, download_pretrained_from_hf
from rich.filesize import decimal

from disttempnet.config import flat
from disttempnet.errors import UserError, unknown_name
from disttempnet.io.files import read_regular
from disttempnet.models import transformers_clip
from disttempnet.models.hub import hub_fault
from disttempnet.models.weights import WEIGHT_SUFFIXES, listed, refusal
from disttempnet.sanitize import brief

CONFIG_NAME = "open_clip_config.json"
WEIGHTS_NAME = "open_clip_model.safetensors"
HUB, FOLDER = "hf-hub:", "local-dir:"
PLACES = (HUB, FOLDER)
# Names of one and the same model, as repositories have them: the first is taken.
STANDARD = (
    WEIGHTS_NAME, "open_clip_pytorch_model.safetensors", "open_clip_pytorch_model.bin", "open_clip_pytorch_model.pth",
)  # fmt: skip
OF_TRANSFORMERS = ("model.safetensors", "pytorch_model.bin")
# Files that trainers write beside weights: this one, accelerate, transformers.
NO_WEIGHTS = ("trainer.pt", "shard-*-of-*.pt", "training_args.bin", "optimizer*", "scheduler*", "r*_state*", "scaler*")
PREPROCESSING = ("mean", "std", "interpolation", "resize_mode")
# Keys in which two architectures of the same weights may differ: they change no feature, or are checked elsewhere.
FREE = {
    "custom_text", "init_logit_bias", "init_logit_scale", "quick_gelu", "text_cfg.context_length",
    "text_cfg.hf_model_name", "text_cfg.hf_model_pretrained", "text_cfg.hf_tokenizer_name", "vision_cfg.image_size",
    "vision_cfg.patch_dropout", "vision_cfg.timm_drop", "vision_cfg.timm_drop_path", "vision_cfg.timm_model_pretrained",
}  # fmt: skip


@dataclass(frozen=True)
class Origin:
    """The origin of towers: architecture, weights, preprocessing.

    Attributes:
        architecture: open_clip's `model_cfg`; empty if the weights came without one.
        weights: a file; None for random towers.
        folder: a local folder that may hold a text encoder's config and tokenizer.
        preprocess: open_clip's `preprocess_cfg`, as far as it is known.
        from_transformers: the architecture is from transformers' config, which has the activation of the weights.
        quick_gelu: the weights were trained with QuickGELU, whatever the named architecture has.
        notes: facts about the weights that a reader of scores has to know.
    """

    architecture: Mapping[str, Any] = field(default_factory=dict)
    weights: Path | None = None
    folder: Path | None = None
    preprocess: Mapping[str, Any] = field(default_factory=dict)
    from_transformers: bool = False
    quick_gelu: bool = False
    notes: tuple[str, ...] = ()


def with_head(architecture: Mapping[str, Any], head: str, name: str) -> dict[str, Any]:
    """Return an architecture whose timm and Hugging Face towers have this head; as it is where `head` is empty.

    Raises:
        UserError: neither tower is one of these.
    """
    result = {key: dict(value) if isinstance(value, Mapping) else value for key, value in architecture.items()}
    sides = {"vision_cfg": ("timm_model_name", "timm_proj"), "text_cfg": ("hf_model_name", "hf_proj_type")}
    found = [cfg for cfg, (kind, _) in sides.items() if result.get(cfg, {}).get(kind)]
    if head and not found:
        raise UserError(f"model.head = '{head}' is for towers of timm and Hugging Face, which '{name}' does not have")
    for cfg in found if head else ():
        result[cfg][sides[cfg][1]] = head
    return result


def find_origin(name: str, pretrained: str = "", head: str = "") -> Origin:
    """Resolve a name, and the weights that go into its architecture.

    Args:
        name: an architecture, the path of a JSON file with one, `local-dir:FOLDER` or `hf-hub:ORG/NAME`.
        pretrained: weights in place of a name's own: a tag of open_clip (`openai`, or `NAME/openai`), a file, a folder,
            `local-dir:FOLDER`, `hf-hub:ORG/NAME`; empty for none.
        head: of timm and Hugging Face towers, `linear` or `mlp`; empty = the architecture's own.

    Raises:
        UserError: an unknown name or tag; a place without weights, or with several; weights of another architecture.
    """
    # Resolve both. A misspelt name is reported before a fault of the weights.
    may_be_gone = name.startswith(PLACES) or name.endswith(".json")
    own = None if may_be_gone else _named(name)
    given = _weights(pretrained.removeprefix("open_clip:"), name) if pretrained else None
    if given and given.architecture and may_be_gone and not Path(name).is_file():
        return given  # a checkpoint has the architecture of the place that its run began from
    if name.startswith(PLACES):
        own = _place(name)
        own = replace(own, architecture=with_head(own.architecture, head, name))
        return replace(own, weights=given.weights) if given else own
    own = own or _named(name)
    own = replace(own, architecture=with_head(own.architecture, head, name))
    if given is None:
        return own

    # Refuse weights of another architecture.
    for key, wanted, found in _differences(own.architecture, given.architecture):
        place = pretrained if pretrained.startswith(PLACES) else f"{FOLDER}{given.folder}"
        raise UserError(
            f"model '{name}' has {key} = {wanted!r}, the weights in {pretrained} have {found!r}: give the name that "
            f"they were trained with, or take the architecture from there: model.name={place}"
        )

    # Take over what only the weights know: a bias, the activation.
    architecture, notes = dict(own.architecture), given.notes
    if "init_logit_bias" in given.architecture:
        architecture["init_logit_bias"] = given.architecture["init_logit_bias"]
    if given.quick_gelu and not architecture.get("quick_gelu"):
        architecture["quick_gelu"] = True
        notes = (*notes, f"QuickGELU, as the weights '{pretrained}' were trained with; {name} alone has GELU")
    return replace(given, architecture=architecture, folder=given.folder or own.folder, notes=notes)


def is_random(name: str, pretrained: str) -> bool:
    """Return whether name and pretrained mean an architecture without weights."""
    return not pretrained and not name.startswith(PLACES)


def read_target(target: str, random: bool = True) -> tuple[str, str] | None:
    """Return the (name, pretrained) for `load_model` of a target of `evaluate`; None for a run or its checkpoint.

    Args:
        target: a path, `open_clip:NAME/TAG`, `open_clip:NAME/FILE`, `local-dir:FOLDER` or `hf-hub:ORG/NAME`.
        random: accept an architecture without weights.

    Raises:
        UserError: the target is ambiguous, unknown or without weights; the message says how to write it.
    """
    named = _read_target(target, random)
    if named and not random and is_random(*named):
        name = named[0]
        if name.endswith(".json"):
            raise UserError(f"{target}: an architecture without weights: name the folder that holds both")
        if name in open_clip.list_models():  # load_model tells of an unknown one
            raise UserError(_with_which_weights(name, random))
    return named


def _read_target(target: str, random: bool) -> tuple[str, str] | None:
    """Return what a target means, random towers too; `random` is for the message alone."""
    # Explicit forms: a place, or open_clip:NAME with a tag or a path.
    rest = target.removeprefix("open_clip:")
    explicit = rest != target
    name, _, tag = rest.partition("/")
    path = Path(rest)
    if rest.startswith(PLACES):
        return rest, ""
    if explicit and name in open_clip.list_models():
        return name, tag

    # Paths: a run or checkpoint, a file, a folder with its architecture.
    if not explicit and ((path / "trainer.pt").is_file() or (path / "checkpoints").is_dir()):
        return None
    if path.is_file():
        return _file_target(path), ""
    if (path / CONFIG_NAME).is_file() or (path / transformers_clip.HF_CONFIG_NAME).is_file():
        return f"{FOLDER}{rest}", ""
    if explicit:
        return name, tag
    if path.is_dir():
        if any(file.suffix in WEIGHT_SUFFIXES for file in path.iterdir()):
            raise UserError(
                f"{target}: no run, and no {CONFIG_NAME} says which architecture the weights in it are of: name it, as "
                f"open_clip:NAME/{target}"
            )
        return None
    if name in open_clip.list_models():
        if not tag:
            raise UserError(_with_which_weights(name, random))
        return name, tag
    if tag and "/" not in tag and not Path(tag).suffix and name.isidentifier():
        raise UserError(
            f"{target}: no such run folder or checkpoint; write {HUB}{target} for a repository of the Hugging Face "
            f"Hub. For open_clip's NAME/TAG: {unknown_name('model', name, open_clip.list_models())}"
        )
    return None


def weights_lines(name: str, pretrained: str, weights: Path | None, image: str, text: str) -> tuple[str, ...]:
    """Return where the weights of towers came from: a line for both, for the image tower, and for the text tower.

    Args:
        name, pretrained: as given to `load_model`.
        weights: the file of both towers; None = random ones.
        image, text: weights of one tower, as `load_model` resolved them.
    """
    lines = []
    if weights is not None:
        given = pretrained if pretrained.startswith(PLACES) else name if not pretrained else f"{name}, {pretrained}"
        lines.append(f"weights of both towers: {given}: {_about_file(weights)}")
    for side, source in (("image", image), ("text", text)):
        if source:
            path = Path(source).expanduser()
            lines.append(f"weights of the {side} tower: {_about_file(path) if path.exists() else source}")
        elif weights is None and (image or text):
            lines.append(f"weights of the {side} tower: random (model.{side}_pretrained names others)")
    return tuple(lines)


def _about_file(path: Path) -> str:
    """Return the path of a file with its size, and its sha256 where the hub's cache names it so; else the path."""
    if not path.is_file():
        return str(path)
    size, digest = decimal(path.stat().st_size), path.resolve().name
    return f"{path} ({size}{f', sha256 {digest}' if re.fullmatch('[0-9a-f]{64}', digest) else ''})"


def _with_which_weights(name: str, random: bool) -> str:
    """Return the message for an architecture that is named without weights."""
    tags = listed(open_clip.list_pretrained_tags_by_model(name), 8) or "open_clip has none of this one"
    ways = [f"{name}/TAG ({tags})", f"{name}/FILE", *([f"open_clip:{name} for random ones"] if random else [])]
    return f"{name}: with which weights? {', '.join(ways[:-1])}, or {ways[-1]}"


def _file_target(path: Path) -> str:
    """Return the name for a file: an architecture, or weights with their architecture beside them."""
    if path.suffix == ".json":
        return str(path)
    if (path.parent / CONFIG_NAME).is_file():
        return f"{FOLDER}{path}"
    raise UserError(
        f"{path}: a file of weights does not hold its architecture: name it, as open_clip:NAME/{path} "
        f"(open_clip:ViT-B-32/{path}), or put its {CONFIG_NAME} beside it"
    )


def _named(name: str) -> Origin:
    """Return an architecture without weights."""
    if name.endswith(".json"):
        path = Path(name)
        table = _json(path)
        architecture = _architecture(table.get("model_cfg", table), path)
        return Origin(architecture, folder=path.parent, preprocess=_preprocess(table.get("preprocess_cfg"), path))
    architecture = open_clip.get_model_config(name)
    if architecture is None:
        base, _, tag = name.partition("/")
        if tag and base in open_clip.list_models():
            raise UserError(f"model '{name}' names weights too: write model.name={base} model.pretrained={tag}")
        if name and Path(name).exists():
            raise UserError(f"model '{name}' is a path: write {FOLDER}{name}, or the name of an architecture")
        raise UserError(unknown_name("model", name, open_clip.list_models()))
    _refuse_other_kinds(architecture, f"model '{name}'")
    return Origin(architecture)


def _refuse_other_kinds(architecture: Mapping[str, Any], what: str) -> None:
    """Raise UserError for architectures of open_clip that are not an image and a text tower (since open_clip 4)."""
    if any(key.startswith("gen") and key.endswith("_cfg") for key in architecture):
        raise UserError(f"{what} generates captions: it has no text tower that images could be contrasted with")
    if "vision_cfg" not in architecture:
        raise UserError(f"{what} has no image tower (it has {listed(sorted(architecture), 8)})")


def _place(name: str) -> Origin:
    """Return an architecture with its weights.

    Raises:
        UserError: one of the two is missing.
    """
    if name.startswith(HUB):
        return _repository(name.removeprefix(HUB))
    if name == FOLDER:
        raise UserError(f"'{name}' names no folder (the current one is {FOLDER}.)")
    path = Path(name.removeprefix(FOLDER)).expanduser()
    if path.is_file():
        return replace(_described(path.parent / CONFIG_NAME), weights=path)
    if not path.is_dir():
        raise UserError(f"{name}: no such folder")
    found = _folder(path)
    if not found.architecture:
        raise UserError(
            f"{name}: has no {CONFIG_NAME} with the architecture of its weights: name it, as "
            f"open_clip:NAME/{found.weights}, or in a config model.name=NAME model.pretrained={found.weights}"
        )
    return found


def _folder(path: Path) -> Origin:
    """Return the weights in a folder, with their architecture if a config has it."""
    if (path / CONFIG_NAME).is_file():
        described = _described(path / CONFIG_NAME)
        return replace(described, weights=_weights_in(path, STANDARD))
    described = _without_config(path)
    return replace(described, weights=_weights_in(path, (*OF_TRANSFORMERS, *STANDARD)))


def _without_config(folder: Path) -> Origin:
    """Return the architecture in transformers' `config.json`, in a folder without open_clip's; else none."""
    config = folder / transformers_clip.HF_CONFIG_NAME
    if not config.is_file() or "model_type" not in _json(config):
        return Origin(folder=folder)
    return _of_transformers(config, folder / transformers_clip.HF_PREPROCESS_NAME)


def _described(config: Path) -> Origin:
    """Return architecture and preprocessing from an `open_clip_config.json`."""
    table = _json(config)
    for section in ("preprocess_cfg", "model_cfg"):
        if not isinstance(table.get(section), dict):
            raise UserError(f"{config}: not an open_clip config with a '{section}'")
    architecture = _architecture(table["model_cfg"], config)
    preprocess = _preprocess(table["preprocess_cfg"], config)
    quick = bool(architecture.get("quick_gelu"))
    ema = table.get("train_ema")
    averaged = f"weights '{config.parent}' are a moving average over training steps (train.ema = {ema})"
    notes = (averaged,) if isinstance(ema, float) else ()
    return Origin(architecture, folder=config.parent, preprocess=preprocess, quick_gelu=quick, notes=notes)


def _of_transformers(config: Path, preprocess: Path | None) -> Origin:
    """Return architecture and preprocessing from the files of transformers."""
    try:
        architecture = transformers_clip.open_clip_architecture(_json(config), str(config.parent))
    except (TypeError, AttributeError, ValueError, ArithmeticError):
        raise UserError(f"{config}: damaged, not the config of a CLIPModel") from None
    table = _json(preprocess) if preprocess and preprocess.is_file() else {}
    prepared = _preprocess(transformers_clip.open_clip_preprocess(table), preprocess or config)
    quick = architecture["quick_gelu"]
    return Origin(architecture, preprocess=prepared, folder=config.parent, from_transformers=True, quick_gelu=quick)


def _weights_in(folder: Path, standard: Sequence[str]) -> Path:
    """Return the file of weights in a folder: the first standard name that exists, else the only file.

    Raises:
        UserError: there is none, or several.
    """
    for name in standard:
        if (folder / name).is_file():
            return folder / name
    found = sorted(path for path in folder.iterdir() if path.suffix in WEIGHT_SUFFIXES)
    found = [path for path in found if not any(map(path.match, NO_WEIGHTS))]
    if not found:
        why = "holds no weights"
        if (folder / "checkpoints").is_dir():
            why += " (a run folder? name one of its checkpoints)"
        elif (folder / CONFIG_NAME).is_file():
            why += f"; model.name={folder / CONFIG_NAME} would build its architecture with random ones"
        raise UserError(f"{folder}: {why}")
    if len(found) > 1:
        names = listed([path.name for path in found], 8)
        raise UserError(f"{folder}: holds several files of weights ({names}): name one, as {found[-1]}")
    return found[0]


def _repository(name: str) -> Origin:
    """Return a repository of the Hugging Face Hub, downloaded or from the cache.

    Raises:
        UserError: no config or no weights in the cache, and none to download.
    """
    config, why = _downloaded(name, CONFIG_NAME)
    if config is not None:
        # a Hugging Face encoder and its tokenizer are in repositories of their own
        described, files = replace(_described(config), folder=None), (STANDARD[0], STANDARD[2])
    else:
        config, _ = _downloaded(name, transformers_clip.HF_CONFIG_NAME)
        if config is None:
            raise UserError(
                f"{HUB}{name}: no {CONFIG_NAME} in the cache, and none could be downloaded from the Hub ({why})"
            )
        preprocess, _ = _downloaded(name, transformers_clip.HF_PREPROCESS_NAME)
        described, files = _of_transformers(config, preprocess), OF_TRANSFORMERS
    weights, why = _downloaded(name, *files)
    if weights is None:
        raise UserError(
            f"{HUB}{name}: its weights ({' or '.join(files)}) are not in the cache, and could not be downloaded from "
            f"the Hub ({why}); model.name={config} would build its architecture with random ones"
        )
    return replace(described, weights=weights)


def _downloaded(repository: str, *files: str) -> tuple[Path | None, str]:
    """Return the first of the files that a repository has; else None and the reason."""
    fault, why = hub_fault(), ""
    for file in files:
        try:
            return Path(download_pretrained_from_hf(repository, file)), ""
        except (OSError, ValueError) as error:
            why = fault or brief(str(error).rpartition("Last error:")[2], 160)
    return None, why


def _weights(pretrained: str, name: str) -> Origin:
    """Return weights that were named apart from the architecture, with what is known of them."""
    if pretrained.startswith(PLACES):
        return _place(pretrained)
    path = Path(pretrained).expanduser()
    if path.is_dir():
        return _folder(path)
    if path.exists():
        if path.name in STANDARD and (path.parent / CONFIG_NAME).is_file():
            return replace(_described(path.parent / CONFIG_NAME), weights=path)
        if path.name in OF_TRANSFORMERS and not (path.parent / CONFIG_NAME).is_file():
            return replace(_without_config(path.parent), weights=path, folder=None)
        return Origin(weights=path)
    return _tagged(pretrained, name)


def _tagged(pretrained: str, name: str) -> Origin:
    """Return open_clip's weights of a tag."""
    base, slash, tag = pretrained.rpartition("/")
    if slash and base in open_clip.list_models():
        if base != name:
            raise UserError(f"'{pretrained}' are weights of {base}, the model is '{name}': model.name={base}")
        pretrained = tag
    known = open_clip.get_pretrained_cfg(name, pretrained)
    if not known:
        if "/" in pretrained or Path(pretrained).suffix in WEIGHT_SUFFIXES:
            raise refusal(pretrained, "no such file or folder")
        tags = open_clip.list_pretrained_tags_by_model(name)
        if not tags:
            raise UserError(f"'{pretrained}' is no file or folder, and open_clip has no weights of {name}")
        raise UserError(f"{name}: {unknown_name('weights', pretrained, tags)}")
    fault = hub_fault() if known.get("hf_hub") else ""
    try:
        weights = Path(download_pretrained(known))
    except (OSError, ValueError, RuntimeError) as error:
        why = f"{fault}, and they are not in the cache" if fault else brief(error)
        raise UserError(f"weights '{name}/{pretrained}' cannot be downloaded: {why}") from None
    return Origin(weights=weights, preprocess=_preprocess(known, name), quick_gelu=bool(known.get("quick_gelu")))


def _architecture(table: Any, path: Path) -> dict[str, Any]:
    """Return the `model_cfg` in a file's table.

    Raises:
        UserError: it is not an architecture of open_clip.
    """
    kinds = {"embed_dim": int, "vision_cfg": dict, "text_cfg": dict}
    if not isinstance(table, dict) or not all(isinstance(table.get(key), kind) for key, kind in kinds.items()):
        raise UserError(f"{path}: no architecture of open_clip (embed_dim, vision_cfg, text_cfg)")
    _refuse_other_kinds(table, str(path))
    return copy.deepcopy(table)


def _preprocess(table: Any, source: Path | str) -> dict[str, Any]:
    """Return the keys of a `preprocess_cfg`, or of open_clip's entry of a tag, that evaluation uses.

    Raises:
        UserError: mean or std is not three numbers.
    """
    found = {key: table[key] for key in PREPROCESSING if key in table} if isinstance(table, dict) else {}
    for key in ("mean", "std"):
        values = found.get(key, (1, 1, 1))
        if not isinstance(values, (list, tuple)) or [type(v) in (int, float) for v in values] != [True] * 3:
            raise UserError(f"{source}: '{key}' of preprocess_cfg must be three numbers (got {values!r})")
    return found


def _differences(own: Mapping[str, Any], other: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
    """Return (key, own value, other value) for each key that two architectures share and that must not differ."""
    one, two = flat(dict(own)), flat(dict(other))
    both = [key for key in one if key in two and key not in FREE]
    return [(key, one[key], two[key]) for key in both if one[key] != two[key]]


def _json(path: Path) -> dict[str, Any]:
    """Return the table in a JSON file; empty if it holds something else.

    Raises:
        UserError: it cannot be read.
    """
    try:
        table = json.loads(read_regular(path).decode("utf-8"))
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None
    except ValueError:
        return {}
    return table if isinstance(table, dict) else {}
