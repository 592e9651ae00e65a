"""Decoding copes with every kind of image, refuses what is none, and needs no simplejpeg for the same pixels."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, ImageCms

from disttempnet.data import decode, embedded_shards, open_index
from disttempnet.data import images as decoding
from disttempnet.data.images import EncodedImage, UnreadableImage, to_rgb
from tests.data.conftest import png
from tests.data.pictures import encoded, gradient, photo

BOMB = png(0)[:16] + struct.pack(">II", 20_000, 20_000) + png(0)[24:29]
BOMB += struct.pack(">I", zlib.crc32(BOMB[12:29])) + png(0)[33:]  # a header of 20,000×20,000, and few bytes


@pytest.fixture(params=["simplejpeg", "Pillow"])
def decoder(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """With the fast decoder, and as where it is not installed."""
    if request.param == "Pillow":
        monkeypatch.setattr(decoding, "simplejpeg", None)
    else:
        assert decoding.simplejpeg is not None, "the dev extra installs it"
    return request.param


@pytest.mark.parametrize("size", [(500, 375), (333, 251), (17, 9)])
@pytest.mark.parametrize("progressive", [False, True])
@pytest.mark.parametrize("subsampling", ["4:4:4", "4:2:2", "4:2:0"])
def test_the_fast_decoder_gives_pillows_pixels(
    size: tuple[int, int], progressive: bool, subsampling: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = encoded(photo(*size), "JPEG", quality=90, progressive=progressive, subsampling=subsampling)
    for scale in (1, 2, 4, 8):
        image = EncodedImage(data)
        assert image._image is None, "Pillow has not been asked"
        fast = image.pixels(scale)
        assert fast.shape == (-(-size[1] // scale), -(-size[0] // scale), 3)
        with monkeypatch.context() as patch:
            patch.setattr(decoding, "simplejpeg", None)
            assert np.array_equal(fast, EncodedImage(data).pixels(scale))
    reference = Image.open(io.BytesIO(data))
    reference.draft(None, (1, 1))  # the smallest that libjpeg makes
    assert np.array_equal(np.asarray(reference), EncodedImage(data).pixels(8))


def test_pixels_may_be_written_to(decoder: str) -> None:
    for kind in ("JPEG", "PNG"):
        assert EncodedImage(encoded(gradient(), kind)).pixels().flags.writeable


def test_cut_jpegs_are_refused_not_half_grey(decoder: str) -> None:
    data = encoded(photo(200, 150), "JPEG", quality=90)
    for end in (len(data) // 2, len(data) - 300, 700):
        with pytest.raises(UnreadableImage, match=r"cannot (decode|identify) image"):
            EncodedImage(data[:end]).pixels()


def test_a_jpeg_with_bytes_after_its_end_is_read(decoder: str) -> None:
    data = encoded(gradient(), "JPEG")
    assert np.array_equal(EncodedImage(data + b"trailing bytes").pixels(), EncodedImage(data).pixels())


@pytest.mark.parametrize("orientation", [6, 8, 3])
def test_orientation_is_ignored_and_broken_exif_does_not_matter(decoder: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    plain = np.asarray(decode(encoded(gradient(), "JPEG")))
    broken = b"Exif\0\0II*\0\x08\0\0\0\xff\xff" + bytes(range(200))
    for block in (exif.tobytes(), broken, b"Exif\0\0"):
        data = encoded(gradient(), "JPEG", exif=block)
        assert b"Exif" in data
        assert np.array_equal(EncodedImage(data).pixels(), plain)


@pytest.mark.parametrize("kind", ["WEBP", "GIF", "PNG"])
def test_of_an_animation_the_first_frame_counts(kind: str) -> None:
    frames = [Image.new("RGB", (20, 10), colour) for colour in ("red", "blue", "lime")]
    options = {"lossless": True} if kind == "WEBP" else {}
    data = encoded(frames[0], kind, save_all=True, append_images=frames[1:], duration=50, **options)
    assert Image.open(io.BytesIO(data)).n_frames == 3
    image = decode(data)
    assert (image.size, image.getpixel((5, 5))) == ((20, 10), (255, 0, 0))


def test_deep_colours_and_grey_with_alpha() -> None:
    raw = b"".join(b"\0" + struct.pack(">3H", 0, 0x8080, 0xFFFF) * 4 for _ in range(4))  # 16 bits a channel

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 4, 4, 16, 2, 0, 0, 0))
    deep = b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(raw)) + chunk(b"IEND", b"")
    assert decode(deep).getpixel((1, 1)) == (0, 128, 255)
    grey = decode(encoded(Image.new("LA", (4, 4), (0, 51)), "PNG"))
    assert grey.getpixel((2, 2)) == (204, 204, 204)


def test_formats_that_start_programs_are_refused() -> None:
    data = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 20 20\n%%EndComments\nshowpage\n%%EOF\n"
    assert Image.open(io.BytesIO(data)).format == "EPS"
    with pytest.raises(UnreadableImage, match="cannot identify image"):
        decode(data)


def test_a_placeholder_of_one_pixel_is_no_image(decoder: str) -> None:
    for kind in ("GIF", "PNG", "JPEG"):
        with pytest.raises(UnreadableImage, match="one pixel: a placeholder"):
            decode(encoded(Image.new("RGB", (1, 1)), kind))


def test_decompression_bombs_are_refused_unread(decoder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UnreadableImage, match=r"over 89,478,485 pixels: it may be a decompression bomb"):
        decode(BOMB)
    large = bytearray(encoded(gradient(), "JPEG"))
    at = large.index(b"\xff\xc0") + 5  # height and width of the frame
    large[at : at + 4] = struct.pack(">HH", 20_000, 20_000)
    with pytest.raises(UnreadableImage, match="decompression bomb"):
        EncodedImage(bytes(large))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)  # as other libraries set it
    with pytest.raises(UnreadableImage, match="decompression bomb"):
        decode(BOMB)


def test_alpha_is_laid_on_white() -> None:
    rgba = Image.new("RGBA", (4, 4), (255, 0, 0, 0))
    rgba.putpixel((0, 0), (255, 0, 0, 255))
    rgba.putpixel((1, 0), (0, 0, 0, 51))
    palette = Image.new("P", (4, 4), 1)
    palette.putpalette([10, 20, 30, 255, 0, 0])
    for image, pixels in (
        (rgba, {(0, 0): (255, 0, 0), (1, 0): (204, 204, 204), (3, 3): (255, 255, 255)}),
        (Image.new("LA", (4, 4), (0, 0)), {(2, 2): (255, 255, 255)}),
        (decode(encoded(palette, "PNG", transparency=1)), {(2, 2): (255, 255, 255)}),
        (decode(encoded(palette, "PNG", transparency=b"\xff\x00")), {(2, 2): (255, 255, 255)}),
        (decode(encoded(palette, "PNG")), {(2, 2): (255, 0, 0)}),
        (decode(encoded(Image.new("RGB", (4, 4), (1, 2, 3)), "PNG", transparency=(1, 2, 3))), {(0, 0): (255,) * 3}),
        (decode(encoded(rgba, "WEBP", lossless=True)), {(0, 0): (255, 0, 0), (3, 3): (255, 255, 255)}),
    ):
        rgb = to_rgb(image)
        assert rgb.mode == "RGB"
        for place, colour in pixels.items():
            assert rgb.getpixel(place) == colour


@pytest.mark.parametrize("mode", ["1", "L", "P", "LA", "PA", "RGB", "RGBA", "CMYK", "YCbCr", "HSV", "LAB", "I", "F"])
def test_every_mode_becomes_rgb(mode: str) -> None:
    image = gradient().convert("L").convert(mode) if mode in ("I", "F") else Image.new(mode, (8, 8))
    assert to_rgb(image).mode == "RGB"


def test_inks_and_deep_greys_keep_their_brightness() -> None:
    cyan = decode(encoded(Image.new("CMYK", (16, 16), (255, 0, 0, 0)), "JPEG", quality=95))
    red, green, blue = cyan.getpixel((8, 8))
    assert red < 10
    assert min(green, blue) > 245
    deep = Image.fromarray(np.array([[0, 257, 32896, 65535]], dtype=np.uint16))
    assert deep.mode == "I;16"
    for image in (decode(encoded(deep, "PNG")), to_rgb(deep.convert("I"))):
        assert [image.getpixel((x, 0)) for x in range(4)] == [(n, n, n) for n in (0, 1, 128, 255)]


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "cannot identify image"),
        (b"<!DOCTYPE html><html><body>404 Not Found</body></html>", "cannot identify image"),
        (b"not an image" * 50, "cannot identify image"),
        (encoded(gradient(), "PNG")[:-40], "cannot decode image: .*truncated"),
        (encoded(gradient(), "JPEG")[:-300], "cannot decode image: .*[Tt]runcated"),
        (encoded(gradient(), "WEBP")[:-40], "cannot"),
    ],
    ids=["empty", "html", "text", "png", "jpeg", "webp"],
)
def test_damaged_images_give_one_clear_reason(data: bytes, reason: str) -> None:
    with pytest.raises(UnreadableImage, match=reason) as caught:
        decode(data)
    assert "\n" not in str(caught.value)
    assert "0x" not in str(caught.value)


def test_shipped_images_decode() -> None:
    index = open_index(str(embedded_shards("emoji/val_concepts")), progress=False)
    sizes = {decode(index.image_bytes(sample)).size for sample in range(len(index))}
    assert sizes == {(64, 64)}


RAMP = np.linspace(0, 1, 6)[None].repeat(2, axis=0)  # from black to white
EIGHT = [0, 51, 102, 153, 204, 255]


def of_values(values: np.ndarray, kind: str = "TIFF", **options: object) -> bytes:
    return encoded(Image.fromarray(values), kind, **options)


@pytest.mark.parametrize(
    "data",
    [
        of_values(RAMP.astype(np.float32)),
        of_values((RAMP * 1.01 - 0.005).astype(np.float32)),
        of_values((RAMP * 255).astype(np.float32)),
        of_values(np.rint(RAMP * 255).astype(np.int32)),
        of_values(np.rint(RAMP * 65535).astype(np.int32)),
        of_values(np.rint(RAMP * 65535).astype(np.uint16)),
        of_values(np.rint(RAMP * 65535).astype(np.uint16), "PNG"),
        b"P5 6 2 65535\n" + np.rint(RAMP * 65535).astype(">u2").tobytes(),
        b"P5 6 2 1000\n" + np.rint(RAMP * 1000).astype(">u2").tobytes(),
        b"Pf\n6 2\n-1.0\n" + RAMP.astype("<f4").tobytes(),
    ],
    ids=[
        "float 1",
        "float, resized",
        "float 255",
        "int 255",
        "int 65535",
        "TIFF 16",
        "PNG 16",
        "PGM 16",
        "PGM 1000",
        "PFM",
    ],
)
def test_grey_of_many_bits_keeps_its_scale(data: bytes) -> None:
    """By Pillow's own conversion a float from 0 to 1 is black, and most of 16 bits is white."""
    pixels = np.asarray(decode(data))[0].astype(int)
    assert np.abs(pixels - np.array(EIGHT)[:, None]).max() <= 1
    assert pixels[[0, -1]].tolist() == [[0] * 3, [255] * 3]


