"""The rows of tasks.toml, and data that ships."""

from __future__ import annotations

import pytest

from disttempnet.errors import UserError
from disttempnet.evaluation.datasets.open import load_task
from disttempnet.evaluation.tasks import all_tasks, choose_tasks, find_task


def test_unknown_task_names_the_nearest() -> None:
    with pytest.raises(UserError, match=r"unknown task 'emoji-rendering'\. Did you mean 'emoji-renderings'"):
        find_task("emoji-rendering")


def test_shipped_tasks_have_the_promised_sizes() -> None:
    ship = {name: task for name, task in all_tasks().items() if not task.below_root and not task.is_built}
    sizes = {name: load_task(task) for name, task in ship.items()}
    assert {name: (len(data.samples), len(data.class_names)) for name, data in sizes.items()} == {
        "emoji-renderings": (1172, 1914),
        "emoji-renderings-tune": (615, 1914),
        "emoji-renderings-test": (557, 1914),
        "emoji-concepts": (332, 83),
        "scenes": (1200, 200),
        "scenes-test": (4000, 200),
    }
    thirds = {name: [data.third.count(third) for third in range(3)] for name, data in sizes.items()}
    assert thirds["scenes"] == [67 * 6, 66 * 6, 67 * 6]
    assert thirds["scenes-test"] == [67 * 20, 66 * 20, 67 * 20]
    for name, counts in thirds.items():  # groups stay whole: near thirds, not exactly
        assert all(abs(count - sum(counts) / 3) < 0.05 * sum(counts) for count in counts), (name, counts)
    for data in sizes.values():
        ranges = [[f for f, t in zip(data.frequency, data.third, strict=True) if t == third] for third in range(3)]
        assert min(ranges[0]) >= max(ranges[1]) >= min(ranges[1]) >= max(ranges[2])


def test_halves_have_no_concept_in_common_and_all_together() -> None:
    whole, tune, test = (load_task(find_task(f"emoji-renderings{half}")) for half in ("", "-tune", "-test"))
    labels = [{sample.label for sample in data.samples} for data in (whole, tune, test)]
    assert labels[1] | labels[2] == labels[0]
    assert not labels[1] & labels[2]
    assert {s.key for s in tune.samples} | {s.key for s in test.samples} == {s.key for s in whole.samples}
    assert [tune.class_names[label] for label in tune.labels] == [sample.label for sample in tune.samples]


WINO = "misc/winogavil"


def test_rows_are_those_of_datacomp() -> None:
    tasks = [task for task in all_tasks().values() if task.below_root]
    assert len(tasks) == 40
    assert sum(task.size for task in tasks if task.main) == 697_369
    assert [task.name for task in tasks if not task.main] == ["fairness/fairface", "fairness/utkface"]
    assert {tag: len(choose_tasks(tags=[tag])) for tag in ("imagenet", "shifts", "vtab", "retrieval", "fairness")} == {
        "imagenet": 7,
        "shifts": 6,
        "vtab": 13,
        "retrieval": 3,
        "fairness": 4,
    }
    with pytest.raises(UserError, match=r"unknown tag 'imagenets'\. Did you mean 'imagenet'"):
        choose_tasks(tags=["imagenets"])
    assert [task.name for task in choose_tasks(["cifar10", WINO], ["retrieval"])][:2] == ["cifar10", WINO]
    assert len(choose_tasks(["cifar10", WINO], ["retrieval"])) == 4
