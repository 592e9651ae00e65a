"""`disttempnet search` and `disttempnet classify`, against plain loops over the towers."""

from __future__ import annotations

import csv
import io
import json
import os
import re
import signal
from contextlib import nullcontext, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from disttempnet.cli.main import main
from disttempnet.config import CONFIG_FOLDER, load_config
from disttempnet.data import eval_transform
from disttempnet.features import store
from disttempnet.features.store import FeatureStore
from disttempnet.models import Towers, trunk
from disttempnet.training.checkpoint import load_run
from disttempnet.training.trainer import train
from tests.gloo import Pools
from tests.report.pages import Page, assert_self_contained
from tests.search.conftest import LOGIT_SCALE, UNREADABLE, readable

SEARCHED = re.compile(r" +(\d+)  +(-?\d\.\d{4})  (.*)")
FAST = ["--workers", "0"]


def unit_images(towers: Towers, folder: Path) -> dict[str, np.ndarray]:
    """Name → unit feature of each readable image, float64, one at a time through open_clip's own call."""
    transform = eval_transform(towers.image_size, towers.resizing)
    mean, std = (torch.tensor(values)[:, None, None] for values in (towers.mean, towers.std))
    found = {}
    for name, image in readable(folder).items():
        pixels = (transform(image) / 255 - mean) / std
        with torch.no_grad():
            feature = towers.module.encode_image(pixels[None])[0].double().numpy()
        found[name] = feature / np.linalg.norm(feature)
    return found


def unit_text(towers: Towers, text: str) -> np.ndarray:
    with torch.no_grad():
        feature = towers.module.encode_text(towers.tokenizer([text]))[0].double().numpy()
    return feature / np.linalg.norm(feature)


