"""Transforms give uint8 squares by seed alone, close to Pillow's own resizing, and evaluate as open_clip does."""

import pickle
from random import Random

import numpy as np
import pytest
import torch
from PIL import Image

from disttempnet.data import eval_transform, train_transform
from disttempnet.data.augment import CropTransform, SmallRandAugment, random_box, resized_crop
from disttempnet.data.images import EncodedImage
from disttempnet.errors import UserError
from tests.data.pictures import encoded, gradient, photo

NAMES = ("open_clip", "tempnet", "emoji")


@pytest.mark.parametrize("size", [(64, 64), (100, 40), (40, 100), (5, 300), (1, 2), (48, 48)])
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_training_transforms_give_uint8_squares(name: str, size: tuple[int, int], kind: str) -> None:
    pixels = train_transform(name, 48)(encoded(gradient(*size), kind), 7)
    assert (pixels.shape, pixels.dtype) == ((3, 48, 48), torch.uint8)


@pytest.mark.parametrize("name", NAMES)
def test_the_seed_alone_decides_and_transforms_pickle(name: str) -> None:
    transform, data = train_transform(name, 32), encoded(gradient(50, 48), "JPEG")
    views = []
    for seed in (0, 0, 1, 2, 3):
        torch.rand(1)
        views.append(pickle.loads(pickle.dumps(transform))(data, seed))
    assert torch.equal(views[0], views[1])
    assert len({view.numpy().tobytes() for view in views}) >= 3


def test_an_emoji_is_never_mirrored_but_a_photo_is() -> None:
    """Bright on the left, dark on the right: a flip turns the order round."""
    image = Image.fromarray(np.repeat(np.linspace(200, 50, 64, dtype=np.uint8)[None, :, None], 64, 0).repeat(3, 2))
    data = encoded(image, "PNG")

    def flips(name: str) -> int:
        views = [train_transform(name, 32)(data, seed).float() for seed in range(60)]
        return sum(bool(view[:, :, :8].mean() < view[:, :, -8:].mean()) for view in views)

    assert flips("emoji") == flips("open_clip") == 0
    assert 10 < flips("tempnet") < 50


def test_crops_are_distributed_as_torchvisions() -> None:
    """Means and spreads of area, shape and place over 3,000 draws, within five standard errors."""
    from torchvision.transforms import v2

    n, (width, height) = 3000, (500, 375)
    boxes = np.array([random_box(width, height, 0.5, Random(seed)) for seed in range(n)])
    assert (boxes[:, :2] >= 0).all()
    assert (boxes[:, 2:] <= (width, height)).all()
    torch.manual_seed(0)
    theirs = v2.RandomResizedCrop(224, scale=(0.5, 1.0))
    image = Image.new("1", (width, height))
    drawn = [theirs.make_params([image]) for _ in range(n)]
    reference = np.array([(d["left"], d["top"], d["left"] + d["width"], d["top"] + d["height"]) for d in drawn])

    def facts(box: np.ndarray) -> np.ndarray:
        w, h = box[:, 2] - box[:, 0], box[:, 3] - box[:, 1]
        return np.stack([w * h / (width * height), np.log(w / h), box[:, 0] / width, box[:, 1] / height])

    ours, other = facts(boxes), facts(reference)
    for moment in (lambda x: x, lambda x: (x - other.mean(1, keepdims=True)) ** 2):
        a, b = moment(ours), moment(other)
        error = np.sqrt(a.var(1) / n + b.var(1) / n)
        assert (np.abs(a.mean(1) - b.mean(1)) < 5 * error).all()


@pytest.mark.parametrize(("size", "box"), [((500, 375), (20, 10, 470, 370)), ((150, 120), (5, 5, 140, 110))])
def test_resizing_is_pillows_bicubic_to_one_level(size: tuple[int, int], box: tuple[int, int, int, int]) -> None:
    image = photo(*size)
    ours = resized_crop(np.array(image), size, box, 224).permute(1, 2, 0).numpy().astype(int)
    theirs = np.asarray(image.crop(box).resize((224, 224), Image.Resampling.BICUBIC)).astype(int)
    difference = np.abs(ours - theirs)
    assert difference.max() <= 1
    assert difference.mean() < 0.02


def test_draft_decodes_less_and_shows_the_same() -> None:
    data, box = encoded(photo(1000, 750), "JPEG", quality=90), (90, 60, 910, 700)
    views = []
    for draft, height in ((False, 750), (True, 375)):
        transform = CropTransform(224, 0.9, False, draft)
        pixels = transform._decoded(EncodedImage(data), box)
        assert pixels.shape[0] == height
        views.append(resized_crop(pixels, (1000, 750), box, 224).float())
    difference = (views[0] - views[1]).abs()
    assert 0 < difference.mean() < 1.5
    assert CropTransform(321, 0.9, False, True)._decoded(EncodedImage(data), box).shape[0] == 750, "2 × 321 > 640"
    assert CropTransform(80, 0.9, False, True)._decoded(EncodedImage(data), box).shape[0] == 94, "8 × 80 = 640"


def test_draft_is_of_no_use_to_other_formats_and_changes_nothing_there() -> None:
    data = encoded(photo(1000, 750), "PNG")
    views = [train_transform("open_clip", 224, draft)(data, 3) for draft in (False, True)]
    assert torch.equal(*views)
    with pytest.raises(UserError, match=r"data\.draft has no effect with data\.transform = 'emoji'"):
        train_transform("emoji", 224, draft=True)


def test_augmentation_applies_half_of_two_operations() -> None:
    pixels, augment = torch.from_numpy(np.array(photo(64, 64))).permute(2, 0, 1), SmallRandAugment()
    same = sum(torch.equal(augment(pixels, Random(seed)), pixels) for seed in range(300))
    assert 0.2 < same / 300 < 0.4, "both left out or the identity: 0.55² = 0.30"


@pytest.mark.parametrize("operation", SmallRandAugment.OPERATIONS[1:])
@pytest.mark.parametrize("sign", [-1.0, 1.0])
def test_every_operation_does_what_its_name_says(operation: str, sign: float) -> None:
    noise = np.random.default_rng(0).integers(40, 160, (64, 64, 3), dtype=np.uint8)
    image = Image.fromarray(noise)
    changed = SmallRandAugment()._operate(image, operation, sign)
    assert (changed.size, changed.mode) == (image.size, "RGB")
    assert changed.tobytes() != image.tobytes()
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
