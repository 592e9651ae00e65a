"""Features of a data set as files for your own use, of the embeddings of both towers.

    OUT/about.json                    what the features are of: weights, tokenizer, transform, index; their digest
    OUT/features-00000.safetensors    ids int64 [n], image [n, D], text [t, D], text_ids int64 [t]; its metadata has
                                      names, captions (JSON) and the digest
    OUT/features-00000.parquet        or: columns id, name, captions, image, text; the digest is in its metadata

Rows have norm 1. Samples that cannot be read are left out. While it works, OUT/.parts holds what is done: a command
that was killed goes on from there. about.json is the mark of a folder of this command: beside another one, or without
one, no file is replaced or removed.
"""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.functional import normalize

from disttempnet import distributed
from disttempnet.data.augment import train_transform
from disttempnet.data.listings.parquet import need_pyarrow
from disttempnet.data.source import Source
from disttempnet.errors import UserError
from disttempnet.features.build import Build, Pass, build, usable_mask, width_of
from disttempnet.features.cache_key import facts_of
from disttempnet.features.store import DTYPES, FeatureStore, features_digest, store_in
from disttempnet.io.files import WRITING, atomic, refuse_unwritable, unwritable_named, write_output
from disttempnet.models import Towers
from disttempnet.models.trunk import TOWER_SIDES, trunk_of

PARTS = ".parts"
ABOUT = "about.json"
ELSEWHERE = "name another --out"
FORMATS = ("safetensors", "parquet")
NAMES = re.compile(r"features-\d{5,}\.\w+")


class Rows(NamedTuple):
    """Some samples, and their captions one after another.

    Attributes:
        ids: int64 [n].
        names, captions: of each sample.
        image: unit features [n, D].
        text_ids: int64 [t], the sample of each caption.
        text: unit features [t, D].
    """

    ids: NDArray[np.int64]
    names: list[str]
    captions: list[tuple[str, ...]]
    image: Tensor
    text_ids: NDArray[np.int64]
    text: Tensor


class Export(NamedTuple):
    """Files of features: the number of their samples, and whether they were all there before."""

    samples: int
    was_complete: bool


def check_output(out: Path, kind: str) -> None:
    """Raise UserError where files cannot be written: learnt before a model is opened and data are indexed.

    Args:
        out: folder of the files; one with files of another origin is refused.
        kind: one of `FORMATS`; Parquet needs pyarrow.
    """
    if kind == "parquet":
        need_pyarrow(out, ", or --format safetensors")
    refuse_unwritable(out / ABOUT)
    _about_in(out, kind)


def embed_source(
    towers: Towers, how: Build[Source], out: Path, kind: str = "safetensors", dtype: str = "float32", model: str = ""
) -> Export:
    """Write the embeddings of all samples of a source; every rank calls this.

    Args:
        towers: on the device of `how`.
        how: source, device, sizes.
        out: folder of the files; one of other features is refused.
        kind: one of `FORMATS`.
        dtype: `float32` or `float16`.
        model: what the towers are called in about.json; empty = their name.

    Raises:
        UserError: no room on the disk, files of another origin, or data that cannot be read.
    """
    towers.module.requires_grad_(False)  # nothing is trained: the trunk is all of a tower
    trunks = {side: trunk_of(towers, side) for side in TOWER_SIDES}
    facts = facts_of(trunks, how.source, how.autocast)
    facts["image"]["transform"] = {"name": "evaluation"}
    about: dict[str, Any] = {"features": facts, "dtype": dtype, "format": kind}
    digest = features_digest(about)
    # what names and notes say has no part in the digest
    about |= {"digest": digest, "width": towers.embed_dim, "source": how.source.where}
    about |= {"model": model or towers.name, "notes": list(towers.notes)}
    there = distributed.together(lambda: _samples_there(out, kind, digest) if distributed.is_main() else None)
    if (complete := distributed.gather_objects(there)[0]) is not None:
        return Export(complete, True)
    # from here on the folder is of these features, even if this is stopped
    distributed.together(lambda: _write_about(out, about | {"complete": False}) if distributed.is_main() else None)

    # run both towers over the samples; what is done is found again
    passes = {}
    for side, trunk in trunks.items():
        width = width_of(trunk, how)
        store = store_in(out / PARTS, facts[side], len(how.source), width, "float32", ELSEWHERE)
        images = side == "image"
        transform = train_transform("evaluation", towers.image_size, resizing=towers.resizing) if images else None
        passes[side] = Pass(store, trunk, transform)
    rows_bytes = 2 * towers.embed_dim * DTYPES[dtype].itemsize  # of a sample with one caption
    replaced = sum(path.stat().st_size for path in _files_of(out, kind))
    smaller = "choose --dtype float16, " if dtype == "float32" else ""
    build(list(passes.values()), how, f"{smaller}or {ELSEWHERE}", max(0, how.end * rows_bytes - replaced))

    # join both sides: a file a shard
    def write() -> int:
        if not distributed.is_main():
            return 0
        count, paths = 0, []
        usable = usable_mask(how.source)
        for number in passes["image"].store.shards(how.end):
            rows = _rows(how, usable, passes["image"].store, passes["text"].store, number)
            path = out / f"features-{number:05d}.{kind}"
            with unwritable_named(path), atomic(path) as temporary:
                (_write_parquet if kind == "parquet" else _write_safetensors)(temporary, rows, digest, DTYPES[dtype])
            count += len(rows.ids)
            paths.append(path)
        # of an earlier version with other shards, or of a command that was killed
        for path in {*_files_of(out, kind), *out.glob(f"{WRITING}features-*")} - {*paths}:
            with unwritable_named(path):
                path.unlink()
        _write_about(out, about | {"samples": count, "files": [path.name for path in paths], "complete": True})
        shutil.rmtree(out / PARTS, ignore_errors=True)
        return count

    return Export(int(distributed.gather_objects(distributed.together(write))[0]), False)


