"""Features of a data set as files for your own use, of the embeddings of both towers.

    OUT/about.json                    what the features are of: weights, tokenizer, transform, index; their digest
    OUT/features-00000.safetensors    ids int64 [n], image [n, D], text [t, D], text_ids int64 [t]; its metadata has
                                      names, captions (JSON) and the digest
    OUT/features-00000.parquet        or: columns id, name, captions, image, text; the digest is in its metadata

Rows have norm 1. Samples that cannot be read are left out. While it works, OUT/.parts holds what is done: a command
that was killed goes on from there.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
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
from disttempnet.errors import UserError
from disttempnet.features.build import Build, Pass, build, usable_mask, width_of
from disttempnet.features.cache_key import facts_of
from disttempnet.features.store import DTYPES, FeatureStore, features_digest, store_in
from disttempnet.io.files import atomic, unwritable_named, write_output
from disttempnet.models import Towers
from disttempnet.models.trunk import TOWER_SIDES, trunk_of

PARTS = ".parts"
ABOUT = "about.json"
ELSEWHERE = "name another --out"
FORMATS = ("safetensors", "parquet")


class Rows(NamedTuple):
    """Some samples: ids, names and captions of each, image [n, D] and text [t, D], caption after caption."""

    ids: list[int]
    names: list[str]
    captions: list[tuple[str, ...]]
    image: Tensor
    text: Tensor


def refuse_format(kind: str) -> None:
    """Raise UserError where files of this format cannot be written: learnt before hours of work."""
    if kind == "parquet":
        try:
            import pyarrow.parquet  # noqa: F401
        except ImportError:
            raise UserError(
                "Parquet needs pyarrow: pip install 'disttempnet[parquet]', or --format safetensors"
            ) from None


def embed_source(
    towers: Towers, how: Build, out: Path, kind: str = "safetensors", dtype: str = "float32", model: str = ""
) -> int:
    """Write the embeddings of all samples of a source; every rank calls this.

    Args:
        towers: on the device of `how`.
        how: source, device, sizes.
        out: folder of the files; one of other features is refused.
        kind: one of `FORMATS`.
        dtype: `float32` or `float16`.
        model: what the towers are called in about.json; empty = their name.

    Returns:
        How many samples were written.

    Raises:
        UserError: no room on the disk, files of other features, or data that cannot be read.
    """
    towers.module.requires_grad_(False)  # nothing is trained: the trunk is all of a tower
    trunks = {side: trunk_of(towers, side) for side in TOWER_SIDES}
    facts = {side: facts_of(trunk, how.source, how.autocast) for side, trunk in trunks.items()}
    facts["image"]["transform"] = {"name": "evaluation"}
    about: dict[str, Any] = {"features": facts, "dtype": dtype, "format": kind}
    digest = features_digest(about)
    # what names and notes say has no part in the digest
    about |= {"digest": digest, "width": towers.embed_dim, "source": how.source.where}
    about |= {"model": model or towers.name, "notes": list(towers.notes)}
    distributed.together(lambda: _refuse_other(out / ABOUT, digest))
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
    there = sum(path.stat().st_size for path in out.glob(f"features-*.{kind}"))  # these are replaced
    smaller = "choose --dtype float16, " if dtype == "float32" else ""
    build(list(passes.values()), how, f"{smaller}or {ELSEWHERE}", max(0, how.end * rows_bytes - there))

    # join both sides: a file a shard
    def write() -> int:
        if not distributed.is_main():
            return 0
        count, paths = 0, set()
        usable = usable_mask(how.source)
        for number in passes["image"].store.shards(how.end):
            rows = _rows(how, usable, passes["image"].store, passes["text"].store, number)
            path = out / f"features-{number:05d}.{kind}"
            with unwritable_named(path), atomic(path) as temporary:
                (_write_parquet if kind == "parquet" else _write_safetensors)(temporary, rows, digest, DTYPES[dtype])
            count += len(rows.ids)
            paths.add(path)
        for path in set(out.glob(f"features-*.{kind}")) - paths:  # of a command with more or other shards
            with unwritable_named(path):
                path.unlink()
        _write_about(out, about | {"samples": count, "complete": True})
        shutil.rmtree(out / PARTS, ignore_errors=True)
        return count

    return int(distributed.gather_objects(distributed.together(write))[0])


def _write_about(out: Path, about: dict[str, Any]) -> None:
    write_output(out / ABOUT, json.dumps(about, indent=1, ensure_ascii=False) + "\n")


def _refuse_other(path: Path, digest: str) -> None:
    """Raise UserError where a folder holds other features: files of two models must not lie side by side."""
    try:
        found = json.loads(path.read_bytes()).get("digest")
    except FileNotFoundError:
        return
    except (OSError, ValueError, AttributeError):
        found = None
    if found != digest:
        raise UserError(f"{path.parent}: holds features of another model, source or format: give another --out")


def _rows(how: Build, usable: NDArray[np.bool_], images: FeatureStore, texts: FeatureStore, number: int) -> Rows:
    """The readable samples of a shard, with unit features; usable: bool [N]."""
    source, shard = how.source, images.ids(number)
    unreadable = images.unreadable.keys() | texts.unreadable.keys()
    ids = [shard.start + int(place) for place in np.flatnonzero(usable[shard.start : shard.stop])]
    ids = [sample for sample in ids if sample not in unreadable]
    captions = [source.captions(sample) for sample in ids]
    # a sample's captions are consecutive rows: [t] ids, and which of its captions each is
    repeated = np.array([sample for sample, own in zip(ids, captions, strict=True) for _ in own], dtype=np.int64)
    which = iter([place for own in captions for place in range(len(own)) if len(own) > 1])
    order = np.array(ids, dtype=np.int64)
    return Rows(
        ids,
        [source.name(sample) for sample in ids],
        captions,
        normalize(images.read(order), dim=1) if ids else torch.zeros(0, images.width),
        normalize(texts.read(repeated, lambda *_: next(which)), dim=1) if ids else torch.zeros(0, texts.width),
    )


def _text_ids(rows: Rows) -> Iterator[int]:
    for sample, captions in zip(rows.ids, rows.captions, strict=True):
        yield from (sample for _ in captions)


def _write_safetensors(path: Path, rows: Rows, digest: str, dtype: torch.dtype) -> None:
    tensors = {
        "ids": torch.tensor(rows.ids, dtype=torch.int64),
        "image": rows.image.to(dtype),
        "text": rows.text.to(dtype),
        "text_ids": torch.tensor(list(_text_ids(rows)), dtype=torch.int64),
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
