"""Images to test with, made here."""

import io

import numpy as np
from PIL import Image


def gradient(width: int = 60, height: int = 40) -> Image.Image:
    y, x = np.mgrid[:height, :width]
    pixels = np.stack([x * 255 // width, y * 255 // height, (x + y) % 256], axis=-1)
    return Image.fromarray(pixels.astype(np.uint8))


def photo(width: int, height: int) -> Image.Image:
    """Structure at every scale, as photographs have: noise at doubling sizes, summed."""
    draw, total = np.random.default_rng(0), np.zeros((height, width, 3))
    for side in (4, 8, 16, 32, 64, 128, 256):
        noise = Image.fromarray(draw.integers(0, 256, (side, side, 3), dtype=np.uint8))
        total += np.asarray(noise.resize((width, height), Image.Resampling.BICUBIC), dtype=float) / side
    return Image.fromarray((255 * (total - total.min()) / np.ptp(total)).astype(np.uint8))


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def noise_image(format: str, size: tuple[int, int], **options: object) -> bytes:
    """An encoded image of noise."""
    file = io.BytesIO()
    Image.effect_noise(size, 40).convert("RGB").save(file, format, **options)
    return file.getvalue()
