"""`disttempnet temperature`: the table against τ and log u found another way, the page, and what is refused."""

from __future__ import annotations

import base64
import csv
import importlib.util
import io
import json
import os
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn.functional import normalize

from disttempnet.cli.main import main
from disttempnet.config import CONFIG_FOLDER, load_config
from disttempnet.data import decode, eval_transform, open_index
from disttempnet.errors import UserError
from disttempnet.report import items
from disttempnet.report.runs import examples
from disttempnet.temperature import measure
from disttempnet.temperature.analysis import Parameter
from disttempnet.temperature.command import TemperatureSource, write_temperatures
from disttempnet.temperature.plots import parameter_chart
from disttempnet.temperature.table import TABLE_COLUMNS
from disttempnet.training.checkpoint import load_run
from disttempnet.training.run_folder import list_checkpoints
from disttempnet.training.trainer import train
from tests.evaluation.toy import COLOURS, write_shard
from tests.gloo import Pools
from tests.report.browser import assert_readable, needs_browser
from tests.report.pages import EVIL, Page, assert_self_contained

SAMPLES = 96


Row = dict[str, str]


def trained(out: Path, *overrides: str) -> Path:
    """Four steps of 16 on the first 96 training samples: two thirds of them are seen."""
    given = [f"out={json.dumps(str(out))}", "data.global_batch=16", f"data.limit={SAMPLES}", "eval.tasks=[]"]
    config = load_config(CONFIG_FOLDER / "debug.toml", [*given, "train.stop_after_steps=4", *overrides])
    assert train(config)
    return config.folder


