"""The page: complete, self-contained, escaped, and honest about unfinished or damaged runs."""

from __future__ import annotations

import base64
import csv
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from disttempnet.data import open_index
from disttempnet.errors import UserError, UserNotice
from disttempnet.evaluation import tasks as readers
from disttempnet.report import build_report, read_run, write_report
from disttempnet.report.read import distinct_titles
from disttempnet.report.runs import examples
from disttempnet.training.checkpoint import Run
from tests.evaluation.toy import COLOURS, colour_towers, toy_task, write_shard
from tests.report.synthetic import write_run

SECTIONS = ("results", "learning", "temperatures", "zero-shot", "retrieval", "provenance")
EVIL = "<script>alert(1)</script> & red"


class Page(HTMLParser):
    """Start tags with their attributes, ids, and visible text; void and balanced tags are checked."""

    VOID = frozenset({"img", "meta", "br", "link", "input"})

    def __init__(self, html: str) -> None:
        super().__init__()
        self.html, self.tags, self.words, self._open = html, [], [], []
        self.feed(html)
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self._open[-1:] not in (["style"], ["script"]):
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())

    @property
    def ids(self) -> list[str]:
        return [attributes["id"] for _, attributes in self.tags if "id" in attributes]


def page_of(folders: list[Path], out: Path) -> Page:
    assert build_report(folders, out) == out
    return Page(out.read_text(encoding="utf-8"))


def assert_self_contained(page: Page) -> None:
    for tag, attributes in page.tags:
        assert tag not in ("script", "link", "iframe", "object", "base")
        for name in ("src", "href", "srcset", "style", "data"):
            value = attributes.get(name) or ""
            assert value.startswith(("data:", "#")) or "//" not in value, (tag, name, value[:80])
    assert not re.search(r"@import|url\(", page.html)
    for encoded in re.findall(r"data:image/svg\+xml;base64,([^\"]+)", page.html):
        svg = base64.b64decode(encoded).decode()
        assert not re.search(r"(href|src)=\"(?!#|data:)", svg)


def test_two_runs_without_checkpoints(tmp_path: Path) -> None:
    folders = [write_run(tmp_path / "a"), write_run(tmp_path / "b", "CLIP", spread=0.0, acc1=0.3)]
    page = page_of(folders, tmp_path / "new" / "page.html")
    assert page.ids == list(SECTIONS)
    assert_self_contained(page)
    for part in (
        "DistTempNet-v1 vs. CLIP",
        "Unseen renderings",
        "chance",
        "Of 4 measurements, DistTempNet-v1 is clearly ahead in 2; in 2 the runs are too",
        "How the temperatures of DistTempNet-v1 spread",
        "loss.rho",
        "0123abcd",
        "feed",
        "4.0 min",
        "no checkpoint",
    ):
        assert part in page.text, part
    assert "unfinished" not in page.text
    assert "temperatures of CLIP spread" not in page.text
    assert FORMULA_TAIL in page.text
    best = [attributes for tag, attributes in page.tags if tag == "td" and attributes.get("class") == "best"]
    assert len(best) == 2


FORMULA_TAIL = "+ ρ) <b>"  # shown as text: escaped in the source


def test_equal_runs_give_equal_pages(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "a")
    pages = [build_report([folder], tmp_path / name).read_bytes() for name in ("1.html", "2.html")]
    assert pages[0] == pages[1]


def test_unfinished_run_is_described_as_far_as_it_is(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "a", epochs=2, finished=False)
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 21, "epo')  # the process was killed here
    page = page_of([folder], tmp_path / "page.html")
    assert "DistTempNet-v1 is unfinished: it has logged 20 steps, 2.0 of 4 epochs." in page.text


def test_run_that_has_only_begun(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "a", finished=False)
    for name in ("metrics.jsonl", "eval.jsonl"):
        (folder / name).unlink()
    page = page_of([folder], tmp_path / "page.html")
    assert page.ids == list(SECTIONS)
    assert "No evaluation has been made yet." in page.text


