"""Labels, metadata, class names and templates of classification data."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest

from disttempnet.errors import UserError
from disttempnet.evaluation.datasets.open import load_task
from disttempnet.evaluation.tasks import find_task
from tests.evaluation.colours import COLOURS
from tests.evaluation.formats import labelled, npy, picture, write_wds

SIX = tuple(COLOURS)


def faces(root: Path, names: list[str], templates: list[str]) -> None:
    samples = [{"jpg": picture("red", "jpg"), "npy": npy((0, 0, 0, 0))}]
    write_wds(root, "fairness/fairface", samples, classes=names, templates=templates)


@pytest.mark.parametrize(
    ("names", "templates", "message"),
    [
        (["race:a", "b"], ["race:{c}"], "'b' begins with none of race, gender, age, toxic and a colon"),
        (["race:a"], ["race:{c}"], "no class names or no templates that begin with 'gender:'"),
        (["race:a"], ["race:it"], "template 'race:it' has no {c}"),
    ],
)
def test_lines_about_faces(names: list[str], templates: list[str], message: str, tmp_path: Path) -> None:
    faces(tmp_path, names, templates)
    with pytest.raises(UserError, match=message):
        load_task(find_task("fairness/fairface"), tmp_path)


@pytest.mark.parametrize(
    ("metadata", "reason"),
    [
        (None, "no metadata"),
        (np.array([1]), "metadata of 1 columns, 2 needed: region, year"),
        (np.array([-1, 3]), "metadata is not a row of group numbers"),
        (np.array([np.nan, 3]), "metadata is not a row of group numbers"),
        (np.array([2**40, 3]), "metadata is not a row of group numbers"),
        (np.array(["1", "3"]), "its metadata is not a row of numbers but <U1"),
        (b"", "its metadata cannot be read: No data left in file"),
        (b"\x93NUMPY\x01\x00junk", "its metadata cannot be read: "),
    ],
)
def test_metadata_that_cannot_be_used(metadata: np.ndarray | bytes | None, reason: str, tmp_path: Path) -> None:
    samples = labelled([("red", "red", 0, 16), ("green", "green", 5, 17, 99)], SIX)
    if metadata is None:
        del samples[0]["npy"]
    elif isinstance(metadata, bytes):
        samples[0]["npy"] = metadata
    else:
        file = io.BytesIO()
        np.save(file, metadata)
        samples[0]["npy"] = file.getvalue()
    write_wds(tmp_path, "wilds/fmow", samples, classes=SIX, templates=["{c}"])
    data = load_task(find_task("wilds/fmow"), tmp_path)
    assert len(data.broken) == 1, "counted, and the others are measured"
    assert data.broken[0].startswith(f"0.tar/s0000000: {reason}")
    assert data.metadata.tolist() == [[5, 17]], "columns behind those that are asked for are of no concern"


def test_pickled_metadata_is_not_opened(tmp_path: Path) -> None:
    samples = labelled([("red", "red", 0, 16)], SIX)
    file = io.BytesIO()
    np.save(file, np.array([{"region": 1}], dtype=object), allow_pickle=True)
    samples[0]["npy"] = file.getvalue()
    write_wds(tmp_path, "wilds/fmow", samples, classes=SIX, templates=["{c}"])
    assert "allow_pickle" in load_task(find_task("wilds/fmow"), tmp_path).broken[0]
