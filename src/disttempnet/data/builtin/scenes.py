"""A synthetic long-tailed data set with known head and tail: small pictures of coloured shapes, with captions.

A concept is a colour, a pattern and a shape: one of 200 combinations. The k-th most frequent one has a share of
training samples ∝ 1/k (Zipf), and the validation and test splits show every concept equally often. Concepts are made of
the same few parts, so that what the head teaches about a part is of use in the tail. What is not the concept
varies: place, size, rotation, shade, background, noise, and often a smaller second thing, rare or common like the
first. Rare parts look like common ones (maroon like red, a ring like a circle).

A caption may leave parts of the concept out ("a striped red shape"), so captions differ in how many concepts
they fit. Splits are made on first use, in the cache folder.

The bytes depend on SCENES_SEED, this file, NumPy (random streams, arithmetic) and Pillow (resizing, PNG). The name of
the cache folder has all four, versions as major.minor. A patch release, another build or another processor may
give other bytes under the same name.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import product
from math import cos, pi, prod, sin
from pathlib import Path
from typing import NamedTuple

import numpy as np
import PIL
from PIL import Image

from disttempnet.data.builtin.cache import cached_shards, write_shard
from disttempnet.errors import UserError, unknown_name

SCENES_SEED = 2024
TRAIN_SAMPLES = 6000
VAL_PER_CONCEPT = 6
TEST_PER_CONCEPT = 20  # enough images to tell a difference of a point of top-1
SHARD_SAMPLES = 1000
SCATTER = 0.5  # 0: a concept is as rare as its parts; large: rarity says nothing about the parts
IMAGE_SIDE = 48  # pixels
FINE = 2 * IMAGE_SIDE  # drawn at this size: shapes get soft edges

Array = np.ndarray
Words = dict[str, tuple[str, ...]]

# words for each value of a part, common values first; the first word stands in the concept's name
COLOUR_WORDS: Words = {
    "red": ("red", "crimson"),
    "blue": ("blue", "azure"),
    "yellow": ("yellow", "golden"),
    "green": ("green",),
    "purple": ("purple", "violet"),
    "orange": ("orange",),
    "maroon": ("maroon", "wine"),
    "turquoise": ("turquoise", "teal"),
    "lime": ("lime",),
    "pink": ("pink", "rosy"),
}
PATTERN_WORDS: Words = {
    "plain": ("plain", "solid"),
    "striped": ("striped", "stripy"),
    "dotted": ("dotted", "spotted"),
    "checked": ("checked", "chequered"),
}
SHAPE_WORDS: Words = {
    "circle": ("circle", "disc"),
    "triangle": ("triangle",),
    "cross": ("cross", "plus"),
    "bar": ("bar", "beam"),
    "ring": ("ring", "hoop"),
}
CONCEPT_PARTS = {"colour": COLOUR_WORDS, "pattern": PATTERN_WORDS, "shape": SHAPE_WORDS}
CONCEPTS = prod(len(values) for values in CONCEPT_PARTS.values())
SIZE_WORDS = {"small": ("small", "little"), "large": ("large", "big")}
RELATIONS = {  # where the thing is, seen from the other one
    "left": ("left of", "beside"),
    "right": ("right of", "beside"),
    "above": ("above", "over"),
    "below": ("below", "under"),
}
ANY_SHAPE = ("shape", "thing", "figure")
FRAMES = ("", "", "a picture of ", "an image of ", "this is ", "here is ")

COLOUR_RGB = {
    "red": (215, 40, 40),
    "blue": (50, 90, 210),
    "yellow": (240, 215, 50),
    "green": (50, 160, 70),
    "purple": (130, 60, 170),
    "orange": (245, 140, 30),
    "maroon": (150, 30, 50),
    "turquoise": (40, 150, 190),
    "lime": (140, 205, 50),
    "pink": (240, 120, 150),
}
BACKGROUND_RGB = {"white": (245, 245, 245), "grey": (150, 150, 150), "black": (30, 30, 30), "beige": (225, 205, 165)}


class Thing(NamedTuple):
    """Coloured, patterned shape: a concept, or the second object beside it."""

    colour: str
    pattern: str
    shape: str

    @property
    def name(self) -> str:
        return f"{self.pattern} {self.colour} {self.shape}"


@dataclass(frozen=True)
class Scene:
    """Contents of a picture; without a second object there is no relation either."""

    thing: Thing
    size: str
    background: str
    relation: str | None
    other: Thing | None


def generated_shards(name: str) -> Path:
    """Return the folder with the .tar shards of a generated split; on first use, make it in the cache folder.

    A sample is KEY.png, KEY.txt (the caption) and KEY.json: caption, `label` (the concept's name), `concept` (its
    rank by frequency, 0 = most frequent), `frequency` (its training samples), `ambiguity` (how many of the concepts
    have every part that the caption names: 1 = it tells the concept), the parts of the concept, and the scene.

    Args:
        name: `scenes/train`, `scenes/val` or `scenes/test`.

    Raises:
        UserError: unknown name, a cache folder that cannot be written, or a cached shard that is gone.
    """
    known = {
        "scenes/train": zipf_counts(),
        "scenes/val": [VAL_PER_CONCEPT] * CONCEPTS,
        "scenes/test": [TEST_PER_CONCEPT] * CONCEPTS,
    }
    if name not in known:
        raise UserError(unknown_name("generated data set", name, known))
    counts, split = known[name], name.removeprefix("scenes/")
    shards = [f"{number:05d}.tar" for number in range(-(-sum(counts) // SHARD_SAMPLES))]
    source = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()[:16]  # another generator, another folder
    libraries = (("numpy", np.__version__), ("pillow", PIL.__version__))
    made_with = "-".join(f"{library}-{'.'.join(version.split('.')[:2])}" for library, version in libraries)
    dataset = f"scenes-{SCENES_SEED}-{source}-{made_with}"
    return cached_shards(dataset, split, shards, partial(_write_split, split, counts, shards))


def zipf_counts() -> list[int]:
    """Return the training samples of each concept, ∝ 1/rank, TRAIN_SAMPLES in all, by largest remainder."""
    weights = 1 / np.arange(1, CONCEPTS + 1)
    shares = TRAIN_SAMPLES * weights / weights.sum()
    counts = np.floor(shares).astype(int)
    short = np.argsort(counts - shares, kind="stable")[: TRAIN_SAMPLES - counts.sum()]
    counts[short] += 1
    return counts.tolist()


def concepts() -> list[Thing]:
    """Return all combinations of parts, most frequent first: common parts first, with some scatter."""
    every = [Thing(*parts) for parts in product(*CONCEPT_PARTS.values())]
    places = np.indices([len(values) for values in CONCEPT_PARTS.values()]).reshape(len(CONCEPT_PARTS), -1)
    rarity = np.log1p(places).sum(0) + SCATTER * np.random.default_rng(SCENES_SEED).normal(size=len(every))
    return [every[i] for i in np.argsort(rarity, kind="stable")]


def _write_split(split: str, counts: list[int], shards: list[str], folder: Path) -> None:
    rng = np.random.default_rng([SCENES_SEED, *split.encode()])
    ranks = rng.permutation(np.repeat(np.arange(CONCEPTS), counts)).tolist()
    for number, shard in enumerate(shards):
        first = number * SHARD_SAMPLES
        write_shard(folder / shard, _members(rng, first, ranks[first : first + SHARD_SAMPLES]))


def _members(rng: np.random.Generator, first: int, ranks: list[int]) -> Iterator[tuple[str, bytes]]:
    every, frequency = concepts(), zipf_counts()
    chances = np.array(frequency) / TRAIN_SAMPLES
    for key, rank in enumerate(ranks, first):
        scene = _scene(rng, every[rank], every[rng.choice(CONCEPTS, p=chances)])
        caption, named = _caption(rng, scene)
        facts = {
            "caption": caption,
            "label": scene.thing.name,
            "concept": rank,
            "frequency": frequency[rank],
            "ambiguity": prod(len(values) for part, values in CONCEPT_PARTS.items() if part not in named),
            **scene.thing._asdict(),
            "size": scene.size,
            "background": scene.background,
            "relation": scene.relation,
            "other": scene.other.name if scene.other else None,
        }
        image = io.BytesIO()
        Image.fromarray(_draw(rng, scene)).save(image, "PNG", compress_level=1)
        yield f"{key:09d}.png", image.getvalue()
        yield f"{key:09d}.txt", caption.encode()
        yield f"{key:09d}.json", json.dumps(facts).encode()


def _one_of(rng: np.random.Generator, options: Iterable[str]) -> str:
    known = tuple(options)
    return known[rng.integers(len(known))]


def _scene(rng: np.random.Generator, thing: Thing, other: Thing) -> Scene:
    size, background = _one_of(rng, SIZE_WORDS), _one_of(rng, BACKGROUND_RGB)
    if rng.random() < 0.6:
        return Scene(thing, size, background, None, None)
    return Scene(thing, size, background, _one_of(rng, RELATIONS), other)


def _caption(rng: np.random.Generator, scene: Scene) -> tuple[str, list[str]]:
    """Return a true sentence about the scene, and the parts of the concept that it names, at least one."""
    odds = {"colour": 0.85, "pattern": 0.75, "shape": 0.9}
    named: list[str] = []
    while not named:
        named = [part for part, share in odds.items() if rng.random() < share]
    words = []
    if rng.random() < 0.25:
        words.append(_one_of(rng, SIZE_WORDS[scene.size]))
    if "pattern" in named:
        words.append(_one_of(rng, PATTERN_WORDS[scene.thing.pattern]))
    if "colour" in named:
        words.append(_one_of(rng, COLOUR_WORDS[scene.thing.colour]))
    words.append(_one_of(rng, SHAPE_WORDS[scene.thing.shape] if "shape" in named else ANY_SHAPE))
    sentence = _one_of(rng, FRAMES) + _with_article(" ".join(words))
    if scene.other and scene.relation and rng.random() < 0.6:
        colour, shape = _one_of(rng, COLOUR_WORDS[scene.other.colour]), _one_of(rng, SHAPE_WORDS[scene.other.shape])
        sentence += f" {_one_of(rng, RELATIONS[scene.relation])} {_with_article(f'{colour} {shape}')}"
    elif rng.random() < 0.3:
        sentence += f" on {scene.background}"
    return sentence, named


def _with_article(words: str) -> str:
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def _draw(rng: np.random.Generator, scene: Scene) -> Array:
    """Draw the scene as uint8 [IMAGE_SIDE, IMAGE_SIDE, 3]; coordinates run from −1 to 1, y downwards."""
    blotches = Image.fromarray(rng.integers(0, 256, (6, 6), dtype=np.uint8)).resize((FINE, FINE))
    shade = (np.asarray(blotches, np.float32) - 128) * 0.2
    canvas = shade[..., None] + (BACKGROUND_RGB[scene.background] + rng.uniform(-12, 12, 3)).astype(np.float32)
    place, radius = rng.uniform(-0.15, 0.15, 2), rng.uniform(*((0.5, 0.6) if scene.size == "small" else (0.68, 0.8)))
    if scene.other:
        axis, sign = {"left": (0, -1), "right": (0, 1), "above": (1, -1), "below": (1, 1)}[str(scene.relation)]
        place[axis] = sign * rng.uniform(0.15, 0.3)
        opposite = rng.uniform(-0.5, 0.5, 2)
        opposite[axis] = -sign * rng.uniform(0.6, 0.7)
        _paint(rng, canvas, scene.other, opposite, rng.uniform(0.24, 0.3))
    _paint(rng, canvas, scene.thing, place, radius)
    smooth = (canvas[::2, ::2] + canvas[::2, 1::2] + canvas[1::2, ::2] + canvas[1::2, 1::2]) / 4
    pixels = smooth + rng.integers(-10, 11, (IMAGE_SIDE, IMAGE_SIDE, 3))
    return pixels.clip(0, 255).astype(np.uint8)


def _paint(rng: np.random.Generator, canvas: Array, thing: Thing, place: Array, radius: float) -> None:
    """Paint an object on the canvas [FINE, FINE, 3], rotated by up to 15°."""
    angle = rng.uniform(-15, 15) * pi / 180
    grid = (np.arange(FINE, dtype=np.float32) + 0.5) * (2 / FINE) - 1
    x, y = ((grid - float(centre)) / radius for centre in place)
    x, y = x[None, :], y[:, None]
    u, v = cos(angle) * x + sin(angle) * y, cos(angle) * y - sin(angle) * x
    colour = np.array(COLOUR_RGB[thing.colour]) + rng.uniform(-22, 22, 3)
    inside = SHAPE_MASKS[thing.shape](u, v)
    light = inside & PATTERN_MASKS[thing.pattern](u, v)
    canvas[inside] = colour
    canvas[light] = 0.25 * colour + 0.75 * 250


# points inside a shape of radius 1
SHAPE_MASKS: dict[str, Callable[[Array, Array], Array]] = {
    "circle": lambda u, v: u**2 + v**2 < 0.85,
    "bar": lambda u, v: (abs(u) < 1) & (abs(v) < 0.4),
    "triangle": lambda u, v: (v < 0.7) & (1.8 * abs(u) < v + 0.95),
    "cross": lambda u, v: (np.minimum(abs(u), abs(v)) < 0.3) & (np.maximum(abs(u), abs(v)) < 0.95),
    "ring": lambda u, v: abs(u**2 + v**2 - 0.65) < 0.3,
}
# points where a pattern is light
PATTERN_MASKS: dict[str, Callable[[Array, Array], Array]] = {
    "plain": lambda u, v: np.zeros_like(u, dtype=bool),
    "striped": lambda u, v: (v + 0.2) % 0.8 < 0.4,
    "dotted": lambda u, v: (u % 0.6 - 0.3) ** 2 + (v % 0.6 - 0.3) ** 2 < 0.03,
    "checked": lambda u, v: (u % 0.9 < 0.45) == (v % 0.9 < 0.45),
}