def hits_of(output: str) -> dict[str, list[tuple[int, float, str]]]:
    """Query → (rank, cosine, name) of its lines."""
    found: dict[str, list[tuple[int, float, str]]] = {}
    query = ""
    for line in output.splitlines():
        if match := SEARCHED.fullmatch(line):
            found[query].append((int(match[1]), float(match[2]), match[3]))
        else:
            query = line
            found[query] = []
    return found


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def test_the_nearest_are_those_of_a_plain_loop(
    model: str, towers: Towers, photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    queries = ["a red apple", "two dogs in the snow"]
    assert main(["search", model, str(photos), *queries, "--top", "45", "--html", "new/found.html", *FAST]) == 0
    said = capsys.readouterr()
    found, images = hits_of(said.out), unit_images(towers, photos)
    assert len(images) == 45
    assert list(found) == queries
    for query, hits in found.items():
        text = unit_text(towers, query)
        assert [rank for rank, _, _ in hits] == list(range(1, 46))
        assert sorted(name for _, _, name in hits) == sorted(images)
        by_name = {name: float(feature @ text) for name, feature in images.items()}
        np.testing.assert_allclose([cosine for _, cosine, _ in hits], [by_name[name] for _, _, name in hits], atol=6e-5)
        assert [cosine for _, cosine, _ in hits] == sorted((cosine for _, cosine, _ in hits), reverse=True)

    # what is left out is counted and named, with the reason
    lines = said.err.splitlines()
    assert lines[:2] == ["left out, hidden: 1 (.hidden.png)", "left out, not images that can be read: 1 .txt"]
    assert lines[2].startswith("left out, unreadable: 3 images: corrupt.jpg (cannot identify image), cut.png (")
    assert all(name in lines[2] for name in UNREADABLE)
    assert re.fullmatch(r"features of 45 images, 48 embedded now: .*/cache/features/image-\w{16}", lines[3])

    # the page has the same, with pictures
    page = Page(Path("new/found.html").read_text(encoding="utf-8"))
    assert_self_contained(page)
    assert page.ids == ["query-1", "query-2"]
    pictures = [attributes for tag, attributes in page.tags if tag == "img"]
    assert len(pictures) == 90
    assert all(attributes["src"].startswith("data:image/webp;base64,") for attributes in pictures)
    assert [attributes["alt"] for attributes in pictures] == [name for hits in found.values() for _, _, name in hits]
    assert f"{found['a red apple'][0][1]:.4f}" in page.text
    assert "45 images of" in page.text
    assert "corrupt.jpg" in page.text
    assert "<b> & 日本.png" in page.text


def test_the_second_search_runs_no_image_tower(
    model: str, photos: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["search", model, str(photos), "a dog", *FAST]) == 0
    first = capsys.readouterr().out

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("the image tower is run")

    with monkeypatch.context() as patched:
        patched.setattr(trunk, "encode_images", refuse)
        assert main(["search", model, str(photos), "a dog", *FAST]) == 0
        again = capsys.readouterr()
        assert again.out == first
        assert "features of 45 images, 0 embedded now" in again.err
        assert main(["classify", model, str(photos), "--classes", "dog,cat", *FAST]) == 0
    (photos / "new.png").write_bytes((photos / "=1+1.png").read_bytes())
    capsys.readouterr()
    assert main(["search", model, str(photos), "a dog", *FAST]) == 0
    assert "features of 46 images, 49 embedded now" in capsys.readouterr().err, "the folder has changed"


def test_classes_are_those_of_a_plain_loop(
    model: str, towers: Towers, photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = ["=dog", "a cat", "tree"]
    Path("names.txt").write_text("\n".join(names))
    given = ["classify", model, str(photos), "--classes", "names.txt", "--out", "new/out.csv", "--html", "page.html"]
    assert main([*given, *FAST]) == 0
    said = capsys.readouterr()

    # class features: the mean of the unit features of both templates
    rows = []
    for name in names:
        total = sum(unit_text(towers, text) for text in (f"a photo of a {name}.", name))
        rows.append(total / np.linalg.norm(total))
    expected = {}
    for name, image in unit_images(towers, photos).items():
        logits = LOGIT_SCALE * np.array([image @ row for row in rows])
        shares = np.exp(logits) / np.exp(logits).sum()
        order = np.argsort(-shares)
        expected[name] = [(names[c], shares[c]) for c in order[:2]]
    table = rows_of(Path("new/out.csv"))
    assert list(table[0]) == ["name", "class", "probability", "second_class", "second_probability"]
    assert [row["name"] for row in table] == [f"'{name}" if name.startswith("=") else name for name in expected]
    for row, ((first, share), (second, other)) in zip(table, expected.values(), strict=True):
        assert (row["class"].lstrip("'"), row["second_class"].lstrip("'")) == (first, second)
        np.testing.assert_allclose([float(row["probability"]), float(row["second_probability"])], [share, other], 2e-5)
    assert {row["class"] for row in table} <= {"'=dog", "a cat", "tree"}, "no cell is run as a formula"

    # counts and means by class, in the terminal and on the page
    page = Page(Path("page.html").read_text(encoding="utf-8"))
    assert_self_contained(page)
    for name in names:
        own = [share for (first, share), _ in expected.values() if first == name]
        line = next(line for line in said.out.splitlines() if line.startswith(name))
        mean = f"{np.mean(own):.3f}" if own else "–"
        assert line.removeprefix(name).split() == [str(len(own)), mean]
        assert f"{name} {len(own)} {mean} {sum(share < 0.5 for share in own)}" in page.text
    assert "τ = 0.04, one over the model's logit scale" in said.out
    assert "τ = 0.04, one over the model's logit scale" in page.text
    assert "a photo of a {c}. , {c}" in page.text
    assert "(45 rows)" in said.err


def test_words_that_are_not_unicode_are_escaped(model: str, photos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    odd = os.fsdecode(b"\xff\x1b[2J")
    assert main(["search", model, str(photos), odd, "--html", "a.html", *FAST]) == 0
    assert capsys.readouterr().out.startswith("\\udcff\\x1b[2J\n")
    assert "\\udcff\\x1b[2J" in Page(Path("a.html").read_text(encoding="utf-8")).text
    assert main(["classify", model, str(photos), "--classes", f"{odd},cat", "--html", "b.html", *FAST]) == 0
    assert {row["class"] for row in rows_of(Path("classified.csv"))} <= {"\\udcff\\x1b[2J", "cat"}
    assert "\\udcff\\x1b[2J" in Page(Path("b.html").read_text(encoding="utf-8")).text


def test_templates_and_a_csv_on_standard_output(
    model: str, towers: Towers, photos: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    given = ["classify", model, str(photos), "--classes", "dog,cat", "--templates", "{c}", "--out", "/dev/stdout"]
    assert main([*given, *FAST]) == 0
    said = capfd.readouterr()
    rows = list(csv.DictReader(io.StringIO(said.out)))
    assert len(rows) == 45
    assert "mean probability" in said.err
    image = unit_images(towers, photos)["cmyk.jpg"]
    logits = LOGIT_SCALE * np.array([image @ unit_text(towers, name) for name in ("dog", "cat")])
    row = next(row for row in rows if row["name"] == "cmyk.jpg")
    assert row["class"] == ("dog", "cat")[int(logits.argmax())]
    assert float(row["probability"]) == pytest.approx(1 / (1 + np.exp(-abs(logits[0] - logits[1]))), rel=2e-5)


def test_a_run_uses_its_temperature_network(photos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = load_config(CONFIG_FOLDER / "debug.toml", ["train.stop_after_steps=2", "eval.tasks=[]", "data.limit=64"])
    assert train(config)
    capsys.readouterr()
    assert main(["classify", "runs/debug", str(photos), "--classes", "dog,cat", "--out", "out.csv", *FAST]) == 0
    said = capsys.readouterr().out
    run = load_run("runs/debug")
    classes = [sum(unit_text(run.towers, text) for text in (f"a photo of a {name}.", name)) for name in ("dog", "cat")]
    dog, cat = (feature / np.linalg.norm(feature) for feature in classes)
    taus = []
    for row, image in zip(rows_of(Path("out.csv")), unit_images(run.towers, photos).values(), strict=True):
        unit = torch.from_numpy(image).float()[None]
        taus.append(float(run.loss.temperatures(unit, unit)[0]))
        margin = float(image @ (dog - cat)) / taus[-1]
        assert row["class"] == ("dog" if margin > 0 else "cat")
        assert float(row["probability"]) == pytest.approx(1 / (1 + np.exp(-abs(margin))), rel=2e-5)
    assert np.ptp(taus) > 0
    told = re.search(r"the run \(disttempnet-v1\): ([\d.]+) to ([\d.]+), mean ([\d.]+)", said)
    assert told is not None
    np.testing.assert_allclose([float(one) for one in told.groups()], [min(taus), max(taus), np.mean(taus)], rtol=1e-3)


def test_listings_and_shards_are_searched_too(model: str, photos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["search", model, "embedded:emoji/val_concepts", "a dog", "--top", "2", *FAST]) == 0
    assert [rank for rank, _, _ in hits_of(capsys.readouterr().out)["a dog"]] == [1, 2]
    rows = [{"image": name, "caption": "x"} for name in ("cmyk.jpg", "corrupt.jpg", "a png.jpg")]
    (photos / "list.jsonl").write_text("\n".join(map(json.dumps, [*rows, {"image": "cut.png"}])))
    assert main(["search", model, str(photos / "list.jsonl"), "a dog", *FAST]) == 0
    said = capsys.readouterr()
    names = {name for _, _, name in hits_of(said.out)["a dog"]}
    assert names == {"list.jsonl:cmyk.jpg", "list.jsonl:a png.jpg"}
    assert "1 samples left out, no caption: list.jsonl:cut.png" in said.err
    assert "left out, unreadable: 1 images: list.jsonl:corrupt.jpg (cannot identify image)" in said.err


def test_a_query_that_is_cut_is_said(model: str, photos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fits, long = "dog " * 18, "dog " * 18 + "and cat"  # of twenty tokens two are marks
    assert main(["search", model, str(photos), fits.strip(), long, "dog", *FAST]) == 0
    said = [line for line in capsys.readouterr().err.splitlines() if "cut off" in line]
    assert said == [f"longer than the text tower reads, its end is cut off: {long}"]


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_stop_keeps_finished_shards_and_says_so(
    number: signal.Signals,
    code: int,
    model: str,
    photos: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(store, "LEAST_ROWS", 8)
    command = ["search", model, str(photos), "a dog", *FAST]
    write, written = FeatureStore.write, list[int]()

    def counted(kept: FeatureStore, shard: int, *rest: Any) -> None:
        write(kept, shard, *rest)
        written.append(shard)

    def stopped(kept: FeatureStore, shard: int, *rest: Any) -> None:
        counted(kept, shard, *rest)
        os.kill(os.getpid(), number)

    monkeypatch.setattr(FeatureStore, "write", stopped)
    with nullcontext() if code == 130 else pytest.raises(SystemExit, match="143"):
        assert main(command) == code
    assert written == [0]
    said = capsys.readouterr()
    assert said.out == ""
    assert "stopped: 1 of 6 shards of image features are kept; the same command goes on\n" in said.err
    monkeypatch.setattr(FeatureStore, "write", counted)
    assert main(command) == 0
    assert "features of 45 images, 40 embedded now" in capsys.readouterr().err
    assert written == list(range(6)), "the first shard is not computed again"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["search", "MODEL", "photos", " "], 'search: an empty query: say what to look for, "a red apple"'),
        (["search", "MODEL", "photos"], "the following arguments are required: QUERY"),
        (["search", "MODEL", "nowhere", "x"], "disttempnet: nowhere: no such folder of images, shard or listing"),
        (["search", "MODEL", "no/{0..3}.tar", "x"], "no: no such folder, named by data.train"),
        (["search", "MODEL", "empty", "x"], "empty: no images in it (bmp, gif, "),
        (["search", "MODEL", "broken", "x"], "broken: none of its 1 images can be read: a.jpg: cannot identify image"),
        (["search", "MODEL", "photos", "x", "--image-key", "k"], "is a folder of images, --image-key is for listings"),
        (["search", "MODEL", "photos", "x", "--html", "page.txt"], "--html page.txt: the page is an .html file"),
        (["search", "MODEL", "photos", "x", "--html", "notes/page.html"], "notes/page.html: cannot be written: "),
        (["search", "MODEL", "photos", "x", "--html", "empty"], "empty: cannot be written: it is a folder"),
        (["search", "MODEL", "photos", "x", "--top", "0"], "--top: must be a whole number from 1 to 10,000 (got 0)"),
        (["search", "demo-vit-32", "photos", "x"], "demo-vit-32: with which weights?"),
        (["search", "ViT-B-23/openai", "photos", "x"], "ViT-B-23"),
        (["search", "MODEL", "photos", "x", "--cache-features", "notes"], "name another folder with --cache-features"),
        (["classify", "MODEL", "photos"], "the following arguments are required: --classes"),
        (["classify", "MODEL", "photos", "--classes", "a"], "no file, and one class: 'a'"),
        (["classify", "MODEL", "photos", "--classes", "a,b,a"], "--classes: class 'a' is given 2 times"),
        (["classify", "MODEL", "photos", "--classes", "a,b", "--templates", "x"], "'x' has no {c}"),
        (
            ["classify", "MODEL", "photos", "--classes", "a,b", "--out", "x.txt"],
            "--out x.txt: the table is a .csv file",
        ),
        (["classify", "MODEL", "photos", "--classes", "a,b", "--out", "notes/x.csv"], "notes/x.csv: cannot be written"),
    ],
)
def test_mistakes_are_one_line(
    arguments: list[str], message: str, model: str, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (here / "empty").mkdir()
    (here / "photos").mkdir()
    (here / "broken").mkdir()
    for name in ("photos/a.jpg", "broken/a.jpg"):
        (here / name).write_bytes(b"no image")
    (here / "notes").write_text("a file")
    assert main([model if word == "MODEL" else word for word in arguments] + FAST) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not list(here.glob("*.csv"))


def said_by_a_rank(arguments: list[str], folder: str) -> tuple[str, str]:
    """Standard output and error of the command on this rank."""
    os.environ["DISTTEMPNET_CACHE"] = folder
    out, error = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(error):
        assert main(arguments) == 0
    return out.getvalue(), error.getvalue()


def test_ranks_share_the_work_and_the_first_one_speaks(
    model: str, photos: Path, gloo: Pools, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for command in (["search", model, str(photos), "a dog"], ["classify", model, str(photos), "--classes", "dog,cat"]):
        arguments = [*command, *FAST, *(["--out", str(here / "out.csv")] if command[0] == "classify" else [])]
        assert main(arguments) == 0
        alone, table = capsys.readouterr().out, (here / "out.csv").read_bytes() if "--out" in arguments else b""
        first, second = gloo(2, said_by_a_rank, arguments, str(here / "other"))
        assert first[0] == alone
        assert second == ("", "")
        assert "--out" not in arguments or (here / "out.csv").read_bytes() == table