def _files_of(out: Path, kind: str) -> list[Path]:
    """Files in a folder with a name that this command gives."""
    return sorted(path for path in out.glob(f"features-*.{kind}") if NAMES.fullmatch(path.name))


def _about_in(out: Path, kind: str) -> dict[str, Any]:
    """The about.json of a folder; empty where it holds none and no files either.

    Raises:
        UserError: the folder holds files of another origin.
    """
    path = out / ABOUT
    try:
        found = json.loads(path.read_bytes())
    except FileNotFoundError:
        others = [*_files_of(out, kind), *out.glob(PARTS)]
        if not others:
            return {}
        raise UserError(f"{others[0]}: is there without an {ABOUT} of `embed`: remove it, or {ELSEWHERE}") from None
    except (OSError, ValueError):
        found = None
    if not isinstance(found, dict) or not {"digest", "features"} <= found.keys():
        raise UserError(f"{path}: is not of `embed`: remove it, or {ELSEWHERE}")
    return found


def _samples_there(out: Path, kind: str, digest: str) -> int | None:
    """The number of samples of files that are complete already; None where some are to be written.

    Raises:
        UserError: the files are of other features: those of two models must not lie side by side.
    """
    if not (found := _about_in(out, kind)):
        return None
    if found["digest"] != digest:
        raise UserError(f"{out}: holds features of another model, source or format: {ELSEWHERE}")
    names = found.get("files", [])  # an older version kept no list
    whole = found.get("complete") and names and all((out / name).is_file() for name in names)
    return int(found["samples"]) if whole else None


def _write_about(out: Path, about: dict[str, Any]) -> None:
    write_output(out / ABOUT, json.dumps(about, indent=1, ensure_ascii=False) + "\n")


def _rows(
    how: Build[Source], usable: NDArray[np.bool_], images: FeatureStore, texts: FeatureStore, number: int
) -> Rows:
    """The readable samples of a shard, with unit features; usable: bool [N]."""
    source, shard = how.source, images.ids(number)
    unreadable = images.unreadable.keys() | texts.unreadable.keys()
    ids = [shard.start + int(place) for place in np.flatnonzero(usable[shard.start : shard.stop])]
    ids = [sample for sample in ids if sample not in unreadable]
    captions = [source.captions(sample) for sample in ids]
    # a sample's captions are consecutive rows: [t] ids, and which of its captions each is
    order = np.array(ids, dtype=np.int64)
    text_ids = np.repeat(order, np.array([len(own) for own in captions], dtype=np.int64))
    which = iter([place for own in captions for place in range(len(own)) if len(own) > 1])
    return Rows(
        order,
        [source.name(sample) for sample in ids],
        captions,
        normalize(images.read(order), dim=1) if ids else torch.zeros(0, images.width),
        text_ids,
        normalize(texts.read(text_ids, lambda *_: next(which)), dim=1) if ids else torch.zeros(0, texts.width),
    )


def _write_safetensors(path: Path, rows: Rows, digest: str, dtype: torch.dtype) -> None:
    tensors = {
        "ids": torch.from_numpy(rows.ids),
        "image": rows.image.to(dtype),
        "text": rows.text.to(dtype),
        "text_ids": torch.from_numpy(rows.text_ids),
    }
    texts = {"names": json.dumps(rows.names), "captions": json.dumps(rows.captions, ensure_ascii=False)}
    save_file(tensors, path, metadata=texts | {"digest": digest})


def _write_parquet(path: Path, rows: Rows, digest: str, dtype: torch.dtype) -> None:
    import pyarrow
    import pyarrow.parquet

    counts = [len(own) for own in rows.captions]
    number = pyarrow.float16() if dtype is torch.float16 else pyarrow.float32()

    def vectors(features: Tensor) -> Any:
        flat = pyarrow.array(features.to(dtype).flatten().numpy(), type=number)
        return pyarrow.FixedSizeListArray.from_arrays(flat, features.shape[1])

    ends = np.cumsum([0, *counts], dtype=np.int32)
    columns = {
        "id": pyarrow.array(rows.ids, type=pyarrow.int64()),
        "name": pyarrow.array(rows.names, type=pyarrow.string()),
        "captions": pyarrow.array([list(own) for own in rows.captions], type=pyarrow.list_(pyarrow.string())),
        "image": vectors(rows.image),
        "text": pyarrow.ListArray.from_arrays(pyarrow.array(ends), vectors(rows.text)),
    }
    table = pyarrow.table(columns).replace_schema_metadata({"digest": digest})
    pyarrow.parquet.write_table(table, path)
