"""A small model as open_clip saves it, a folder of photos without captions, and a cache of the test's own."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image

from disttempnet.data.images import UnreadableImage, decode
from disttempnet.models import Towers, load_model, save_model
from tests.data.pictures import encoded, gradient

LOGIT_SCALE = 25.0


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of the test's own, the cache in it."""
    monkeypatch.setenv("DISTTEMPNET_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="session")
def towers() -> Towers:
    torch.manual_seed(0)
    towers = load_model("demo-vit-32")
    towers.module.eval()
    return towers


@pytest.fixture(scope="session")
def model(towers: Towers, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The folder of the towers, with a logit scale of their own."""
    folder = tmp_path_factory.mktemp("model")
    save_model(towers, folder, logit_scale=LOGIT_SCALE)
    return str(folder)


@pytest.fixture
def photos(here: Path) -> Path:
    """Forty images and those that people have: CMYK, an animation, a wrong ending, a cut one, a dead link."""
    folder = here / "photos"
    for number in range(40):
        place = folder / ("deep/er" if number % 3 else ".")
        place.mkdir(parents=True, exist_ok=True)
        kind = ("PNG", "WEBP", "BMP")[number % 3]
        (place / f"{number:02d}.{kind.lower()}").write_bytes(encoded(gradient(40 + number, 30 + 2 * number), kind))
    gradient(50).convert("CMYK").save(folder / "cmyk.jpg")
    frames = [Image.new("RGB", (30, 20), colour) for colour in ("red", "blue")]
    frames[0].save(folder / "animated.gif", save_all=True, append_images=frames[1:])
    (folder / "a png.jpg").write_bytes(encoded(gradient(70), "PNG"))
    (folder / "=1+1.png").write_bytes(encoded(gradient(71), "PNG"))
    (folder / "<b> & 日本.png").write_bytes(encoded(gradient(72), "PNG"))
    (folder / "corrupt.jpg").write_bytes(b"no image")
    (folder / "cut.png").write_bytes(encoded(gradient(60), "PNG")[:-30])
    (folder / "gone.png").symlink_to(here / "nowhere.png")
    (folder / ".hidden.png").write_bytes(encoded(gradient(73), "PNG"))
    (folder / "notes.txt").write_text("no image")
    return folder


UNREADABLE = ["corrupt.jpg", "cut.png", "gone.png"]


def readable(folder: Path) -> dict[str, Image.Image]:
    """Name → pixels of all images of a folder that Pillow reads, in the order of names, found another way."""
    found = {}
    for path in sorted(folder.rglob("*"), key=lambda path: path.relative_to(folder).as_posix()):
        if path.is_file() and not path.name.startswith("."):
            try:
                found[path.relative_to(folder).as_posix()] = decode(path.read_bytes())
            except UnreadableImage:
                continue
    return found
