"""Format and size of an image from its first bytes, without decoding it."""

from __future__ import annotations

import struct

UNKNOWN_FORMAT = "other"  # another format than jpg, png, webp, or no image
IMAGE_FORMATS = ("jpg", "png", "webp", UNKNOWN_FORMAT)
_JPEG_SIZES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}  # SOF markers (ITU-T T.81, table B.1)


def image_header(data: bytes) -> tuple[str, tuple[int, int] | None]:
    """Read format and size from the first bytes of an image.

    Args:
        data: the first bytes; 1 kB includes the size of most images.

    Returns:
        (`jpg`, `png`, `webp` or `other`; (width, height) in pixels, or None if `data` is too short).
    """
    if data[:3] == b"\xff\xd8\xff":
        return "jpg", _jpeg_size(data)
    if data[:8] == b"\x89PNG\r\n\x1a\n":
        return "png", struct.unpack(">II", data[16:24]) if len(data) >= 24 else None
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "webp", _webp_size(data)
    return UNKNOWN_FORMAT, None


def _jpeg_size(data: bytes) -> tuple[int, int] | None:
    place = 2
    while place + 9 <= len(data) and data[place] == 0xFF:
        marker = data[place + 1]
        if marker in _JPEG_SIZES:
            height, width = struct.unpack(">HH", data[place + 5 : place + 9])
            return width, height
        # a marker may be padded with 0xFF bytes; every other segment before the size begins with its length
        place += 1 if marker == 0xFF else 2 + int.from_bytes(data[place + 2 : place + 4], "big")
    return None


def _webp_size(data: bytes) -> tuple[int, int] | None:
    """The three kinds of WebP (RFC 9649, sections 2.5 to 2.7)."""
    if len(data) < 30:
        return None
    if data[12:16] == b"VP8 ":
        width, height = struct.unpack("<HH", data[26:30])
        return width & 0x3FFF, height & 0x3FFF
    if data[12:16] == b"VP8L":
        bits = int.from_bytes(data[21:25], "little")
        return (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
    if data[12:16] == b"VP8X":
        return int.from_bytes(data[24:27], "little") + 1, int.from_bytes(data[27:30], "little") + 1
    return None
