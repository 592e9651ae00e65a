"""What an icon's name says, and when it has no picture."""

import numpy as np
import pytest

from disttempnet.data.icons.draw import Icon, concept_of, digest_of, draw, encode
from disttempnet.data.images import decode


def icon(body: str, box: tuple[float, float, float, float] = (0, 0, 16, 16)) -> Icon:
    return Icon("x", "x", "", "", body, box)


@pytest.mark.parametrize(
    ("name", "concept", "style"),
    [
        ("arrow-right", "arrow right", ""),
        ("arrow-right-24-filled", "arrow right", "filled"),
        ("home-line-duotone", "home", "outline two-tone"),
        ("outline-home", "home", "outline"),
        ("twotone-home-fill", "home", "filled two-tone"),
        ("home-16px", "home", ""),
        ("home-regular", "home", ""),
        ("24", "24", ""),
        ("bold", "bold", ""),
        ("bold-bold", "bold", "bold"),
        ("--a--b--", "a b", ""),
        ("logo-x", "logo x", ""),
    ],
)
def test_names_are_read_from_their_ends(name: str, concept: str, style: str) -> None:
    assert concept_of(name) == (concept, style)


def test_a_square_by_hand() -> None:
    pixels = draw(icon('<path fill="currentColor" d="M4 4h8v8H4z"/>'))
    assert pixels is not None
    expected = np.full((48, 48, 3), 255, np.uint8)
    expected[12:36, 12:36] = 0x22
    assert np.array_equal(pixels, expected)
    assert np.array_equal(np.asarray(decode(encode(pixels))), expected)  # grey: lossless
    assert len(digest_of(pixels)) == 12


def test_a_wide_icon_keeps_its_shape() -> None:
    pixels = draw(icon('<path fill="currentColor" d="M0 0h32v16H0z"/>', (0, 0, 32, 16)))
    assert pixels is not None
    assert pixels.shape == (48, 48, 3)
    assert pixels[24].max() == 0x22
    assert pixels[:11].min() == 255
    assert pixels[37:].min() == 255


@pytest.mark.parametrize(
    "body", ["", '<path fill="#fff" d="M0 0h16v16H0z"/>', "<path fill=", '<path d="M0 0h16v16H0z"/>']
)
def test_nothing_to_see_is_no_picture(body: str) -> None:
    assert draw(icon(body)) is None  # empty, white, broken, or black all over
