"""Files of weights: their kind, their state dict, and whether it fits a model.

Nothing in a file is executed. A pickle may name tensors and plain containers, as with torch's `weights_only=True`, and
the records that trainers keep beside weights (RECORDS), which an inert object replaces. A file that names anything else
is refused.
"""

from __future__ import annotations

import pickletools
import re
import warnings
import zipfile
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from disttempnet.errors import UserError
from disttempnet.sanitize import brief

WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".tar", ".npz")
RECORDS = {  # packages whose objects trainers keep beside weights: arguments, scores, dates, paths, settings
    "accelerate", "argparse", "datetime", "lightning", "lightning_fabric", "numpy", "omegaconf",
    "pathlib", "pytorch_lightning", "transformers", "typing",
}  # fmt: skip
BUILTIN_TYPES = ("bool", "dict", "float", "frozenset", "int", "list", "range", "slice", "str", "tuple")
NESTED = ("state_dict", "model_state_dict", "model_state", "model", "module", "net", "weights")
NESTED_EMA = ("state_dict_ema", "model_ema")
DEEPEST = 4  # levels of nested dicts
# Prefixes that torch.compile, FSDP, activation checkpointing and Fabric add to parameter names, at any depth.
WRAPPERS = re.compile(r"(?:(?<=\.)|^)(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module|_forward_module)\.")
LISTED_KEYS = 3  # in a message
TORCH_MAGIC = 0x1950A86A20F9469CFC6C  # alone in the first pickle of a file of torch.save before 1.6
OLD_PICKLES = 4  # in such a file: that one, version, machine, content


def read_weights(path: str | Path, prefer_ema: bool = False) -> dict[str, Tensor]:
    """Return the state dict in a file, on the CPU.

    Args:
        path: a file of safetensors or torch.save, whatever its suffix; it holds the state dict itself, or a dict with
            it under one of NESTED (a trainer's checkpoint).
        prefer_ema: take the moving average if a file has both, as timm does.

    Raises:
        UserError: another kind of file, or a damaged one; one line says which.
    """
    path = Path(path)
    refuse_other_files(path)
    if _is_safetensors(path):
        try:
            return load_file(path)
        except (SafetensorError, OSError, ValueError) as error:
            raise refusal(path, f"it is cut off or damaged ({brief(error)})") from None
    return _state_dict(path, _unpickled(path), (*NESTED_EMA, *NESTED) if prefer_ema else NESTED)


def read_training_state(path: str | Path, kept: Mapping[str, type]) -> Any:
    """Return all that a file of torch.save holds, on the CPU, with records of chosen types.

    Args:
        path: a trainer's checkpoint.
        kept: MODULE.NAME of records that are read as what they are, such as `argparse.Namespace`; others of RECORDS are
            inert.

    Raises:
        UserError: another kind of file, a damaged one, or other objects in it.
    """
    path = Path(path)
    refuse_other_files(path)
    if _is_safetensors(path):
        raise refusal(path, "it is safetensors, which holds weights alone")
    return _unpickled(path, kept)


def refusal(path: str | Path, why: str) -> UserError:
    """Return the error for a file of weights that cannot be loaded."""
    return UserError(f"weights '{path}' cannot be loaded: {why}")


def refuse_other_files(path: Path) -> None:
    """Refuse a file whose first bytes show that it holds no weights.

    Raises:
        UserError: no such file; an empty one, a Git LFS pointer, a web page, an archive, TorchScript, …
    """
    if not path.is_file():
        raise refusal(path, "no such file" if not path.exists() else "it is no regular file")
    try:
        with path.open("rb") as file:
            head = file.read(512)
    except OSError as error:
        raise refusal(path, str(error.strerror)) from None
    if why := _other_kind(path, head):
        raise refusal(path, why)


def _other_kind(path: Path, head: bytes) -> str:
    """Return the kind of a file that holds no PyTorch weights, and the advice; empty if it may hold some."""
    text = head.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if not head:
        return "it is empty (0 bytes): copy or download it again"
    if head.startswith(b"version https://git-lfs"):
        return "it is a Git LFS pointer in place of the weights: get them with `git lfs pull`"
    if text.startswith((b"<!doctype", b"<html", b"<head", b"<?xml")):
        return "it is a web page (HTML), which a download returned in place of the weights: download it again"
    for begin, kind in (
        (b"\x89HDF", "HDF5 (Keras, TensorFlow)"),
        (b"GGUF", "GGUF"),
        (b"\x93NUMPY", "one NumPy array"),
        (b"\x1f\x8b", "gzip: unpack it"),
    ):
        if head.startswith(begin):
            return f"it is a file of another kind, {kind}; only safetensors and files of torch.save are supported"
    if head[257:262] == b"ustar":
        return "it is a tar archive: unpack it, and name the file of weights in it"
    if head.startswith(b"PK\x03\x04"):
        return _other_zip(path)
    if _is_safetensors(path) or head.startswith(b"\x80"):
        return ""
    if text.startswith((b"{", b"[")):
        return "it is JSON, a config or an index, not weights"
    if all(byte in b"\t\r\n" or 32 <= byte < 127 for byte in head):
        return f"it is a text file (it begins with {brief(head[:40].decode('ascii'))!r})"
    return f"it is neither safetensors nor a file of torch.save (it begins with {head[:8]!r})"


