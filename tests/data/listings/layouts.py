"""Data sets in every layout of a listing, and their opening."""

import json
from pathlib import Path

import pytest
from hypothesis import strategies as st

from disttempnet.config import SourceConfig
from disttempnet.data import (
    open_source,
)
from disttempnet.data.listings.open import Listing
from disttempnet.errors import UserError
from tests.data.conftest import png


def open_one(path: object, **settings: str) -> Listing:
    source = open_source((SourceConfig(path=str(path), **settings),), progress=False)
    assert isinstance(source, Listing)
    return source


def refusal(path: object, **settings: str) -> str:
    """The one line that opening fails with."""
    with pytest.raises(UserError) as caught:
        open_one(path, **settings)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def write_images(folder: Path, *names: str) -> None:
    for number, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(png(number))


def cc3m(folder: Path, count: int) -> SourceConfig:
    """As the TempNet code has it: `cc3m/cc3m_train/…`, and `clip_train/cc3m_train.json` elsewhere."""
    names = [f"cc3m_train/{n:09d}.jpg" for n in range(count)]
    write_images(folder / "cc3m", *names)
    items = [{"caption": f"caption {n}", "image": name, "image_id": f"cc3m_{n}"} for n, name in enumerate(names)]
    listing = folder / "clip_train" / "cc3m_train.json"
    listing.parent.mkdir()
    listing.write_text(json.dumps(items))
    return SourceConfig(path=str(listing), images=str(folder / "cc3m"))


def images_and_texts(folder: Path, count: int) -> SourceConfig:
    root = folder / "pairs"
    write_images(root, *(f"{n // 2:02d}/{n:05d}.jpg" for n in range(count)))
    for n in range(count):
        (root / f"{n // 2:02d}/{n:05d}.txt").write_text(f"caption {n}\n")
        (root / f"{n // 2:02d}/{n:05d}.json").write_text(f'{{"number": {n}}}')
    return SourceConfig(path=str(root))


text = st.text(st.characters(exclude_categories=("Cs", "Cf")), max_size=30)


captions = st.one_of(text, st.lists(text, max_size=3))
