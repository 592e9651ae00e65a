"""Malformed commands, configs and small files, drawn by a seed."""

from __future__ import annotations

import random
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel

from disttempnet.config import Config

RESUME = "train own.toml name=ok train.epochs=2 eval.tasks=['folder:classes']"
COMMANDS = [
    "train own.toml name=new train.epochs=1",
    "train own.toml name=new loss={name='isogclr'} data.train=shards",
    f"{RESUME} --resume auto",
    "train own.toml name=new model.pretrained=runs/ok",
    "train own.toml name=new data.train=table/list.json",
    "train own.toml name=new data.train=[{path='shards',weight=2.0},{path='table/list.csv'}]",
    "compare grid.toml --jobs 1 train.epochs=1",
    "compare grid.toml --list",
    "evaluate runs/ok --tasks folder:classes --out out.json --batch 8",
    "evaluate runs/ok --tasks captions:table/list.json --out out.json",
    "evaluate --list",
    "search runs/ok photos dog cat --top 3 --html page.html --workers 0",
    "classify runs/ok shards --classes dog,cat --out table.csv --html page.html --workers 0",
    "export scores.json --to openclip-csv --out row.csv",
    "report runs/ok runs/other --out report.html",
    "report runs/ok runs/other --out table.md --metrics folder:classes/acc1",
    "report runs/ok --out runs.jsonl",
    "temperature runs/ok --gallery page.html --frequency-by label --batch 8",
    "temperature runs/ok --shards shards --out table.csv --columns label",
    "temperature runs/ok --images photos --out table.parquet",
    "temperature runs/ok --captions captions.txt --out table.csv",
    "data index shards --workers 1",
    "data index table/list.csv",
    "data verify shards photos --workers 1 --out broken.jsonl --sample 10",
    "data preview shards --out sheet.png --count 4 --seed 1",
    "data preview table/list.parquet --out sheet.html --count 4",
    "data shard table/list.tsv --out made --resize 32 --workers 1",
    "data shard photos --out made --captions lines --workers 1",
    "data download cc3m --out made --dry-run",
    "data task cifar10 photos --out root",
    "launch own.toml --nodes 1 --gpus 2 --time 01:00:00 --dry-run",
    "launch own.toml --seeds 1 2 3 --nodes 1 --dry-run",
    "objectives sogclr clip",
]
NASTY = [
    "", " ", ".", "..", "~", "~nobody/x", "-", "--", "-1", "0", "nan", "inf", "-inf", "1e999", "1e30", "true",
    "None", "2024-05-01", str(2**70), "0x10", "[", "]", "{", "{}", "[]", "a=b=c", "=", "==", "a.b.c.d=1", "::",
    "a::", "::b", "*", "?", "{00000..99999999999}.tar", "{a,{b,c}}", "{3..1}", "pipe:cat x", "http://",
    "https://user:secret@host.invalid/x.tar", "s3://", "hf-hub:", "open_clip:", "open_clip:/", "embedded:",
    "generated:none", "folder:", "folder:nothing", "captions:", "shards:", "own.toml", "photos",
    "shards/00000.tar", "table/list.json", "runs/ok", "x" * 5000, "a\tb", "a\nb", "\x1b]52;c;aGk=\x07",
    "\ufeff", "\u202etxt.jpg", "é", "日本", "\udcff", "'", '"', "\\", "$HOME", "`id`", "%s%s%n", "../x",
    "runs/../runs/ok", "train.epochs=1", "--out", "--help=1",
]  # fmt: skip
TOUCHED = {
    "photos/000.jpg": ["data verify photos", "train own.toml", "data shard photos --out made"],
    "photos/003.txt": ["data index photos", "train own.toml"],
    "shards/00000.tar": ["data index shards", "data verify shards", "train own.toml data.train=shards"],
    "table/list.json": ["data index table/list.json", "evaluate runs/ok --tasks captions:table/list.json"],
    "table/list.jsonl": ["data index table/list.jsonl", "data shard table/list.jsonl --out made --workers 1"],
    "table/list.csv": ["data index table/list.csv", "train own.toml data.train=table/list.csv"],
    "table/list.tsv": ["data index table/list.tsv", "data preview table/list.tsv --out sheet.png"],
    "table/list.parquet": ["data index table/list.parquet", "train own.toml data.train=table/list.parquet"],
    "captions.txt": ["temperature runs/ok --captions captions.txt --out t.csv"],
    "classes/cat/000.jpg": ["evaluate runs/ok --tasks folder:classes --out o.json"],
    "own.toml": ["train own.toml", "launch own.toml --nodes 1 --dry-run"],
    "grid.toml": ["compare grid.toml --list", "compare grid.toml train.epochs=1"],
    "scores.json": ["export scores.json --to openclip-csv --out row.csv", "report scores.json --out t.md"],
    "runs/ok/config.toml": ["evaluate runs/ok --out o.json", "report runs/ok", f"{RESUME} --resume auto"],
    "runs/ok/run.json": ["report runs/ok", "evaluate runs/ok --out o.json"],
    "runs/ok/metrics.jsonl": ["report runs/ok", "report runs/ok --out t.md", f"{RESUME} --resume auto"],
    "runs/ok/eval.jsonl": ["report runs/ok", "report runs/ok runs/other --out t.tex"],
    "runs/ok/checkpoints/best.json": [
        "evaluate runs/ok --out o.json",
        "train own.toml name=new model.pretrained=runs/ok",
    ],
    "runs/ok/checkpoints/LAST/files.json": ["evaluate runs/ok --out o.json", f"{RESUME} --resume auto"],
    "runs/ok/checkpoints/LAST/trainer.pt": [
        "train own.toml name=ok train.epochs=2 --resume auto",
        "temperature runs/ok",
    ],
    "runs/ok/checkpoints/LAST/shard-00000-of-00001.pt": [f"{RESUME} --resume auto", "temperature runs/ok"],
    "runs/ok/checkpoints/LAST/open_clip_config.json": ["evaluate runs/ok --out o.json", "temperature runs/ok"],
    "runs/ok/checkpoints/LAST/open_clip_model.safetensors": [
        "evaluate runs/ok --out o.json",
        "train own.toml name=new model.pretrained=runs/ok/checkpoints/LAST/open_clip_model.safetensors",
    ],
}
LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 12345\n"
HTML = b"<!DOCTYPE html>\n<html><head><title>404</title></head><body>Not found</body></html>\n"


