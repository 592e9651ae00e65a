"""Decoding copes with every kind of image; transforms give uint8 squares and evaluate as open_clip does."""

import io
import pickle

import numpy as np
import pytest
import torch
from PIL import Image

from disttempnet.data import decode, embedded_shards, eval_transform, open_index, train_transform
from disttempnet.data.transforms import SmallRandAugment, UnreadableImage, to_rgb
from disttempnet.errors import UserError

from .conftest import png

NAMES = ("open_clip", "tempnet", "emoji")


def gradient(width: int = 60, height: int = 40) -> Image.Image:
    y, x = np.mgrid[:height, :width]
    pixels = np.stack([x * 255 // width, y * 255 // height, (x + y) % 256], axis=-1)
    return Image.fromarray(pixels.astype(np.uint8))


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


@pytest.mark.parametrize("size", [(64, 64), (100, 40), (40, 100), (5, 300), (1, 1), (48, 48)])
@pytest.mark.parametrize("name", NAMES)
def test_training_transforms_give_uint8_squares(name: str, size: tuple[int, int]) -> None:
    pixels = train_transform(name, 48)(gradient(*size))
    assert (pixels.shape, pixels.dtype) == ((3, 48, 48), torch.uint8)


@pytest.mark.parametrize("name", NAMES)
def test_transforms_follow_torch_seed_vary_and_pickle(name: str) -> None:
    transform, image = train_transform(name, 32), gradient(50, 48)
    views = []
    for seed in (0, 0, 1, 2, 3):
        torch.manual_seed(seed)
        views.append(pickle.loads(pickle.dumps(transform))(image))
    assert torch.equal(views[0], views[1])
    assert len({view.numpy().tobytes() for view in views}) >= 3


def test_an_emoji_is_never_mirrored_but_a_photo_is() -> None:
    """Bright on the left, dark on the right: a flip turns the order round."""
    image = Image.fromarray(np.repeat(np.linspace(200, 50, 64, dtype=np.uint8)[None, :, None], 64, 0).repeat(3, 2))

    def flips(name: str) -> int:
        views = [train_transform(name, 32)(image).float() for _ in range(60)]
        return sum(bool(view[:, :, :8].mean() < view[:, :, -8:].mean()) for view in views)

    torch.manual_seed(0)
    assert flips("emoji") == flips("open_clip") == 0
    assert 10 < flips("tempnet") < 50


@pytest.mark.parametrize("operation", SmallRandAugment.OPERATIONS)
@pytest.mark.parametrize("sign", [-1.0, 1.0])
def test_every_operation_does_what_its_name_says(operation: str, sign: float) -> None:
    noise = np.random.default_rng(0).integers(40, 160, (64, 64, 3), dtype=np.uint8)
    image = Image.fromarray(noise)
    changed = SmallRandAugment()._operate(image, operation, sign)
    assert (changed.size, changed.mode) == (image.size, "RGB")
    assert (changed.tobytes() == image.tobytes()) == (operation == "identity")
    if operation == "translate_x":  # by 2 pixels of 64; what comes into view is grey
        before, after = np.asarray(image), np.asarray(changed)
        kept = (after[:, :-2], before[:, 2:]) if sign > 0 else (after[:, 2:], before[:, :-2])
        assert np.array_equal(*kept)
        assert (after[:, -1 if sign > 0 else 0] == 128).all()
    if operation == "brightness":
        assert np.asarray(changed).mean() > 1.3 * np.asarray(image).mean()


def test_unknown_transforms_are_named() -> None:
    with pytest.raises(UserError, match=r"unknown transform 'openclip'. Did you mean 'open_clip'"):
        train_transform("openclip", 48)


@pytest.mark.parametrize("size", [(64, 64), (100, 40), (41, 97), (20, 30)])
def test_evaluation_sees_what_open_clip_sees(size: tuple[int, int]) -> None:
    import open_clip

    theirs = open_clip.image_transform(48, is_train=False, mean=(0.0,) * 3, std=(1.0,) * 3)(gradient(*size))
    ours = eval_transform(48)(gradient(*size))
    assert ours.dtype == torch.uint8
    assert torch.equal(ours, (theirs * 255).round().to(torch.uint8))


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
        (b"not an image" * 50, "cannot identify image"),
        (encoded(gradient(), "PNG")[:-40], "cannot decode image: .*truncated"),
        (encoded(gradient(), "JPEG")[:-300], "cannot decode image: .*[Tt]runcated"),
        (encoded(gradient(), "WEBP")[:-40], "cannot"),
    ],
    ids=["empty", "text", "png", "jpeg", "webp"],
)
def test_damaged_images_give_one_clear_reason(data: bytes, reason: str) -> None:
    with pytest.raises(UnreadableImage, match=reason) as caught:
        decode(data)
    assert "\n" not in str(caught.value)
    assert "0x" not in str(caught.value)


@pytest.mark.parametrize("limit", [40, 60])
def test_decompression_bombs_are_refused(monkeypatch: pytest.MonkeyPatch, limit: int) -> None:
    """PIL warns above its limit and raises above twice the limit: here 100 pixels are either."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
    with pytest.raises(UnreadableImage, match=r"cannot decode image: .*decompression bomb"):
        decode(png(1, size=(10, 10)))


def test_shipped_images_decode() -> None:
    index = open_index(str(embedded_shards("emoji/val_concepts")), progress=False)
    sizes = {decode(index.image_bytes(sample)).size for sample in range(len(index))}
    assert sizes == {(64, 64)}
