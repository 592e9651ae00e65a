"""Tasks `folder:PATH` for tests: images written, data read, scores of towers that read colours."""

from __future__ import annotations

import pickle
from pathlib import Path

from disttempnet.evaluation import evaluate
from disttempnet.evaluation.datasets.open import load_task
from disttempnet.evaluation.tasks import TaskData, find_task
from tests.evaluation.formats import picture
from tests.evaluation.toy import meaning_towers


def loaded(root: Path) -> TaskData:
    return load_task(find_task(f"folder:{root}"))


def scores_of(root: Path) -> dict[str, float]:
    return evaluate(meaning_towers(), [f"folder:{root}"], device="cpu")[f"folder:{root}"].metrics


def put(path: Path, colour: str = "red") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(picture(colour, "jpg" if path.suffix.lower() in (".jpg", ".jpeg") else "png"))


class PythonTwo(pickle._Pickler):
    """Writes bytes as Python 2 wrote its strings, as CIFAR's files have them."""

    dispatch = dict(pickle._Pickler.dispatch)  # noqa: RUF012

    def save_string(self, data: bytes) -> None:
        self.write(b"T" + len(data).to_bytes(4, "little") + data)

    dispatch[bytes] = save_string


def write_pickle(path: Path, content: object) -> None:
    with path.open("wb") as file:
        PythonTwo(file, protocol=2).dump(content)
