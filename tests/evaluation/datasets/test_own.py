"""Data of one's own: retrieval, with labels zero-shot, and standard errors, on images whose scores are worked out."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from disttempnet.config import SourceConfig
from disttempnet.data import open_source
from disttempnet.errors import UserError
from disttempnet.evaluation import evaluate
from disttempnet.evaluation.datasets.open import load_task
from disttempnet.evaluation.metrics import WeightedHits, clustered_error, mean_per_class_error
from disttempnet.evaluation.scores import Scores
from disttempnet.evaluation.tasks import TaskData, choose_tasks, find_task, task_title
from tests.evaluation.formats import picture, write_tar
from tests.evaluation.toy import evaluate_into, meaning_towers

# what an image shows, its captions, its label; "red" belongs to two images, and the last has a wrong caption
ROWS = [
    ("red", ["red", "a red thing"], "warm"),
    ("red", ["red"], "warm"),
    ("blue", ["blue"], "cold"),
    ("blue", ["green"], "cold"),
]
# image → text: both red ones find "red", the first blue one finds "blue", and so does the second: 3 of 4
# text → image: red, a red thing and blue find theirs; green is as far from all, and finds the first: 3 of 4


def loaded(name: str) -> TaskData:
    return load_task(find_task(name))


def scores_of(name: str) -> Scores:
    return evaluate(meaning_towers(), [name], device="cpu")[name]


def write_folder(root: Path) -> Path:
    root.mkdir()
    for number, (colour, captions, label) in enumerate(ROWS):
        (root / f"{number}.png").write_bytes(picture(colour))
        (root / f"{number}.txt").write_text(captions[0])
        (root / f"{number}.json").write_text(json.dumps({"label": label, "alt": captions}))
    return root


def write_shards(root: Path, label: bool = True) -> Path:
    root.mkdir()
    for place in range(2):
        rows = ROWS[2 * place : 2 * place + 2]
        samples = [
            {
                "png": picture(colour),
                "txt": "\n".join(captions).encode(),
                "json": json.dumps({"species": name} if label else {}).encode(),
            }
            for colour, captions, name in rows
        ]
        write_tar(root / f"{place}.tar", samples)
    return root


def write_listing(root: Path) -> Path:
    root.mkdir()
    lines = ["image,caption,kind"]
    for number, (colour, captions, label) in enumerate(ROWS):
        (root / f"{number}.png").write_bytes(picture(colour))
        lines += [f"{number}.png,{caption},{label}" for caption in captions]
    (root / "captions.csv").write_text("\n".join(lines) + "\n")
    return root / "captions.csv"


def test_three_ways_to_say_the_same(tmp_path: Path) -> None:
    names = [
        f"shards:{write_shards(tmp_path / 'tars')}/{{0..1}}.tar?label=species",
        f"captions:{write_listing(tmp_path / 'list')}?label=kind",
        f"folder:{write_folder(tmp_path / 'photos')}?caption=alt",
    ]
    for name in names:
        data = loaded(name)
        assert [sample.captions for sample in data.samples] == [tuple(captions) for _, captions, _ in ROWS]
        assert data.class_names == ("cold", "warm")
        assert data.labels == (1, 1, 0, 0)
        assert data.task.protocols == ("classification", "retrieval")
        assert not data.broken
    results = evaluate(meaning_towers(), names, device="cpu")
    first, *others = (results[name] for name in names)
    assert all(other.metrics == first.metrics and other.errors == first.errors for other in others)
    assert first.trials["image_to_text_recall@1"] == 4
    assert first.trials["text_to_image_recall@1"] == 4
    assert first.metrics["image_to_text_recall@1"] == 3 / 4
    assert first.metrics["text_to_image_recall@1"] == 3 / 4
    assert first.chance["acc1"] == 1 / 2
    assert first.headline == first.metrics["mean_recall"]


def test_without_labels_it_is_retrieval(tmp_path: Path) -> None:
    data = loaded(f"shards:{write_shards(tmp_path / 'tars', label=False)}")
    assert (data.task.protocols, data.heads, data.notes) == (("retrieval",), (), ())
    with pytest.raises(UserError, match=r"task 'shards:.*': no sample has 'genus'; there are no other fields"):
        loaded(f"shards:{tmp_path / 'tars'}?label=genus")
    folder = write_folder(tmp_path / "photos")
    for number in range(len(ROWS)):
        (folder / f"{number}.json").unlink()
    for name in (f"captions:{write_listing(tmp_path / 'list')}", f"folder:{folder}"):
        scores = scores_of(name)
        assert scores.headline == scores.metrics["mean_recall"]
        assert "acc1" not in scores.metrics


def test_labels_that_make_no_classes(tmp_path: Path) -> None:
    def tars(name: str, samples: list[dict[str, bytes]]) -> str:
        (tmp_path / name).mkdir()
        pictures = [{"png": picture("red"), "txt": b"red", **sample} for sample in samples]
        write_tar(tmp_path / name / "0.tar", pictures)
        return f"shards:{tmp_path / name}"

    one = tars("one", [{"json": b'{"label": "a"}'}, {"json": b'{"label": "a"}'}])
    assert loaded(one).notes == ("all samples are labelled 'a': no zero-shot",)
    half = tars("half", [{"json": b'{"label": "a"}'}, {"json": b'{"label": ["b"]}'}])
    assert loaded(half).notes == ("1 of 2 samples have no label: no zero-shot",)
    numbers = tars("numbers", [{"cls": b"1"}, {"cls": b"0"}])
    assert loaded(numbers).notes == (
        f"labels are numbers, and {tmp_path}/numbers/classnames.txt with their names is missing: no zero-shot",
    )
    (tmp_path / "numbers" / "classnames.txt").write_text("red\nblue\ngreen\n\n")
    assert loaded(numbers).class_names == ("red", "blue", "green")
    assert loaded(numbers).labels == (1, 0)
    (tmp_path / "numbers" / "classnames.txt").write_text("red\n")
    with pytest.raises(UserError, match="1 names, but a label is 1"):
        loaded(numbers)
    with pytest.raises(UserError, match="no classes in 'label': all samples are labelled 'a'"):
        loaded(one + "?label=label")


def test_names_with_dots_are_as_many_samples_as_in_training(tmp_path: Path) -> None:
    stems = ["mr. a", "mr. b", "st. c", "shot_v1.3", "plain1", "plain2"]
    with tarfile.open(tmp_path / "0.tar", "w") as tar:
        for stem in stems:
            seg = {"seg.png": picture("blue")} if stem == "plain1" else {}  # part of plain1, no sample of its own
            for suffix, data in {"png": picture("red"), "txt": stem.encode(), **seg}.items():
                member = tarfile.TarInfo(f"{stem}.{suffix}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    data = loaded(f"shards:{tmp_path}")
    assert [(sample.key, sample.captions) for sample in data.samples] == [(f"0.tar/{s}", (s,)) for s in stems]
    assert not data.broken
    assert len(open_source((SourceConfig(path=str(tmp_path)),)).usable) == len(stems)


def test_samples_that_cannot_be_used_are_named(tmp_path: Path) -> None:
    good = {"png": picture("red"), "txt": b"red"}
    samples = [good, {"png": picture("red")}, {"txt": b"red"}, {**good, "txt": b" \n"}, {**good, "json": b"{"}]
    write_tar(tmp_path / "0.tar", samples)
    broken = loaded(f"shards:{tmp_path}").broken
    assert [line.partition(": ")[2] for line in broken] == [
        "no caption",
        "no image",
        "empty caption",
        "its .json cannot be read",
    ]
    table = tmp_path / "rows.csv"
    table.write_text("image,caption\na.png,red\nb.png,\n")
    (tmp_path / "a.png").write_bytes(picture("red"))
    data = loaded(f"captions:{table}")
    assert data.broken == ("rows.csv:b.png: empty caption",)
    assert scores_of(f"captions:{table}").complete is False


def test_images_in_parquet_and_a_split(tmp_path: Path) -> None:
    columns = {
        "image": [{"bytes": picture(colour), "path": None} for colour, *_ in ROWS],
        "caption": [captions[0] for _, captions, _ in ROWS],
        "split": ["train", "test", "test", "val"],
    }
    pq.write_table(pa.table(columns), tmp_path / "x.parquet")
    name = f"captions:{tmp_path / 'x.parquet'}"
    data = loaded(name)
    assert data.notes == ("its split 'test' is evaluated, of test 2, train 1, val 1 images",)
    assert scores_of(name).metrics["image_to_text_recall@1"] == 1.0


def test_what_is_not_there_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "0.jpg").write_bytes(picture("red", "jpg"))
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    listing = write_listing(tmp_path / "list")
    for number in range(len(ROWS)):
        (tmp_path / "list" / f"{number}.png").unlink()
    for name, why in (
        (f"captions:{tmp_path}/none.csv", "no such listing"),
        (f"shards:{tmp_path}/none", "no such folder"),
        (f"shards:{tmp_path}/{{0..3}}.tar", "no such shard"),
        (f"folder:{tmp_path}/none", "no such folder"),
        (f"folder:{tmp_path}?label=x", "no captions beside its images, which label need"),
        (f"folder:{tmp_path}?labels=x", r"unknown option 'labels'\. Did you mean 'label'"),
        (f"captions:{listing}", r"name the folder of images after the file's: \?images=FOLDER"),
        ("shards:s3://bucket/{0..3}.tar", "evaluation reads shards of this machine only"),
        (f"folder:{'x' * 300}", "cannot be read: File name too long"),
        (f"captions:{'x' * 300}.csv", "cannot be read: File name too long"),
        (f"folder:{tmp_path}/loop", "no such folder"),
        ("folder:a\0b", "lacks its path"),
    ):
        with pytest.raises(UserError, match=rf"^task '.*': .*{why}") as raised:
            loaded(name)
        assert "\n" not in str(raised.value)
        assert "data.train" not in str(raised.value)


def test_titles_are_short_and_do_not_depend_on_where_one_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "photos.v2").mkdir()
    monkeypatch.chdir(tmp_path)
    for name, title in (
        ("folder:photos.v2", "photos.v2"),
        (f"folder:{tmp_path}/photos.v2/?label=a", "photos.v2"),
        ("captions:photos.v2/list.csv?images=/x/y", "photos.v2/list.csv"),
        ("shards:photos.v2/{0..9}.tar", "photos.v2/{0..9}.tar"),
        ("folder:is this a name?", "is this a name?"),
        ("scenes", "Scenes"),
        ("of another version", "of another version"),
    ):
        assert task_title(name) == title


def test_a_folder_of_results_takes_them_too(tmp_path: Path) -> None:
    names = [f"shards:{write_shards(tmp_path / 'tars')}?label=species", f"captions:{write_listing(tmp_path / 'x')}"]
    records = list(evaluate_into(tmp_path / "out", tmp_path, choose_tasks(names)).values())
    assert [(record.error, record.main_metric_name, record.samples) for record in records] == [
        ("", "mean_recall", 4)
    ] * 2
    assert records[0].value == pytest.approx(scores_of(names[0]).headline)
    assert records[0].standard_errors == pytest.approx(scores_of(names[0]).errors)


def test_standard_errors_are_those_of_many_draws() -> None:
    """Images drawn anew, each with one to four captions that are right together or wrong together as a rule."""
    rng = np.random.default_rng(0)

    def draw(images: int) -> tuple[list[WeightedHits], float, float]:
        easy, captions = rng.random(images) < 0.5, rng.integers(1, 5, images)
        cluster = np.repeat(np.arange(images), captions)
        texts = rng.random(len(cluster)) < np.where(easy[cluster], 0.9, 0.2)
        found = rng.random(images) < np.where(easy, 0.8, 0.1)
        parts = [
            WeightedHits(torch.tensor(found), torch.arange(images), 0.5),
            WeightedHits(torch.tensor(texts), torch.tensor(cluster), 0.5),
        ]
        return parts, (found.mean() + texts.mean()) / 2, float(np.sqrt(texts.mean() * (1 - texts.mean()) / len(texts)))

    drawn = [draw(200) for _ in range(400)]
    true = np.std([mean for _, mean, _ in drawn], ddof=1)
    errors = [clustered_error(parts, 200) or 0.0 for parts, _, _ in drawn]
    assert np.mean(errors) == pytest.approx(true, rel=0.1)
    assert np.mean([binomial for *_, binomial in drawn]) < 0.85 * true, "captions of an image are no two draws"


def test_standard_errors_by_hand() -> None:
    hits = torch.tensor([1.0, 0.0, 1.0, 1.0])
    assert clustered_error([WeightedHits(hits, torch.arange(4))], 4) == pytest.approx((3 / 16 / 3) ** 0.5)
    assert clustered_error([WeightedHits(hits[:1], torch.zeros(1, dtype=torch.int64))], 1) is None
    places, labels = torch.tensor([0, 1, 0, 0, 3]), torch.tensor([0, 0, 5, 5, 5])
    # shares 1/2 of two and 2/3 of three
    expected = ((1 / 2) ** 2 / 1 + (2 / 3) * (1 / 3) / 2) ** 0.5 / 2
    assert mean_per_class_error(places, labels) == pytest.approx(expected)
    assert mean_per_class_error(places[:3], labels[:3]) is None


def test_whole_floats_are_labels(tmp_path: Path) -> None:
    labels = [0.0, 1.0, 1.0]
    rows = [{"image": f"{n}.png", "caption": "x", "label": label, "weight": 0.5} for n, label in enumerate(labels)]
    for number in range(3):
        (tmp_path / f"{number}.png").write_bytes(picture("red"))
    listing, table = tmp_path / "list.json", tmp_path / "list.csv"
    listing.write_text(json.dumps(rows))
    table.write_text("image,caption,label\n" + "".join(f"{n}.png,x,{label}\n" for n, label in enumerate(labels)))
    (tmp_path / "classnames.txt").write_text("red\nblue\n")
    for path in (listing, table):
        data = loaded(f"captions:{path}?label=label")
        assert (data.labels, data.class_names) == ((0, 1, 1), ("red", "blue"))
    with pytest.raises(UserError, match=r"'weight' holds no classes: 0\.5 is not a string or a whole number$"):
        loaded(f"captions:{listing}?label=weight")