@dataclass
class Case:
    """A command in a copy of the material of which some files are replaced.

    Attributes:
        words: the command line.
        files: path in the folder → new content; None takes the file away.
        refused: whether only exit code 2 is right. Otherwise 0 and 1 are, too: a file with a changed byte may be whole.
    """

    words: list[str]
    files: dict[str, bytes | None] = field(default_factory=dict)
    refused: bool = False


def draw(count: int, seed: int, material: Path) -> list[Case]:
    """`count` cases: a fifth of each of command lines, bad config values, config texts, data files and run folders."""
    chance = random.Random(seed)
    values = list(_bad_values())
    data = [name for name in TOUCHED if not name.endswith(".toml") and not name.startswith("runs/")]
    kinds: list[Callable[[], Case]] = [
        lambda: _command(chance),
        lambda: chance.choice(values),
        lambda: _text(chance, material),
        lambda: _file(chance, material, data),
        lambda: _file(chance, material, [name for name in TOUCHED if name.startswith("runs/")]),
    ]
    return [kinds[number % len(kinds)]() for number in range(count)]


def _command(chance: random.Random) -> Case:
    """A command line with one or two words dropped, doubled, swapped, put in, or given another value."""
    words = chance.choice(COMMANDS).split()
    for _ in range(chance.choice((1, 1, 2))):
        place = chance.randrange(len(words))
        key, equals, _ = words[place].partition("=")
        match chance.randrange(6):
            case 0:
                del words[place]
            case 1:
                words.insert(place, words[place])
            case 2:
                other = chance.randrange(len(words))
                words[place], words[other] = words[other], words[place]
            case 3:
                words.insert(place, chance.choice(NASTY))
            case _ if equals:
                words[place] = f"{key}={chance.choice(NASTY)}"
            case _:
                words[place] = chance.choice(NASTY)
        words = words or ["train"]
    return Case(words)


