"""Format and size of an image from its first bytes."""

import pytest

from disttempnet.data.headers import image_header
from tests.data.pictures import noise_image


@pytest.mark.parametrize(
    ("data", "facts"),
    [
        (noise_image("JPEG", (300, 17)), ("jpg", (300, 17))),
        (noise_image("JPEG", (4000, 3), progressive=True, comment=b"x" * 300), ("jpg", (4000, 3))),
        (noise_image("PNG", (3, 700)), ("png", (3, 700))),
        (noise_image("WEBP", (130, 20)), ("webp", (130, 20))),
        (noise_image("WEBP", (130, 20), lossless=True), ("webp", (130, 20))),
        (noise_image("WEBP", (131, 20), exif=b"Exif\0\0" + b"x" * 20), ("webp", (131, 20))),
        (noise_image("JPEG", (30, 17), exif=b"Exif\0\0" + b"x" * 5000), ("jpg", None)),
        (noise_image("GIF", (5, 5)), ("other", None)),
        (b"<html>", ("other", None)),
        (b"\xff\xd8\xff", ("jpg", None)),
        (b"", ("other", None)),
    ],
)
def test_image_headers(data: bytes, facts: tuple) -> None:
    """Sizes as PIL wrote them, from the first 1536 bytes."""
    assert image_header(data[:1536]) == facts