def _other_zip(path: Path) -> str:
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except (zipfile.BadZipFile, OSError, ValueError):
        return "it is cut off or damaged: copy or download it again"
    if any(name.endswith("/constants.pkl") for name in names):
        return (
            "it is TorchScript, a program with its weights, and is not run: save the weights alone by "
            "torch.save(torch.jit.load(FILE, 'cpu').state_dict(), 'weights.pt')"
        )
    if any(name.endswith("data.pkl") for name in names):
        return ""
    if names and all(name.endswith(".npy") for name in names):
        return "it is an archive of NumPy arrays; of those only big_vision's SigLIP is supported"
    return "it is a zip archive that torch.save did not write: unpack it"


def _is_safetensors(path: Path) -> bool:
    """Return whether a file begins like safetensors: eight bytes of length, then JSON. It may be cut off."""
    with path.open("rb") as file:
        head = file.read(9)
    return head[8:9] == b"{" and int.from_bytes(head[:8], "little") < 1 << 32


class _Inert:
    """Inert replacement of an object or function of RECORDS: accepts any arguments, keeps nothing."""

    def __init__(self, *_: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        pass


class _Entries:
    """A `collections.defaultdict` in a file, read as a dict."""

    def __new__(cls, *_: Any) -> Any:
        return {}


def _unpickled(path: Path, kept: Mapping[str, type] = MappingProxyType({})) -> Any:
    """Return the content of a file of torch.save, restricted to tensors, containers, and records of the types `kept`.

    Raises:
        UserError: another file, a damaged one, or objects of other kinds in it.
    """
    # List what the pickle refers to, without building it, and replace records by inert objects.
    try:
        named, protocol = _globals(path)
    except Exception as error:  # foreign bytes: Python's parsers raise all kinds of errors on them
        raise refusal(path, f"it is cut off or damaged, or torch.save did not write it ({brief(error)})") from None
    inert: list[Any] = [(kept.get(name, _Inert), name) for name in named if name.partition(".")[0] in RECORDS]
    inert += [(_Entries, "collections.defaultdict"), *((_Inert, f"builtins.{name}") for name in BUILTIN_TYPES)]

    # Load with weights_only=True; name the reason if it is refused.
    with torch.serialization.safe_globals(inert), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of old formats and pickle protocols: they load or fail anyway
        try:
            with path.open("rb") as file:  # torch would take a path *.safetensors for that format
                return torch.load(file, map_location="cpu", weights_only=True)
        except MemoryError:
            raise
        except Exception as error:
            if found := re.search(r"GLOBAL ([\w.]+)", str(error)):
                raise refusal(
                    path,
                    f"it holds Python objects, such as {found[1]}, which could run code and are refused: save the "
                    "weights alone, by torch.save(model.state_dict(), FILE)",
                ) from None
            if "Unsupported operand" in str(error) and protocol not in (2, 3):  # those that weights_only reads
                raise refusal(
                    path,
                    f"it is written with pickle protocol {protocol}; save it again with torch.save's default protocol",
                ) from None
            said = str(error).rpartition("WeightsUnpickler error:")[2]  # torch puts a page of advice before it
            why = brief(said, 200) or type(error).__name__
            raise refusal(path, f"it is cut off or damaged, or torch.save did not write it ({why})") from None


def _globals(path: Path) -> tuple[set[str], int]:
    """Return MODULE.NAME of all that the pickle of a file refers to, and its protocol; nothing is built.

    Names that protocol 4 and later put on the stack are not listed: weights_only refuses such pickles.
    """
    named, protocol = set(), 0
    for code, argument in _opcodes(path):
        if code.name == "GLOBAL":
            named.add(str(argument).replace(" ", "."))
        protocol = max(protocol, argument if code.name == "PROTO" else code.proto)
    return named, protocol


def _opcodes(path: Path) -> Iterator[tuple[pickletools.OpcodeInfo, Any]]:
    """Yield the opcodes in the pickle of a file of torch.save, with their arguments."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            name = next(name for name in archive.namelist() if name.endswith("data.pkl"))
            with archive.open(name) as content:
                yield from ((code, argument) for code, argument, _ in pickletools.genops(content))
        return
    with path.open("rb") as file:
        first = islice(pickletools.genops(file), 3)  # PROTO, from protocol 4 on FRAME, the number
        if not any(argument == TORCH_MAGIC for _, argument, _ in first):
            raise ValueError("a pickle of another program")
        file.seek(0)
        for _ in range(OLD_PICKLES):
            yield from ((code, argument) for code, argument, _ in pickletools.genops(file))


def _state_dict(path: Path, content: Any, nested: Iterable[str]) -> dict[str, Tensor]:
    """Return the state dict in the content of a file.

    Raises:
        UserError: there is none, or more than one.
    """
    for _ in range(DEEPEST):
        if not isinstance(content, Mapping):
            what = "one tensor" if isinstance(content, Tensor) else f"a {type(content).__name__}"
            raise refusal(path, f"it holds {what}, not a state dict")
        inside = [key for key in nested if isinstance(content.get(key), Mapping)][:1]
        tensors = {key: value for key, value in content.items() if isinstance(key, str) and isinstance(value, Tensor)}
        if not inside and tensors:
            return tensors
        inside = inside or [key for key, value in content.items() if _has_tensors(value)]
        if len(inside) > 1:
            raise refusal(path, f"it holds several state dicts ({listed(inside)}): save the one alone")
        if not inside:
            break
        content = content[inside[0]]
    keys = f", only {listed(content)}" if content else ": an empty dict"
    raise refusal(path, f"it holds no weights{keys}")


def _has_tensors(value: Any) -> bool:
    return isinstance(value, Mapping) and any(isinstance(one, Tensor) for one in value.values())


def without_prefix(path: str | Path, state: Mapping[str, Tensor], wanted: Iterable[str]) -> dict[str, Tensor]:
    """Return a state dict under the names of a model, without the prefixes of wrappers.

    The prefix is the one before most of the wanted keys; keys without it are dropped, as they are not the model's.

    Args:
        path: named in errors.
        state: of a file.
        wanted: keys of the model.

    Raises:
        UserError: the file holds the model more than once.
    """
    # Count, for each prefix, how many wanted keys follow it.
    state = {WRAPPERS.sub("", key): value for key, value in state.items()}
    wanted = set(wanted)
    found: Counter[str] = Counter()
    for key in state:
        parts = key.split(".")
        found.update(
            "".join(f"{part}." for part in parts[:cut]) for cut in range(len(parts)) if ".".join(parts[cut:]) in wanted
        )

    # Take the prefix of most; none if fewer than half of the keys are found, as then it is another model.
    most = max(found.values(), default=0)
    prefixes = [prefix for prefix, count in found.items() if count == most]
    if 2 * most <= len(wanted) or "" in prefixes:
        return state
    if len(prefixes) > 1:
        raise refusal(path, f"it holds the model {len(prefixes)} times, below {listed(prefixes)}: save the one alone")
    return {key.removeprefix(prefixes[0]): value for key, value in state.items() if key.startswith(prefixes[0])}


def misfit(state: Mapping[str, Tensor], own: Mapping[str, Tensor], any_shape: Collection[str] = ()) -> str:
    """Return in words why a state dict does not fit a model; empty if it does.

    Args:
        state: of a file.
        own: the state dict of the model; the counters of its BatchNorm may be missing in the file.
        any_shape: keys whose shapes may differ.
    """
    missing = [key for key in own if key not in state and not key.endswith("num_batches_tracked")]
    unknown = [key for key in state if key not in own]
    shapes = [
        f"{key} of {_shape(value)} (the model: {_shape(own[key])})"
        for key, value in state.items()
        if key in own and value.shape != own[key].shape and key not in any_shape
    ]
    integers = [
        key
        for key, value in state.items()
        if key in own and own[key].is_floating_point() and not value.is_floating_point()
    ]
    faults = [("lacks", missing), ("has", unknown), ("other shapes:", shapes), ("quantised to integers:", integers)]
    return "; ".join(f"{verb} {listed(keys)}" for verb, keys in faults if keys)


def _shape(tensor: Tensor) -> str:
    return "×".join(map(str, tensor.shape)) or "one number"


def listed(names: Iterable[Any], most: int = LISTED_KEYS) -> str:
    """Return the first names, and how many more there are."""
    names = list(names)
    more = f" and {len(names) - most:,} more" if len(names) > most else ""
    return ", ".join(brief(name, 100) for name in names[:most]) + more
