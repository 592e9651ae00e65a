"""Tasks on built data: classes, captions and groups are what the rows say."""

from pathlib import Path

import pyarrow.parquet as pq
import pytest

from disttempnet.data.icons.build import build_icons
from disttempnet.errors import UserError
from disttempnet.evaluation.datasets.open import has_data, load_task
from disttempnet.evaluation.tasks import find_task
from tests.data.icons.scenario import release, write_package


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("root")
    package = write_package(folder / "package")
    build_icons(folder / "icons", package, release=release(package), progress=False)
    return folder


def test_artists(root: Path) -> None:
    data = load_task(find_task("icons-artists"), root)
    rows = pq.read_table(root / "icons" / "val").to_pylist()
    assert data.class_names == tuple(sorted({row["concept"] for row in rows}))
    assert [data.class_names[label] for label in data.labels] == [row["concept"] for row in rows]
    assert [sample.captions for sample in data.samples] == [(row["concept"],) for row in rows]
    assert list(data.frequency) == [row["frequency"] for row in rows]
    # at most 3 training pairs: tail (2); at most 20: middle (1)
    assert [(f, t) for f, t in zip(data.frequency, data.third, strict=True) if (f <= 3) != (t == 2)] == []
    assert set(data.third) == {1, 2}
    assert data.samples[0].image().size == (48, 48)


def test_concepts(root: Path) -> None:
    data = load_task(find_task("icons-concepts"), root)
    assert len(data.samples) == 44
    assert len(data.class_names) == 4
    assert data.third == ()


def test_bounds_belong_to_the_rarer_group(root: Path) -> None:
    known = sorted({row["frequency"] for row in pq.read_table(root / "icons" / "val").to_pylist()})
    task = find_task("icons-artists").model_copy(update={"frequency_bounds": (known[0], known[2])})
    data = load_task(task, root)
    groups = dict(zip(data.frequency, data.third, strict=True))
    assert [groups[frequency] for frequency in known] == [2, 1, 1, *[0] * (len(known) - 3)]
    assert len(known) > 3


def test_unbuilt_is_one_line_with_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DISTTEMPNET_CACHE", str(tmp_path))
    task = find_task("icons-artists")
    assert not has_data(task)
    with pytest.raises(UserError, match="`disttempnet data icons` builds them once"):
        load_task(task)


def test_a_column_that_is_missing_is_named(root: Path) -> None:
    task = find_task("icons-artists").model_copy(update={"label_key": "species"})
    with pytest.raises(UserError, match=r"icons/val: no column 'species': build it anew"):
        load_task(task, root)