@pytest.mark.parametrize(
    ("values", "found"),
    [
        (RAMP.astype(np.float32) * 2 - 1, "from -1 to 1"),
        (RAMP.astype(np.float32) * 1000, "from 0 to 1000"),
        (np.full((2, 2), np.nan, np.float32), "from nan to nan"),
        (np.full((2, 2), np.inf, np.float32), "from inf to inf"),
        (np.rint(RAMP * 1e9).astype(np.int32), r"from 0 to 1e\+09"),
        (np.array([[-5, 90]], np.int32), "from -5 to 90"),
    ],
)
def test_values_of_no_known_scale_are_no_picture(values: np.ndarray, found: str) -> None:
    with pytest.raises(UnreadableImage, match=f"^32 bits a pixel, {found}: no scale from black to white"):
        decode(of_values(values))


def test_dark_pictures_stay_dark() -> None:
    """What white is follows from the format where it says so, not from the values."""
    dark = np.array([[0, 257, 514]], np.uint16)
    assert np.asarray(decode(of_values(dark, "PNG")))[0, :, 0].tolist() == [0, 1, 2]
    assert np.asarray(decode(of_values(dark, "PNG", transparency=0)))[0, :, 0].tolist() == [255, 1, 2]
    assert not np.asarray(decode(of_values(np.zeros((2, 2), np.float32)))).any()


@pytest.mark.parametrize("mode", ["L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "LAB"])
def test_every_mode_keeps_its_colours(mode: str) -> None:
    grey = Image.fromarray(np.rint(RAMP * 255).astype(np.uint8)).convert("RGB")
    if mode == "LAB":
        profiles = [ImageCms.createProfile(name) for name in ("sRGB", "LAB")]
        image = ImageCms.profileToProfile(grey, *profiles, outputMode="LAB")
    else:
        image = grey.convert("L").convert("P") if mode == "P" else grey.convert(mode)
    found = np.asarray(decode(encoded(image, "TIFF")))[0].astype(int)
    assert np.abs(found - np.array(EIGHT)[:, None]).max() <= 1


@pytest.mark.parametrize("mode", ["LA", "RGBA", "P", "L", "RGB"])
def test_transparency_of_every_mode_is_laid_on_white(mode: str) -> None:
    clear = Image.new(mode, (4, 4), 0) if mode in ("P", "L") else Image.new(mode, (4, 4))
    options = {"P": {"transparency": bytes(256)}, "L": {"transparency": 0}, "RGB": {"transparency": (0, 0, 0)}}
    assert (np.asarray(decode(encoded(clear, "PNG", **options.get(mode, {})))) == 255).all()