@pytest.fixture(scope="module")
def network(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trained(tmp_path_factory.mktemp("runs"), "name=network", "loss.rho=2.0", "loss.tau_lr=1e-2")


@pytest.fixture(scope="module")
def per_sample(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trained(tmp_path_factory.mktemp("runs"), "name=own", 'loss={name="isogclr", rho=2.0}')


def rows_of(path: Path) -> list[Row]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def numbers(rows: list[Row], column: str) -> np.ndarray:
    return np.array([float(row[column] or "nan") for row in rows])


@pytest.fixture(scope="module")
def measured(network: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[list[Row], Page]:
    """Table and page of the training data, in several chunks."""
    folder = tmp_path_factory.mktemp("out")
    out, page = folder / "tau.csv", folder / "new" / "page.html"
    options = {"columns": ["label", "subgroup", "tags"], "gallery": page, "frequency_by": "subgroup", "batch": 20}
    assert write_temperatures(str(network), TemperatureSource(), out, **options) == SAMPLES
    assert [path.name for path in folder.iterdir() if path.is_file()] == ["tau.csv"]
    return rows_of(out), Page(page.read_text(encoding="utf-8"))


def test_a_row_a_training_sample(measured: tuple[list[Row], Page], network: Path) -> None:
    rows, _ = measured
    index = open_index("embedded:emoji/train", progress=False)
    ids = index.usable[:SAMPLES].tolist()
    assert list(rows[0]) == [*TABLE_COLUMNS, "label", "subgroup", "tags"]
    assert [int(row["id"]) for row in rows] == ids
    facts = [index.metadata(i) for i in ids]
    assert [row["key"] for row in rows] == [f"00000.tar:{fact['key']}" for fact in facts]
    for column in ("caption", "label", "subgroup"):
        assert [row[column] for row in rows] == [fact[column] for fact in facts]
    assert [json.loads(row["tags"]) for row in rows] == [fact["tags"] for fact in facts]

    run = load_run(list_checkpoints(network)[-1])
    transform, mean, std = eval_transform(run.towers.image_size), *map(torch.tensor, (run.towers.mean, run.towers.std))
    pixels = torch.stack([transform(decode(index.image_bytes(i))) for i in ids]) / 255
    with torch.no_grad():
        image = run.towers.module.encode_image((pixels - mean[:, None, None]) / std[:, None, None])
        text = run.towers.module.encode_text(run.towers.tokenizer([fact["caption"] for fact in facts]))
    tau = run.loss.temperatures(normalize(image, dim=1), normalize(text, dim=1))
    assert tau.std(1).min() > 0
    np.testing.assert_allclose(numbers(rows, "tau_image"), tau[0], rtol=1e-4)
    np.testing.assert_allclose(numbers(rows, "tau_text"), tau[1], rtol=1e-4)

    shard = torch.load(list_checkpoints(network)[-1] / "shard-00000-of-00001.pt", weights_only=True)
    log_u = shard["state"]["state.log_u"][:, ids]
    assert 0 < log_u.isinf().sum() < log_u.numel(), "some samples are seen, some are not"
    expected = log_u.masked_fill(log_u.isinf(), torch.nan).numpy()
    np.testing.assert_allclose(numbers(rows, "log_u_image"), expected[0], rtol=1e-6)
    np.testing.assert_allclose(numbers(rows, "log_u_text"), expected[1], rtol=1e-6)


def test_the_page_shows_everything(measured: tuple[list[Row], Page]) -> None:
    rows, page = measured
    assert_self_contained(page)
    sections = ["distribution", "extremes", "frequency", "clusters", "prototypes", "parameters"]
    assert [name for name in page.ids if name != "ambiguity"] == sections
    low, high = (f"{value:.4f}" for value in (numbers(rows, "tau_image").min(), numbers(rows, "tau_image").max()))
    for part in (
        low,
        high,
        f"τ of {SAMPLES} pairs",
        "the number of samples with the same subgroup",
        "64 prototypes",
        "e^-",
    ):
        assert part in page.text, part
    assert sum(tag == "figure" for tag, _ in page.tags) > 4 * 20
    charts = [attributes["alt"] for tag, attributes in page.tags if attributes.get("class", "").startswith("chart")]
    assert len(charts) >= 6
    assert "temperature has none" not in page.text
    assert "could not be read" not in page.text


def test_the_axis_of_equal_parameters_is_readable() -> None:
    """A bias that is still zero: not a range of 1e-12 around it."""
    zeros = Parameter("bias", "", np.zeros(4), (4,))
    svg = base64.b64decode(parameter_chart({"image": [zeros]}).partition(",")[2]).decode()
    assert "1e" not in "".join(re.findall(r"<text[^>]*>([^<]*)<", svg))


@needs_browser
def test_the_page_is_readable_on_a_desk_and_a_phone(measured: tuple[list[Row], Page]) -> None:
    assert_readable({"temperatures": measured[1].html})


def test_other_shards_have_no_ids_and_unreadable_images_are_named(
    network: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [(colour, f"a {colour} thing", colour) for colour in COLOURS]
    (tmp_path / "shards").mkdir()
    write_shard(tmp_path / "shards" / "0.tar", [*rows, ("corrupt", "lost", "red"), ("red", EVIL, "red")])
    out, page = tmp_path / "tau.csv", tmp_path / "page.html"
    given = ["temperature", str(network), "--shards", str(tmp_path / "shards"), "--out", str(out)]
    assert main([*given, "--gallery", str(page), "--columns", "label", "absent", "--frequency-by", "absent"]) == 0
    said = capsys.readouterr()
    assert "left out 1 unreadable images: 0.tar:00006" in said.err
    assert f"{out} (7 rows)" in said.out
    table = rows_of(out)
    assert [row["caption"] for row in table] == [*(f"a {colour} thing" for colour in COLOURS), EVIL]
    assert {(row["id"], row["log_u_image"], row["absent"]) for row in table} == {("", "", "")}
    assert np.isfinite([numbers(table, "tau_image"), numbers(table, "tau_text")]).all()
    html = page.read_text(encoding="utf-8")
    assert "<script" not in html
    shown = Page(html)
    assert_self_contained(shown)
    assert "0.tar:00006" in shown.text
    assert "the samples have no absent" in shown.text


def test_the_runs_own_shards_keep_their_ids(network: Path) -> None:
    run = load_run(network)
    assert [item.id for item in items.shard_pairs(run, "embedded:emoji/train").read([0, 5])] == [0, 5]
    assert items.shard_pairs(run, "embedded:emoji/val").read([3])[0].id is None


def test_a_folder_of_images(network: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "photos"
    (folder / "deep").mkdir(parents=True)
    for name in ("b.png", "deep/a.JPG"):
        Image.new("RGB", (40, 30), COLOURS["red" if name == "b.png" else "blue"]).save(folder / name)
    (folder / "broken.jpg").write_bytes(b"no image")
    (folder / "gone.jpg").symlink_to(tmp_path / "nowhere.jpg")
    (folder / "notes.txt").write_text("no image either")
    out, page = tmp_path / "tau.csv", tmp_path / "page.html"
    assert write_temperatures(str(network), TemperatureSource(images=str(folder)), out, gallery=page) == 2
    assert "left out 2 unreadable images: broken.jpg, gone.jpg" in capsys.readouterr().err
    table = rows_of(out)
    assert [row["key"] for row in table] == ["b.png", "deep/a.JPG"]
    assert {(row["caption"], row["tau_text"], row["id"]) for row in table} == {("", "", "")}
    assert numbers(table, "tau_image")[0] != numbers(table, "tau_image")[1]
    shown = Page(page.read_text(encoding="utf-8"))
    assert "frequency" not in shown.ids
    assert "Lowest τ, image side" in shown.text
    assert "text side" not in shown.text


def test_a_file_of_captions(network: Path, tmp_path: Path) -> None:
    (tmp_path / "captions.txt").write_text("a red apple\n\n  two dogs \na red apple\n", encoding="utf-8")
    out, page = tmp_path / "tau.csv", tmp_path / "page.html"
    assert (
        write_temperatures(str(network), TemperatureSource(captions=str(tmp_path / "captions.txt")), out, gallery=page)
        == 3
    )
    table = rows_of(out)
    assert [(row["key"], row["caption"]) for row in table] == [
        ("1", "a red apple"),
        ("3", "two dogs"),
        ("4", "a red apple"),
    ]
    run = load_run(network)
    with torch.no_grad():
        text = normalize(run.towers.module.encode_text(run.towers.tokenizer(["a red apple", "two dogs"])), dim=1)
    expected = run.loss.temperatures(torch.zeros_like(text), text)[1]
    np.testing.assert_allclose(numbers(table, "tau_text"), expected[[0, 1, 0]], rtol=1e-4)
    assert not any(row["tau_image"] for row in table)
    shown = Page(page.read_text(encoding="utf-8"))
    assert "image side" not in shown.text
    assert shown.text.count("a red apple") == 2 + 2, "once a side's end; twice in its cluster"


def test_a_temperature_a_sample_is_read_by_id(per_sample: Path, tmp_path: Path) -> None:
    out = tmp_path / "tau.csv"
    write_temperatures(str(per_sample), TemperatureSource(), out)
    table = rows_of(out)
    shard = torch.load(list_checkpoints(per_sample)[-1] / "shard-00000-of-00001.pt", weights_only=True)["state"]
    tau = shard["temperature.state.tau"][:, [int(row["id"]) for row in table]]
    assert tau.std() > 0
    np.testing.assert_allclose([numbers(table, "tau_image"), numbers(table, "tau_text")], tau, rtol=1e-6)
    gallery = examples.temperature_gallery(load_run(per_sample), batch=64)
    assert gallery is not None
    np.testing.assert_allclose([gallery.image_tau, gallery.text_tau], tau, rtol=1e-6)


def test_what_tau_goes_with_is_told(network: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def ranks(values: np.ndarray) -> np.ndarray:
        return (values[:, None] > values).sum(1) + 0.5 * (values[:, None] == values).sum(1)

    write_temperatures(
        str(network), TemperatureSource(), tmp_path / "tau.csv", columns=["subgroup"], gallery=tmp_path / "page.html",
        frequency_by="subgroup",
    )  # fmt: skip
    rows = rows_of(tmp_path / "tau.csv")
    groups = [row["subgroup"] for row in rows]
    often = np.array([groups.count(group) for group in groups])
    expected = [np.corrcoef(ranks(often), ranks(numbers(rows, f"tau_{side}")))[0, 1] for side in ("image", "text")]
    told = next(line for line in capsys.readouterr().err.splitlines() if "its subgroup" in line)
    found = [float(word) for word in re.findall(r"(?:image|text) ([+-]\d\.\d\d)", told)]
    np.testing.assert_allclose(found, expected, atol=0.006)


def test_one_temperature_for_all_is_said(tmp_path: Path) -> None:
    run = trained(tmp_path, "name=one", 'loss={name="sogclr", temperature=0.06}', "train.stop_after_steps=1")
    write_temperatures(str(run), TemperatureSource(), tmp_path / "tau.csv", gallery=tmp_path / "page.html")
    assert {row["tau_image"] for row in rows_of(tmp_path / "tau.csv")} == {"0.06"}
    page = Page((tmp_path / "page.html").read_text(encoding="utf-8"))
    assert page.ids == ["distribution"]
    assert "the same temperature" in page.text


def test_a_network_without_prototypes_says_so(tmp_path: Path) -> None:
    learns = 'loss={name="disttempnet-v1", tau_start="epoch", tau_lr=0.1}'
    run = trained(tmp_path, "name=mlp", learns, "train.stop_after_steps=2")
    write_temperatures(str(run), TemperatureSource(), tmp_path / "tau.csv", gallery=tmp_path / "page.html")
    page = Page((tmp_path / "page.html").read_text(encoding="utf-8"))
    assert "clusters" in page.ids
    assert "parameters" in page.ids
    assert "prototypes" not in page.ids
    assert "Prototypes among the features are not shown: the temperature of this run has none." in page.text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--out", "tau.txt"], "tau.txt: the table must be a .csv or a .parquet file"),
        (["--out", "blank.txt/new/tau.csv"], "blank.txt/new/tau.csv: cannot be written: "),
        (["--gallery", "blank.txt/page.html"], "blank.txt/page.html: cannot be written: "),
        (["--gallery", "empty"], "empty: cannot be written: it is a folder"),
        (["--columns", "caption"], "--columns caption: the table has a column of that name already"),
        (["--images", "none"], "none: no such folder of images"),
        (["--images", "empty"], "empty: no images in it (jpeg, jpg, png, webp)"),
        (["--images", "broken"], "broken: none of its 1 images can be decoded"),
        (["--captions", "none.txt"], "none.txt: captions cannot be read: No such file or directory"),
        (["--captions", "/dev/zero"], "/dev/zero: captions cannot be read: not a regular file"),
        (["--captions", "pipe"], "pipe: captions cannot be read: not a regular file"),
        (["--captions", "blank.txt"], "blank.txt: no captions in it"),
        (["--shards", "none"], "none: no such folder"),
    ],
)
def test_what_a_user_can_fix_is_one_line(
    arguments: list[str],
    message: str,
    network: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    for folder in ("empty", "broken"):
        (tmp_path / folder).mkdir()
    (tmp_path / "broken" / "a.jpg").write_bytes(b"no image")
    (tmp_path / "blank.txt").write_text("\n \n")
    os.mkfifo(tmp_path / "pipe")
    before = sorted(tmp_path.rglob("*"))
    assert main(["temperature", str(network), *arguments]) == 2
    error = capsys.readouterr().err.strip()
    assert message in error
    assert "\n" not in error
    assert sorted(tmp_path.rglob("*")) == before, "a refused command leaves nothing behind"


@pytest.mark.parametrize(
    "source",
    [TemperatureSource(images="x"), TemperatureSource(captions="x"), TemperatureSource(shards="embedded:emoji/val")],
)
def test_only_training_samples_have_a_temperature_of_their_own(
    source: TemperatureSource, per_sample: Path, tmp_path: Path
) -> None:
    (tmp_path / "x").mkdir()
    with pytest.raises(UserError, match="objective isogclr has temperatures of its training samples only"):
        write_temperatures(str(per_sample), source, tmp_path / "tau.csv")


def test_objective_without_temperature(network: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = load_run(network)
    monkeypatch.setattr(run.loss, "temperatures", lambda image, text, ids=None: None)
    with pytest.raises(UserError, match="objective disttempnet-v1 has no temperature"):
        measure.refuse_without_temperatures(run, training=True)


def test_other_training_data_is_refused(network: Path) -> None:
    run = load_run(network)
    changed = type(run)(**{**vars(run), "index_digest": "0123"})
    with pytest.raises(UserError, match="not the samples that network was trained on"):
        items.training_pairs(changed)


def test_parquet_without_pyarrow(network: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(UserError, match=r"pip install 'disttempnet\[parquet\]'"):
        write_temperatures(str(network), TemperatureSource(), tmp_path / "tau.parquet")


@pytest.mark.skipif(importlib.util.find_spec("pyarrow") is None, reason="pyarrow is not installed")
def test_parquet_holds_what_csv_holds(network: Path, measured: tuple[list[Row], Page], tmp_path: Path) -> None:
    from pyarrow import parquet

    out = tmp_path / "tau.parquet"
    write_temperatures(str(network), TemperatureSource(), out, columns=["label", "subgroup", "tags"], batch=20)
    table = parquet.read_table(out).to_pylist()
    buffer = io.StringIO()
    for one, row in zip(table, measured[0], strict=True):
        for key, value in one.items():
            shown = f"{value:.7g}" if isinstance(value, float) else "" if value is None else str(value)
            print(shown == row[key], file=buffer)
    assert set(buffer.getvalue().split()) == {"True"}


def measured_here(run_folder: str) -> list[np.ndarray]:
    run = load_run(run_folder)
    chunks = measure.measure_temperatures(run, items.training_pairs(run), device=torch.device("cpu"), batch=20)
    return [np.concatenate([chunk.tau, chunk.log_u]) for chunk in chunks]


def test_two_processes_measure_the_same(gloo: Pools, network: Path) -> None:
    expected = np.concatenate(measured_here(str(network)), axis=1)
    for chunks in gloo(2, measured_here, str(network)):
        np.testing.assert_allclose(np.concatenate(chunks, axis=1), expected, rtol=1e-5)


def test_the_table_lies_in_the_run_unless_a_place_is_named(network: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(network.parent)
    Path("captions.txt").write_text("a red apple\n", encoding="utf-8")
    assert main(["temperature", network.name, "--captions", "captions.txt"]) == 0
    assert len(rows_of(network / "temperatures.csv")) == 1
    assert not Path("temperatures.csv").exists()
