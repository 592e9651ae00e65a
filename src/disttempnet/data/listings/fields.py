"""Named fields of a row, and which of them hold image and captions."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any

Fields = dict[str, Any]


class NoBytes(str):
    """The name of an image that has no bytes, such as what a downloader could not fetch."""


ADDRESSES = "lists addresses, not files: download the images first (disttempnet data download, or img2dataset)"

# the first of these that the rows have; those that come later were added later, so that no earlier choice changes
IMAGE_KEYS = (
    *("image", "filepath", "path", "file_name", "filename"),
    *("image_path", "image_name", "image_file", "img_path", "img_name", "img", "file", "file_path"),
)
CAPTION_KEYS = (
    *("caption", "captions", "title", "text"),
    *("comment", "sentences", "sentence", "raw", "description", "txt"),
)
SENTENCE_KEYS = ("raw", "caption", "text")  # of captions that are objects, such as Karpathy's sentences
CAPTION_NUMBER = re.compile(r"#\d+$")  # FILE.jpg#0: the first caption of an image in the lists of Flickr8k and 30k
_IMAGE_NAME = re.compile(r".\.(jpe?g|jpe|png|webp|gif|bmp|tiff?|ppm)(#\d+)?\s*$", re.IGNORECASE)


def find_key(keys: Iterable[str], named: str, usual: Sequence[str]) -> str | None:
    """The key that a config names, or else the first usual one; upper case and blanks around it are of no concern."""
    known = dict.fromkeys(keys)
    plain = {key.strip().lower(): key for key in reversed(known)}
    for key in (named,) if named else usual:
        if key in known:
            return key
    return next((plain[key] for key in usual if key in plain), None) if not named else None


def names_an_image(text: Any) -> bool:
    """Whether a value ends as the name of an image file does."""
    return isinstance(text, str) and _IMAGE_NAME.search(text) is not None


# kinds of files that people take for captioned images, by keys that tell them
_KINDS: dict[str, tuple[str, ...]] = {
    "is img2dataset's table of what it has downloaded: name the folder of its tars, or of its folders of images": (
        *("url", "key", "status"),
    ),
    "is LLaVA's: conversations, which are no captions": ("conversations",),
    "holds questions and answers, no captions": ("question",),
    "is COCO's, without captions: take captions_*.json, which has them": ("bbox",),
    "holds labels, no captions: evaluate --tasks folder:PATH takes images in folders of classes": ("image", "label"),
}


def kind_of(keys: Iterable[str]) -> str:
    """What a file with these keys is, where it is of a known kind that holds no captions; else empty."""
    known = {key.strip().lower() for key in keys}
    return next((what for what, signs in _KINDS.items() if known.issuperset(signs)), "")
