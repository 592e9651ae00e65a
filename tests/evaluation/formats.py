"""Writers of the formats that evaluation data comes in: DataComp's folders of tars, and raw CSVs with images."""

from __future__ import annotations

import csv
import io
import json
import tarfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from tests.evaluation.colours import shown

SUFFIXES = ("webp", "png", "jpg", "jpeg")
FORMATS = {"webp": "WEBP", "png": "PNG", "jpg": "JPEG", "jpeg": "JPEG"}
CORRUPT = b"\x89PNG and no more"

Parts = Mapping[str, bytes]  # suffix of a tar member → its bytes


def picture(colour: str, suffix: str = "png", size: tuple[int, int] = (12, 10)) -> bytes:
    """An encoded image of one colour, named in words ("red and red and green")."""
    file = io.BytesIO()
    Image.new("RGB", size, shown(colour)).save(file, FORMATS[suffix])
    return file.getvalue()


def folder_of(key: str) -> str:
    """DataComp's folder of a task: `vtab/dtd` → `wds_vtab-dtd_test`, `fairness/geode` → `wds_geode_test`."""
    return f"wds_{key.removeprefix('fairness/').replace('/', '-')}_test"


def npy(row: Sequence[int]) -> bytes:
    file = io.BytesIO()
    np.save(file, np.array(row, dtype=np.int64))
    return file.getvalue()


def write_tar(path: Path, samples: Sequence[Parts], first: int = 0) -> None:
    with tarfile.open(path, "w") as tar:
        for number, parts in enumerate(samples, first):
            for suffix, data in parts.items():
                member = tarfile.TarInfo(f"s{number:07d}.{suffix}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))


def write_wds(
    root: Path,
    key: str,
    samples: Sequence[Parts],
    *,
    classes: Iterable[str] = (),
    templates: Iterable[str] = (),
    kind: str = "",
    shards: int = 1,
) -> Path:
    """A dataset in CLIP_benchmark's layout: test/0.tar … and nshards.txt, the words of its classes beside them."""
    folder = root / folder_of(key)
    (folder / "test").mkdir(parents=True)
    words = {"classnames": classes, "zeroshot_classification_templates": templates, "dataset_type": [kind] * bool(kind)}
    for name, lines in words.items():
        text = "".join(f"{line}\n" for line in lines)
        if text:
            (folder / f"{name}.txt").write_text(text, encoding="utf-8")
    (folder / "test" / "nshards.txt").write_text(f"{shards}\n", encoding="utf-8")
    bounds = [len(samples) * i // shards for i in range(shards + 1)]
    for shard in range(shards):
        part = samples[bounds[shard] : bounds[shard + 1]]
        write_tar(folder / "test" / f"{shard}.tar", part, bounds[shard])
    return folder


def labelled(rows: Iterable[tuple], classes: Sequence[str]) -> list[dict[str, bytes]]:
    """Rows (colour shown, class name or label, metadata…) → members image, .cls and, with metadata, .npy.

    The image's format changes from row to row, as it does in Dollar Street.
    """
    samples = []
    for number, (colour, called, *metadata) in enumerate(rows):
        suffix = SUFFIXES[number % len(SUFFIXES)]
        label = called if isinstance(called, int) else classes.index(called)
        parts = {suffix: picture(colour, suffix), "cls": str(label).encode()}
        samples.append(parts | ({"npy": npy(metadata)} if metadata else {}))
    return samples


def write_captioned_wds(root: Path, key: str, rows: Iterable[tuple[str, Sequence[str]]], shards: int = 1) -> Path:
    """Rows (colour shown, captions) in CLIP_benchmark's retrieval layout."""
    samples = [{"jpg": picture(colour, "jpg"), "txt": "\n".join(captions).encode()} for colour, captions in rows]
    return write_wds(root, key, samples, kind="retrieval", shards=shards)


def write_csv(path: Path, rows: Sequence[Mapping[str, object]]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, ["", *rows[0]])
        writer.writeheader()
        writer.writerows({"": number, **row} for number, row in enumerate(rows))


def write_captioned_csv(folder: Path, name: str, images: str, rows: Sequence[tuple[str, Sequence[str]]]) -> None:
    """Rows (colour shown, captions) as the raw files of Flickr and MSCOCO: a table and a folder of images."""
    (folder / images).mkdir(parents=True)
    lines = []
    for number, (colour, captions) in enumerate(rows):
        filename = f"COCO_val2014_{number:012d}.jpg"
        (folder / images / filename).write_bytes(picture(colour, "jpg"))
        line = {"raw": json.dumps(list(captions)), "sentids": json.dumps([number]), "split": "test"}
        lines.append(line | {"filename": filename, "img_id": number})
    write_csv(folder / name, lines)


def write_winogavil_csv(
    folder: Path, instances: Sequence[tuple[str, Sequence[str], Sequence[str]]], pool: Mapping[str, bytes]
) -> None:
    """Instances (cue, candidates, associations) and the JPEG of every candidate, in WinoGAViL's raw files."""
    images = folder / "winogavil_images"
    images.mkdir(parents=True)
    for candidate, data in pool.items():
        (images / f"{candidate}.jpg").write_bytes(data)
    lines = []
    for number, (cue, candidates, associations) in enumerate(instances):
        line = {"candidates": json.dumps(candidates), "cue": cue, "associations": json.dumps(associations)}
        line |= {"score_fool_the_ai": 67, "num_associations": len(associations), "num_candidates": len(candidates)}
        lines.append(line | {"solvers_jaccard_mean": 1.0, "solvers_jaccard_std": 0.0, "ID": number})
    write_csv(folder / "winogavil_dataset.csv", lines)