@pytest.mark.parametrize("missing", ["config.toml", "run.json"])
def test_folder_that_is_no_run(tmp_path: Path, missing: str) -> None:
    folder = write_run(tmp_path / "a")
    (folder / missing).unlink()
    with pytest.raises(UserError, match=f"a: not a run folder \\(it has no {missing}\\)"):
        build_report([folder], tmp_path / "page.html")
    assert not (tmp_path / "page.html").exists()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("run.json", b"{", "run.json: skipped: it is not JSON"),
        ("run.json", b"\x00\xff\xfe", "run.json: skipped: it is not JSON"),
        ("run.json", b"[1]", "run.json: skipped: it holds no object"),
        ("run.json", b'{"objective": "clip"}', 'run.json: skipped: objective is "clip"'),
        ("run.json", b'{"started": "yesterday"}', 'run.json: skipped: started is "yesterday"'),
        ("run.json", b'{"parameters": "many"}', 'run.json: skipped: parameters is "many"'),
        ("metrics.jsonl", b'no\n{"step": 1, "epoch": 1}\n', "metrics.jsonl: line 1 is skipped: it is not JSON"),
        ("metrics.jsonl", b'{"step": 1, "epoch": 1}\n\xff\n', "metrics.jsonl: line 2 is skipped: it is not JSON"),
        ("metrics.jsonl", b'{"step": "1", "epoch": 1}\n', "line 1 is skipped: it is no line of this file"),
        ("metrics.jsonl", b'{"step": 1, "epoch": 1, "loss": "x"}\n', "line 1 is skipped: it is no line"),
        ("metrics.jsonl", b"7\n", "line 1 is skipped: it is no line of this file"),
        ("eval.jsonl", b'{"step": 1}\n', "eval.jsonl: line 1 is skipped: it is no line of this file"),
        ("eval.jsonl", b'{"step": 1, "epoch": 1, "results": []}\n', "eval.jsonl: line 1 is skipped"),
        ("temperatures/step-00000010.npz", b"no", "step-00000010.npz: skipped: not a file of temperatures"),
    ],
)
def test_damaged_files_are_named_and_passed_over(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    folder = write_run(tmp_path / "a")
    whole = read_run(folder)
    (folder / name).write_bytes(content)
    with pytest.warns(UserNotice, match=message):
        run = read_run(folder)
    assert run.title == "DistTempNet-v1"
    kept = content.count(b'{"step": 1, "epoch": 1}')
    assert len(run.steps) == (kept if name == "metrics.jsonl" else len(whole.steps))
    assert len(run.evaluations) == (len(whole.evaluations) if name != "eval.jsonl" else 0)
    assert len(run.temperatures) == {"eval.jsonl": 0, "temperatures/step-00000010.npz": 3}.get(name, 4)


def test_a_page_and_compact_results_of_damaged_runs(tmp_path: Path) -> None:
    """Every file but the config is damaged: the page says what there is."""
    folder = write_run(tmp_path / "a")
    for name in ("run.json", "metrics.jsonl", "eval.jsonl"):
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content[: len(content) // 2] + b"\x00\n" + content[len(content) // 2 :])
    with pytest.warns(UserNotice):
        page = build_report([folder], tmp_path / "page.html")
    assert "DistTempNet" in page.read_text(encoding="utf-8")
    with pytest.warns(UserNotice):
        write_report([folder], tmp_path / "results.jsonl")
    assert json.loads((tmp_path / "results.jsonl").read_text())["seconds"] is None


FORMULA = "=HYPERLINK(1)|<b>x</b>\n| % \\input{x} \x1b[2J"


def test_titles_are_words_in_every_table(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "a", FORMULA)
    texts = {
        ending: write_report([folder], tmp_path / f"report.{ending}").read_text(encoding="utf-8")
        for ending in ("md", "csv", "tex", "html")
    }
    assert "| =HYPERLINK(1)\\|&lt;b&gt;x&lt;/b&gt;\\\\n\\| % \\\\input{x} \\\\x1b\\[2J | 1 |" in texts["md"]
    rows = list(csv.reader(texts["csv"].splitlines(keepends=True)))
    assert {row[0] for row in rows[1:]} == {"'=HYPERLINK(1)|<b>x</b>\\n| % \\input{x} \\x1b[2J"}
    assert r"\textbackslash{}input\{x\}" in texts["tex"]
    assert r"\input{x}" not in texts["tex"]
    assert "<b>x</b>" not in texts["html"]


SECRET = "https://user:hunter2@host/{0..9}.tar?token=hunter2"


@pytest.mark.parametrize("ending", ["html", "md", "tex", "csv", "jsonl"])
def test_credentials_of_earlier_versions_are_in_no_report(ending: str, tmp_path: Path) -> None:
    folder = write_run(tmp_path / "a", train="embedded:emoji/train")
    config = (folder / "config.toml").read_text()
    (folder / "config.toml").write_text(config.replace("embedded:emoji/train", SECRET))
    facts = json.loads((folder / "run.json").read_text())
    facts["command"] += f" data.train={SECRET}"
    (folder / "run.json").write_text(json.dumps(facts))
    out = write_report([folder], tmp_path / f"report.{ending}")
    assert "hunter2" not in out.read_text(encoding="utf-8")
    if ending in ("html", "jsonl"):
        assert "***@host" in out.read_text(encoding="utf-8")


def test_run_record(tmp_path: Path) -> None:
    run = read_run(write_run(tmp_path / "a"))
    assert run.title == "DistTempNet-v1"
    assert run.finished
    assert run.has_own_temperatures
    assert run.final["emoji-concepts"].metrics["acc1"] == pytest.approx(0.4)
    assert [snapshot.epoch for snapshot in run.temperatures] == [1, 2, 3, 4]
    epochs, losses = run.series("loss")
    assert epochs[-1] == 4.0
    assert losses[0] == 5.0
    assert len(run.series("nothing")[0]) == 0


def test_temperatures_past_the_last_evaluation_do_not_count(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "a")
    np.savez(folder / "temperatures" / "step-00000099.npz", image=np.ones(3), text=np.ones(3))
    assert [snapshot.epoch for snapshot in read_run(folder).temperatures] == [1, 2, 3, 4]


def test_titles_are_distinct(tmp_path: Path) -> None:
    runs = [read_run(write_run(tmp_path / name, title)) for name, title in (("a", "X"), ("b", "X"), ("c", "Y"))]
    assert distinct_titles(runs) == ["X (a)", "X (b)", "Y"]
    again = read_run(write_run(tmp_path / "other" / "a", "X"))
    assert len(set(distinct_titles([*runs, again]))) == 4


@pytest.fixture
def toy_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run whose model reads colours, evaluated on and trained with images of one colour."""
    rows = [(colour, colour, colour) for colour in COLOURS]
    for split in ("val", "train"):
        (tmp_path / split).mkdir()
    write_shard(tmp_path / "val" / "0.tar", [*rows, ("green", EVIL, "red"), ("corrupt", "red", "red")])
    write_shard(tmp_path / "train" / "0.tar", [*rows, ("red", EVIL, "red"), ("corrupt", "red", "red")])
    monkeypatch.setattr(readers, "all_tasks", lambda: {"toy": toy_task(tmp_path / "val")})
    folder = write_run(tmp_path / "runs" / "a", tasks=("toy",), train=str(tmp_path / "train"))
    digest = open_index(str(tmp_path / "train"), progress=False).digest
    loss = torch.nn.Identity()
    # τ grows with the green part of the image and with the blue part of the text
    loss.temperatures = lambda images, texts, ids: torch.stack([images[:, 1], texts[:, 2]]) / 10

    def opened(record: object) -> Run:
        return Run(folder, read_run(folder).config, colour_towers(), loss, 40, 6, digest)

    monkeypatch.setattr(examples, "open_model", opened)
    return folder


def test_examples_and_gallery_by_hand(tmp_path: Path, toy_run: Path) -> None:
    page = page_of([toy_run], tmp_path / "page.html")
    assert_self_contained(page)
    assert "<script" not in page.html
    assert EVIL in page.text
    assert "Right 6 of 7 (85.7 %)" in page.text  # classes: the green image labelled red is wrong
    assert "Wrong 1 of 7 (14.3 %)" in page.text
    assert "Lowest τ, image side" in page.text
    assert "7 pairs, all of the training set" not in page.text  # one of its 8 usable entries is no image
    assert "caption → image" in page.text
    assert "image → caption" in page.text
    assert "at step 40" in page.text


@pytest.mark.parametrize("robust", [True, False])
def test_the_page_says_what_moves_the_temperature(tmp_path: Path, toy_run: Path, robust: bool) -> None:
    examples.open_model(SimpleNamespace()).loss.robust = robust
    page = page_of([toy_run], tmp_path / "page.html")
    assert ("by a fixed amount, ρ nats" in page.text) == robust
    assert ("In a cross-entropy, τ falls" in page.text) == (not robust)
    assert "learns to predict it from the embedding alone" in page.text


def test_gallery_orders_by_temperature(toy_run: Path) -> None:
    gallery = examples.temperature_gallery(examples.open_model(SimpleNamespace()), batch=4)
    assert gallery is not None
    assert gallery.total == 8
    assert len(gallery.image_tau) == 7
    assert [pair.caption for pair in gallery.extremes["image", "highest"][:2]] == ["green", "yellow"]
    assert [pair.caption for pair in gallery.extremes["text", "highest"][:2]] == ["blue", "grey"]
    assert gallery.extremes["image", "lowest"][0].image_tau == pytest.approx(0.0)


def test_groups_tell_the_runs_apart(toy_run: Path) -> None:
    blind = colour_towers()
    blind.module.encode_image = lambda pixels, normalize: torch.eye(3)[:1].repeat(len(pixels), 1)  # sees red only
    run = examples.open_model(SimpleNamespace())
    other = Run(run.folder, run.config, blind, run.loss, 40, 6, run.index_digest)
    results = [result["toy"] for result in examples.evaluate_models([run, other], ["toy"], batch=4)]
    groups = examples.zero_shot_examples(results, "toy", per_group=2)
    assert [(group.right, group.size) for group in groups] == [
        ((True, True), 1),
        ((True, False), 5),
        ((False, True), 1),
    ]
    assert all(group.total == 7 and len(group.queries) <= 2 for group in groups)
    mislabelled = groups[2].queries[0]
    assert mislabelled.text == "red"
    assert mislabelled.rankings[0].answers[0].text == "green"
    assert mislabelled.rankings[0].place > 1
    assert mislabelled.rankings[0].right_answer.text == "red"
    backwards = examples.retrieval_examples(results, "toy", to_text=False, per_group=2)
    assert sum(group.size for group in backwards) == 7
    assert all(answer.picture for group in backwards for answer in group.queries[0].rankings[0].answers)


def test_training_data_that_is_gone_is_said(tmp_path: Path, toy_run: Path) -> None:
    for shard in (tmp_path / "train").iterdir():
        shard.unlink()
    page = page_of([toy_run], tmp_path / "page.html")
    assert "The training data cannot be read:" in page.text
