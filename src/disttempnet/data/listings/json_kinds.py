"""JSON files that are one object, as COCO, Karpathy, pandas and others write captions: rows of each kind."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain, islice
from pathlib import Path
from typing import Any, NamedTuple

from disttempnet.data.listings.fields import CAPTION_KEYS, IMAGE_KEYS, Fields, find_key, mistaken_for, names_an_image
from disttempnet.errors import UserError

HEAD_ITEMS = 100  # rows in which keys are looked for
READABLE_KINDS = (
    "a list of objects or an object a line, each with image and caption; COCO's captions_*.json; Karpathy's "
    "dataset_*.json; what pandas writes; {path: caption}; lists of such objects by split"
)


class JsonRows(NamedTuple):
    """Rows of a JSON file, their kind, and the keys of image and caption; empty = detected."""

    kind: str
    rows: Iterator[Fields | None]
    image_key: str = ""
    caption_key: str = ""


class Keys(NamedTuple):
    """Keys that a config names; empty = found among the usual ones."""

    image: str
    caption: str

    def image_in(self, rows: Iterable[Any]) -> str | None:
        return find_key(_keys(rows), self.image, IMAGE_KEYS)

    def caption_in(self, rows: Iterable[Any]) -> str | None:
        return find_key(_keys(rows), self.caption, CAPTION_KEYS)

    def both_in(self, rows: Sequence[Any]) -> bool:
        return self.image_in(rows) is not None and self.caption_in(rows) is not None


def known_kind(document: Mapping[str, Any], keys: Keys, where: Path) -> JsonRows:
    """Return the rows of a file that is one object.

    Args:
        document: the object.
        keys: as the config names them.
        where: the file, for messages.

    Raises:
        UserError: no known kind with captions; the message names the kind, or the known ones.
    """
    if isinstance(document.get("images"), list) and isinstance(document.get("annotations"), list):
        return _coco(document["images"], document["annotations"], where)
    if isinstance(document.get("columns"), list) and isinstance(document.get("data"), list):
        names = [str(name) for name in document["columns"]]
        return JsonRows("pandas' orient 'split'", (_zipped(names, row) for row in document["data"]))
    values = list(document.values())
    if keys.both_in([document]) and _same_lengths(values):
        return JsonRows("an object of columns", _columns(document))
    lists = {
        key: value for key, value in document.items() if isinstance(value, list) and keys.image_in(value[:HEAD_ITEMS])
    }
    if len(lists) == 1:
        ((key, rows),) = lists.items()
        return of_rows(rows, f"the list '{key}' of an object")
    if lists:
        split_rows = ({**row, "split": split} for split, part in lists.items() for row in part if isinstance(row, dict))
        return of_rows(split_rows, f"lists by split: {', '.join(lists)}")
    if values and all(isinstance(value, dict) for value in values):
        if keys.both_in(values[:HEAD_ITEMS]):
            return JsonRows("objects by key", ({"id": key, **value} for key, value in document.items()))
        if keys.caption_in(values[:HEAD_ITEMS]) and _name_images(document):
            return JsonRows("objects by image", ({**value, "image": key} for key, value in document.items()), "image")
    elif _name_images(document):
        pairs = ({"image": image, "caption": caption} for image, caption in document.items())
        return JsonRows("captions by image", pairs, "image", "caption")
    if kind := mistaken_for(_keys([document])):
        raise UserError(f"{where}: {kind}")
    raise UserError(f"{where}: is one object with {_some(document)}, which is not a known kind: {READABLE_KINDS}")


def is_row(document: Mapping[str, Any], keys: Keys) -> bool:
    """Tell whether an object on its own is a row: JSON lines may have one line."""
    image = keys.image_in([document])
    return image is not None and isinstance(document[image], str)


def of_rows(rows: Iterable[Any], kind: str = "") -> JsonRows:
    """Return rows as they are, or Karpathy's with folder and file name joined."""
    rows = iter(rows)
    head = list(islice(rows, HEAD_ITEMS))
    if head and all(isinstance(row, dict) and {"filename", "sentences"} <= row.keys() for row in head):
        return JsonRows("Karpathy's splits", (_karpathy(row) for row in chain(head, rows)), "image", "caption")
    return JsonRows(kind, (row if isinstance(row, dict) else None for row in chain(head, rows)))


def _coco(images: Sequence[Any], annotations: Sequence[Any], where: Path) -> JsonRows:
    if annotations and not any("caption" in row for row in annotations[:HEAD_ITEMS] if isinstance(row, dict)):
        raise UserError(f"{where}: is COCO's, without captions: take captions_*.json, which has them")
    captions: dict[Any, list[Any]] = defaultdict(list)
    for row in annotations:
        if isinstance(row, dict):
            captions[row.get("image_id")].append(row.get("caption"))

    def rows() -> Iterator[Fields | None]:
        for image in images:
            if isinstance(image, dict):
                number = image.get("id")
                yield {"image": image.get("file_name"), "caption": captions.pop(number, None), "image_id": number}
            else:
                yield None
        for number, texts in captions.items():  # images that are not in the list
            yield {"image": None, "caption": texts, "image_id": number}

    return JsonRows("COCO's captions", rows(), "image", "caption")


def _karpathy(row: Any) -> Fields | None:
    if not isinstance(row, dict):
        return None
    folder, name = row.get("filepath", ""), row.get("filename")
    image = f"{folder}/{name}" if folder and isinstance(name, str) else name
    others = {key: value for key, value in row.items() if not isinstance(value, (list, dict))}
    return {**others, "image": image, "caption": row.get("sentences")}


def _zipped(names: Sequence[str], row: Any) -> Fields | None:
    fits = isinstance(row, list) and len(row) == len(names)
    return dict(zip(names, row, strict=True)) if fits else None


def _same_lengths(columns: Sequence[Any]) -> bool:
    """Tell whether all values are columns of a table: lists, or objects by row, of one length."""
    kinds = {type(column) for column in columns}
    return kinds in ({list}, {dict}) and len({len(column) for column in columns}) == 1


def _columns(document: Mapping[str, Any]) -> Iterator[Fields]:
    first = next(iter(document.values()))
    for row in first if isinstance(first, dict) else range(len(first)):
        yield {name: column.get(row) if isinstance(column, dict) else column[row] for name, column in document.items()}


def _name_images(document: Mapping[str, Any]) -> bool:
    """Tell whether most keys are names of images."""
    return len(document) > 0 and sum(map(names_an_image, document)) >= 0.5 * len(document)


def _keys(rows: Iterable[Any]) -> list[str]:
    return [*dict.fromkeys(key for row in rows if isinstance(row, dict) for key in row)]


def _some(document: Mapping[str, Any]) -> str:
    shown = [repr(key if len(key) < 40 else f"{key[:39]}…") for key in islice(document, 8)]
    return ", ".join(shown) + (", …" if len(document) > 8 else "")
