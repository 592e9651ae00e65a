"""Named fields of a row, and which of them hold image and captions."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any

Fields = dict[str, Any]


class NoBytes(str):
    """Name of an image without bytes, such as a failed download."""


ADDRESSES = "lists addresses, not files: download the images first (disttempnet data download, or img2dataset)"

# in order of preference; new keys go to the end, so that earlier choices stay
IMAGE_KEYS = (
    *("image", "filepath", "path", "file_name", "filename"),
    *("image_path", "image_name", "image_file", "img_path", "img_name", "img", "file", "file_path"),
)
CAPTION_KEYS = (
    *("caption", "captions", "title", "text"),
    *("comment", "sentences", "sentence", "raw", "description", "txt"),
)
SENTENCE_KEYS = ("raw", "caption", "text")  # of captions that are objects, as in Karpathy's files
CAPTION_NUMBER = re.compile(r"#\d+$")  # FILE.jpg#0: the first caption of an image in the lists of Flickr8k and 30k
_IMAGE_NAME = re.compile(r".\.(jpe?g|jpe|png|webp|gif|bmp|tiff?|ppm)(#\d+)?\s*$", re.IGNORECASE)


def find_key(keys: Iterable[str], named: str, usual: Sequence[str]) -> str | None:
    """Return the named key, or else the first usual one; case and surrounding blanks do not matter."""
    known = dict.fromkeys(keys)
    plain = {key.strip().lower(): key for key in reversed(known)}
    for key in (named,) if named else usual:
        if key in known:
            return key
    return next((plain[key] for key in usual if key in plain), None) if not named else None


def likely_keys(rows: Sequence[Fields | None], image: str | None, caption: str | None) -> tuple[str, str]:
    """Return the keys that hold images and captions by their values, where these are not known; empty = none does.

    Images are values that end like names of images. Captions are the text of most words.
    """
    values: dict[str, list[str]] = {}
    for fields in rows:
        for key, value in (fields or {}).items():
            first = value[0] if isinstance(value, list) and value else value
            if isinstance(first, str) and first.strip():
                values.setdefault(key, []).append(first)
    images = [
        key for key, texts in values.items() if key != caption and 2 * sum(map(names_an_image, texts)) >= len(texts)
    ]
    found = image or next(iter(images), "")
    words = {
        key: sum(len(text.split()) for text in texts) / len(texts)
        for key, texts in values.items()
        if key not in (found, *images) and 2 * sum(any(map(str.isalpha, text)) for text in texts) >= len(texts)
    }
    return found, caption or max(words, key=lambda key: words[key], default="")


def names_an_image(text: Any) -> bool:
    """Tell whether a value ends like the name of an image file."""
    return isinstance(text, str) and _IMAGE_NAME.search(text) is not None


# files often mistaken for captioned images, recognised by their keys
_KINDS: dict[str, tuple[str, ...]] = {
    "is img2dataset's table of what it has downloaded: name the folder of its tars, or of its folders of images": (
        *("url", "key", "status"),
    ),
    "is LLaVA's: conversations, which are no captions": ("conversations",),
    "holds questions and answers, no captions": ("question",),
    "is COCO's, without captions: take captions_*.json, which has them": ("bbox",),
    "holds labels, no captions: evaluate --tasks folder:PATH takes images in folders of classes": ("image", "label"),
}


def mistaken_for(keys: Iterable[str]) -> str:
    """Describe a file with these keys if it is a known kind without captions; else return an empty string."""
    known = {key.strip().lower() for key in keys}
    return next((what for what, signs in _KINDS.items() if known.issuperset(signs)), "")
