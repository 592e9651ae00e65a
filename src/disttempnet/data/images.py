"""Encoded images → RGB pixels, with limits for format and size.

Pillow reads all formats and decides which images are readable. If `simplejpeg` (extra `fast`) is installed, it decodes
JPEGs with libjpeg-turbo directly: the same pixels, without Pillow's detour over four bytes per pixel. EXIF is ignored,
including the orientation, as in open_clip.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

try:
    import simplejpeg
except ImportError:  # the same pixels without it
    simplejpeg = None

MAX_PIXELS = 89_478_485  # Pillow's limit against decompression bombs: 256 MiB of RGB
MAX_BYTES = 1 << 29  # of an encoded image: enough for MAX_PIXELS in every format, except 16 bits without compression
IMAGE_SUFFIXES = frozenset({"jpg", "jpeg", "png", "webp"})  # of images with captions beside them
# of all files that `decode` reads
DECODED_SUFFIXES = IMAGE_SUFFIXES | {"jpe", "jfif", "bmp", "gif", "tif", "tiff", "ppm", "pgm", "pbm", "pnm"}
PILLOW_FORMATS = (
    "JPEG",
    "PNG",
    "WEBP",
    "GIF",
    "BMP",
    "TIFF",
    "PPM",
)  # without formats that start a program, such as EPS
WHITES = {"i": (255, 65535), "u": (255, 65535), "f": (1, 255)}  # candidates for white in 32-bit grey, by kind of number
OVERSHOOT = 1.01  # of black and white by resizing
SCALES = (8, 4, 2)  # a JPEG decodes at 1/8, 1/4 and 1/2 for less than its full size costs

_Result = TypeVar("_Result")


class UnreadableImage(ValueError):
    """Bytes that are not an image, or that may not be decoded; the message gives the reason."""


def is_image(name: str, suffixes: frozenset[str] = IMAGE_SUFFIXES) -> bool:
    """Tell whether a file name ends in one of these suffixes, in lower or upper case."""
    return name.rpartition(".")[2].lower() in suffixes


class EncodedImage:
    """Image with the header read and the pixels not yet decoded, so that a crop can be chosen first.

    Args:
        data: the encoded image.

    Attributes:
        width, height: in pixels.

    Raises:
        UnreadableImage: not an image, a placeholder of one pixel, or so large that it may be a decompression bomb.
            Decoding also raises it, if the pixels are cut off or damaged.
    """

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._image: Image.Image | None = None
        size = _jpeg_size(data)
        if size is None:
            self._image = _read(lambda: Image.open(io.BytesIO(data), formats=PILLOW_FORMATS))
            size = self._image.size
        self.width, self.height = size
        if self.width * self.height > MAX_PIXELS:
            raise _bomb()
        if size == (1, 1):
            raise UnreadableImage("one pixel: a placeholder, not an image")

    def pixels(self, scale: int = 1) -> NDArray[np.uint8]:
        """Decode all pixels, uint8 [height, width, 3], writable.

        Args:
            scale: one of `SCALES`, or 1. JPEGs are decoded at 1/scale of their size, rounded up; others at full size.
        """
        if self._image is None:
            # at least this large and at most 1/scale: exactly that
            least = {"min_height": -(-self.height // scale), "min_width": -(-self.width // scale)} if scale > 1 else {}
            try:
                return simplejpeg.decode_jpeg(self._data, min_factor=float(scale), **least)
            except ValueError:  # it stops at every warning, and at some Pillow goes on
                pass
        return np.array(self.rgb(scale))

    def rgb(self, scale: int = 1, plain: bool = False) -> Image.Image:
        """Decode to RGB, with transparency on white; for `scale` see `pixels`, for `plain` see `decode`."""
        return _read(lambda: self._rgb(scale, plain))

    def _rgb(self, scale: int, plain: bool) -> Image.Image:
        image = self._image or Image.open(io.BytesIO(self._data), formats=PILLOW_FORMATS)
        if scale > 1:
            image.draft(None, (self.width // scale, self.height // scale))  # nothing happens to other formats
        image.load()
        return image.convert("RGB") if plain else to_rgb(image)


def decode(data: bytes, plain: bool = False) -> Image.Image:
    """Decode image bytes to RGB, with transparency on white; of an animation the first frame.

    Args:
        data: the encoded image.
        plain: convert as Pillow, open_clip and CLIP_benchmark do: drop transparency, and clip 16-bit channels instead
            of scaling them.

    Raises:
        UnreadableImage: not an image, cut off, or so large that it may be a decompression bomb.
    """
    return EncodedImage(data).rgb(plain=plain)


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert any mode to RGB: alpha on white, grey of more than 8 bits scaled to 8.

    Raises:
        UnreadableImage: 32 bits per pixel with a range of values of no known scale.
    """
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode == "F" or image.mode.startswith("I"):
        # Pillow clips such values at 255: most become white, floats from 0 to 1 black
        return Image.fromarray(_eight_bits(np.asarray(image), image)).convert("RGB")
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        white = Image.new("RGBA", rgba.size, "white")
        return Image.alpha_composite(white, rgba).convert("RGB")
    return image.convert("RGB")


def _eight_bits(values: NDArray[np.generic], image: Image.Image) -> NDArray[np.uint8]:
    """Scale 16- or 32-bit grey to 8 bits; white follows from the mode, or else from the largest value."""
    low, high = float(values.min()), float(values.max())
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM")):
        white = 65535.0  # Pillow scales a PPM's own white to it
    else:
        white = next((white for white in WHITES[values.dtype.kind] if high <= OVERSHOOT * white), 0.0)
    if not (low >= -(OVERSHOOT - 1) * white and high <= OVERSHOOT * white):  # a NaN is neither
        raise UnreadableImage(f"32 bits a pixel, from {low:g} to {high:g}: no scale from black to white that is known")
    if white == 65535:
        grey = (values.astype(np.int64).clip(0, 65535) // 257).astype(np.uint8)
    else:
        grey = np.rint(values.astype(np.float64) * (255 / white)).clip(0, 255).astype(np.uint8)
    if isinstance(transparent := image.info.get("transparency"), int):
        grey[values == transparent] = 255
    return grey


def _jpeg_size(data: bytes) -> tuple[int, int] | None:
    """Return (width, height) of a JPEG in YCbCr; None for all that Pillow reads."""
    if simplejpeg is None or not data.startswith(b"\xff\xd8\xff"):
        return None
    try:
        height, width, colours, _ = simplejpeg.decode_jpeg_header(data)
    except ValueError:
        return None
    return (width, height) if colours == "YCbCr" else None


def _read(action: Callable[[], _Result]) -> _Result:
    """Call Pillow, and turn its errors into UnreadableImage."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # odd metadata does not matter here
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            return action()
    except UnidentifiedImageError:
        raise UnreadableImage("cannot identify image") from None
    except (Image.DecompressionBombWarning, Image.DecompressionBombError):
        raise _bomb() from None
    except (MemoryError, UnreadableImage):  # MemoryError is no fault of the image
        raise
    except Exception as error:  # decoders raise all kinds on damaged bytes
        raise UnreadableImage(f"cannot decode image: {' '.join(str(error).split()) or repr(error)}") from None


def _bomb() -> UnreadableImage:
    return UnreadableImage(f"over {MAX_PIXELS:,} pixels: it may be a decompression bomb")
