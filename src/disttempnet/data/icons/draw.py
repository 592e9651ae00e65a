"""An icon of the package → the concept and style in its name, and its picture: 48 pixels, dark on white."""

from __future__ import annotations

import hashlib
import io
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from importlib.metadata import version
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from disttempnet.errors import UserError

SIDE = 48  # pixels
INK = "#222"  # what `currentColor` stands for
DARK = 200  # a picture whose darkest value is above is blank
CONTRAST = 4  # and so is one whose values have a smaller standard deviation
QUALITY = 80  # of WebP, of pictures with colour; grey ones are lossless
# What the words at the end of a name say of the style; "" = of nothing that can be seen.
STYLES = {
    "outline": "outline", "outlined": "outline", "line": "outline", "linear": "outline", "stroke": "outline",
    "filled": "filled", "fill": "filled", "solid": "filled", "bold": "bold", "light": "light", "thin": "thin",
    "duotone": "two-tone", "twotone": "two-tone", "bulk": "two-tone", "rounded": "rounded", "round": "rounded",
    "sharp": "sharp", "broken": "broken", "logo": "logo",
    "regular": "", "color": "", "flat": "", "mini": "", "micro": "", "baseline": "", "s": "", "l": "",
}  # fmt: skip
FIRST_STYLES = ("outline", "twotone", "sharp", "round", "baseline", "filled")  # that a name may begin with
SIZE = re.compile(r"^\d+(px)?$")

Pixels = NDArray[np.uint8]


class Icon(NamedTuple):
    """A drawing of the package and what its name says.

    Attributes:
        box: left, top, width and height of what is seen of it.
        category: the vendor's own; empty where there is none.
    """

    name: str
    concept: str
    style: str
    category: str
    body: str
    box: tuple[float, float, float, float]


def need_libraries() -> str:
    """Return the version of resvg-py, which draws. Raises UserError where it or pyarrow is not installed."""
    try:
        import pyarrow  # noqa: F401
        import resvg_py  # noqa: F401
    except ImportError as error:
        raise UserError(f"building the icons needs {error.name}: pip install 'disttempnet[icons]'") from None
    return version("resvg_py")


def concept_of(name: str) -> tuple[str, str]:
    """The concept and the style in an icon's name: `arrow-right-24-filled` → (`arrow right`, `filled`)."""
    parts, styles = [part for part in name.split("-") if part], set()
    while len(parts) > 1 and (SIZE.match(parts[-1]) or parts[-1] in STYLES):
        styles.add(STYLES.get(parts.pop(), ""))
    while len(parts) > 1 and parts[0] in FIRST_STYLES:
        styles.add(STYLES[parts.pop(0)])
    return " ".join(parts), " ".join(sorted(styles - {""}))


def icons_of(collection: Mapping[str, Any]) -> Iterator[Icon]:
    """The icons of a vendor's file that can be seen, stand still and are called something, in its order."""
    category: defaultdict[str, str] = defaultdict(str)
    for title, names in collection.get("categories", {}).items():
        category.update(dict.fromkeys(names, title))
    width, height = collection.get("width", 16), collection.get("height", 16)
    for name, icon in collection["icons"].items():
        concept, style = concept_of(name)
        if icon.get("hidden") or len(concept) < 2 or "animat" in icon["body"]:
            continue
        box = (icon.get("left", 0), icon.get("top", 0), icon.get("width", width), icon.get("height", height))
        yield Icon(name, concept, style, category[name], icon["body"], box)


def draw(icon: Icon) -> Pixels | None:
    """Pixels [48, 48, 3]; None where it cannot be drawn, or nothing is to be seen."""
    import resvg_py

    left, top, width, height = icon.box
    svg = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="{left} {top} {width} {height}" '
        f'width="{SIDE}" height="{SIDE}" color="{INK}">{icon.body}</svg>'
    )
    try:
        png = bytes(resvg_py.svg_to_bytes(svg_string=svg, background="white", skip_system_fonts=True))
        image = Image.open(io.BytesIO(png)).convert("RGB")
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException:  # a panic of the renderer is no Exception
        return None
    if image.size != (SIDE, SIDE):
        canvas = Image.new("RGB", (SIDE, SIDE), "white")
        canvas.paste(image, ((SIDE - image.width) // 2, (SIDE - image.height) // 2))
        image = canvas
    pixels = np.asarray(image)
    return None if pixels.min() > DARK or pixels.std() < CONTRAST else pixels


def digest_of(pixels: Pixels) -> bytes:
    """12 bytes, the same for the same picture."""
    return hashlib.blake2b(pixels.tobytes(), digest_size=12).digest()


def encode(pixels: Pixels) -> bytes:
    """A picture as WebP: lossless where it is grey."""
    grey = bool((pixels.max(2) == pixels.min(2)).all())
    image = Image.fromarray(pixels)
    file = io.BytesIO()
    (image.convert("L") if grey else image).save(file, "WEBP", lossless=grey, quality=QUALITY, method=4)
    return file.getvalue()
