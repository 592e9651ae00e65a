"""All forty tasks in their real formats, scored, against arithmetic done by hand; and what must change no number."""

from __future__ import annotations

from pathlib import Path

import pytest

from disttempnet.evaluation.results.records import TaskRecord
from disttempnet.evaluation.tasks import Task, all_tasks
from tests.evaluation.dataroot import EXPECTED, SAMPLES, write_data_root
from tests.evaluation.toy import evaluate_into
from tests.gloo import Pools

ONE_OF_EACH = [
    "vtab/dtd",
    *(key for key in EXPECTED if key.startswith(("wilds/", "fairness/", "retrieval/", "misc/")) and "utk" not in key),
]
CLASSIFICATION = {"acc1", "acc5", "mean_per_class_recall"}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("root")
    write_data_root(folder)
    return folder


def tasks_below_root() -> list[Task]:
    return [task for task in all_tasks().values() if task.below_root]


def evaluate_root(root: Path, out: Path, names: list[str] | None = None, **how: object) -> dict[str, TaskRecord]:
    """Records by task; every rank calls this."""
    tasks = [task for task in tasks_below_root() if names is None or task.name in names]
    return evaluate_into(out, root, tasks, **how)  # type: ignore[arg-type]


def numbers(root: Path, out: Path, names: list[str] | None = None, **how: object) -> dict[str, tuple]:
    """What may not depend on how the work is done."""
    records = evaluate_root(root, out, names, **how)
    return {key: (record.metrics, record.samples, record.complete, record.error) for key, record in records.items()}


@pytest.fixture(scope="module")
def records(root: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, TaskRecord]:
    return evaluate_root(root, tmp_path_factory.mktemp("out"))


def test_there_are_forty_tasks_and_all_are_complete(records: dict[str, TaskRecord]) -> None:
    assert len(EXPECTED) == 40
    assert records.keys() == EXPECTED.keys()
    assert {key: record.error for key, record in records.items() if record.error} == {}
    assert {key: record.samples for key, record in records.items()} == SAMPLES
    assert all(record.complete for record in records.values())


@pytest.mark.parametrize("key", EXPECTED)
def test_scores_by_hand(key: str, records: dict[str, TaskRecord]) -> None:
    found, expected = records[key].metrics, EXPECTED[key]
    assert {name: found[name] for name in expected} == pytest.approx(expected, abs=1e-6)


def test_a_classification_task_has_these_metrics_and_no_others(records: dict[str, TaskRecord]) -> None:
    assert set(records["vtab/dtd"].metrics) == CLASSIFICATION | {"main_metric"}


@pytest.mark.filterwarnings("ignore:This DataLoader will create", "ignore:.*fork.*:DeprecationWarning")
@pytest.mark.parametrize("how", [{"batch": 1}, {"batch": 5}, {"batch": 3, "workers": 3}])
def test_batches_and_workers_change_nothing(how: dict, root: Path, tmp_path: Path) -> None:
    """Three workers are more than most of these tasks have shards."""
    assert numbers(root, tmp_path / "b", **how) == numbers(root, tmp_path / "a")


@pytest.mark.parametrize("ranks", [2, 4])
def test_world_size_changes_nothing(ranks: int, root: Path, tmp_path: Path, gloo: Pools) -> None:
    alone = numbers(root, tmp_path / "one", ONE_OF_EACH, batch=2)
    assert alone.keys() == set(ONE_OF_EACH)
    assert gloo(ranks, numbers, root, tmp_path / "many", ONE_OF_EACH, batch=2) == [alone] * ranks