def _bad_values() -> Iterator[Case]:
    """A value that no key of that type can have, for every config key; devices as data: all must be refused."""
    from disttempnet.losses import OBJECTIVES

    def case(key: str, value: str) -> Case:
        return Case(["train", "own.toml", "name=new", f"{key}={value}"], refused=True)

    for device in ("/dev/zero", "/dev/null", "/proc/self/mem"):
        yield case("data.train", device)
        yield Case(["data", "index", device], refused=True)
        yield Case(["temperature", "runs/ok", "--captions", device, "--out", "t.csv"], refused=True)
        yield Case(["train", device], refused=True)
    for key, kind in _keys(Config):
        for value in _impossible(kind):
            yield case(key, value)
    for name, recipe in OBJECTIVES.items():
        for argument, default in recipe.arguments.items():
            for value in _impossible(type(default)):
                words = ["train", "own.toml", "name=new", f"loss={{name='{name}',{argument}={value}}}"]
                yield Case(words, refused=True)


def _keys(model: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, inner in model.model_fields.items():
        kind = inner.annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            if name != "loss":
                yield from _keys(kind, f"{prefix}{name}.")
        else:
            yield prefix + name, kind


def _impossible(kind: Any) -> list[str]:
    """TOML values that are none of this type, or outside every sensible range."""
    if get_origin(kind) in (Union, types.UnionType):
        return ["{}", "[{}]", "[1]", "nan"]
    if get_origin(kind) is Literal or kind is bool:
        return ["'no such word'", "nan", "[]", "2"]
    if kind is int:
        return ["nan", "inf", "0.5", "true", "'x'", "[]", str(2**70), str(-(2**70))]
    if kind is float:
        return ["nan", "inf", "-inf", "true", "'x'", "[]", "1e300", "-1e300"]
    if kind is str:
        return ["[]", "{}", "[1]"]
    if get_args(kind):  # a tuple of strings
        return ["nan", "true", "{}", "[[]]", "[1]"]
    return []


def _text(chance: random.Random, material: Path) -> Case:
    """A config or grid whose text is damaged."""
    return _file(chance, material, ["own.toml", "grid.toml"])


def _file(chance: random.Random, material: Path, names: list[str]) -> Case:
    """A command that reads a file which is gone, cut, changed in some bytes, or another kind of file."""
    name = chance.choice(names)
    last = sorted((material / "runs/ok/checkpoints").glob("step-*"))[-1].name
    words = [word.replace("LAST", last) for word in chance.choice(TOUCHED[name]).split()]
    name = name.replace("LAST", last)
    if words[0] == "train" and not any(word.startswith("name=") for word in words):
        words.append("name=new")
    return Case(words, {name: _damaged(chance, (material / name).read_bytes())})


def _damaged(chance: random.Random, content: bytes) -> bytes | None:
    place = chance.randrange(max(len(content), 1))
    other = chance.randrange(max(len(content), 1))
    match chance.randrange(12):
        case 0:
            return None
        case 1:
            return b""
        case 2:
            return chance.choice([LFS, HTML, b"\x00" * 4096, b"\xef\xbb\xbf", b"[]", b"{}", b"null", b"[[", b"1"])
        case 3:
            return content[:place]
        case 4:
            return b"\xef\xbb\xbf" + content
        case 5:
            return content.decode("latin-1").encode("utf-16")
        case 6:
            return content.replace(b"\n", b"\r\n")
        case 7:
            return content[: min(place, other)] + content[max(place, other) :]
        case 8:
            return content + content[:place]
        case 9:
            return content[:place] + chance.randbytes(8) + content[place:]
        case 10:
            return content[:place] + chance.choice(NASTY).encode("utf-8", "surrogateescape") + content[place:]
        case _:
            changed = bytearray(content)
            for _ in range(chance.choice((1, 4, 32)) if content else 0):
                changed[chance.randrange(len(changed))] = chance.randrange(256)
            return bytes(changed)
