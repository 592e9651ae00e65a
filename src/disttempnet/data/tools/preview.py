"""Contact sheet: random samples of a data set with captions and ids, as a PNG or an HTML page."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from PIL import Image

from disttempnet.data.images import UnreadableImage, decode
from disttempnet.data.source import Source, UnreadableCaption
from disttempnet.data.tools.sheet import THUMBNAIL, FontStack, PreviewTile, draw_sheet
from disttempnet.errors import UserError
from disttempnet.io.files import refuse_unwritable, write_output


def write_preview(source: Source, out: Path, count: int, seed: int) -> str:
    """Write pictures and captions of random samples.

    Args:
        source: the data.
        out: a .png, or a self-contained .html, which shows full captions in any script.
        count: number of samples.
        seed: of the random choice.

    Returns:
        A note about missing characters; empty if there are none.

    Raises:
        UserError: another suffix, or a file that cannot be written.
    """
    if out.suffix.lower() not in (".png", ".html"):
        raise UserError(f"{out}: a preview is a .png or an .html file")
    if count < 1:
        raise UserError(f"--count {count}: show at least one sample")
    refuse_unwritable(out)
    tiles = list(draw_samples(source, count, seed))
    heading = f"{source.where} · {len(tiles):,} of {len(source.usable):,} samples, seed {seed}"
    lettering = FontStack()
    if out.suffix.lower() == ".html":
        data = _page(tiles, heading).encode("utf-8")
    else:
        file = io.BytesIO()
        draw_sheet(tiles, heading, lettering).save(file, "PNG")
        data = file.getvalue()
    write_output(out, data)
    if not lettering.missing:
        return ""
    shown = " ".join(sorted(lettering.missing)[:10])
    return f"no font here has {len(lettering.missing)} of the characters ({shown}); write an .html instead"


def draw_samples(source: Source, count: int, seed: int) -> Iterator[PreviewTile]:
    """Yield random usable samples, by ascending id; unreadable ones have a problem instead of an image."""
    usable = source.usable
    drawn = np.random.default_rng(seed).choice(usable, min(count, len(usable)), replace=False)
    for sample in sorted(drawn.tolist()):
        image, problem = None, ""
        captions: tuple[str, ...] = ()
        try:
            captions = source.captions(sample)
            image = decode(source.image_bytes(sample))
        except (UnreadableCaption, UnreadableImage) as error:
            problem = str(error)
        size = f" · {image.width}×{image.height}" if image is not None else ""
        picture = _fit(image) if image is not None else None
        yield PreviewTile((f"{sample}{size}", source.name(sample)), picture, captions, problem)


def _fit(image: Image.Image) -> Image.Image:
    """Resize to the size of a tile; small images are enlarged up to three times."""
    scale = min(THUMBNAIL / max(image.size), 3.0)
    width, height = (max(1, round(side * scale)) for side in image.size)
    return image.resize((width, height), Image.Resampling.LANCZOS)


def _page(tiles: list[PreviewTile], heading: str) -> str:
    loader = FileSystemLoader(Path(__file__).parent)
    environment = Environment(loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    pictures = [(tile, _inline(tile.image) if tile.image else "") for tile in tiles]
    return environment.get_template("preview.html").render(tiles=pictures, heading=heading)


def _inline(image: Image.Image) -> str:
    file = io.BytesIO()
    image.save(file, "JPEG", quality=88)
    return "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode()
