"""A built split is found by its name, in the cache or in a root, and read as training data."""

from pathlib import Path

import pyarrow.parquet as pq
import pytest

from disttempnet.config import SourceConfig
from disttempnet.data import open_source
from disttempnet.data.icons.built import built_split, local_path
from disttempnet.errors import UserError


def test_where_it_is_looked_for(built: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DISTTEMPNET_CACHE", str(tmp_path))
    with pytest.raises(UserError, match=r"built:icons/val: the icons are not built in .*: `disttempnet data icons`"):
        built_split("icons/val", tmp_path)
    (tmp_path / "root").mkdir()
    (tmp_path / "root" / "icons").symlink_to(built)
    assert built_split("icons/val", tmp_path / "root") == tmp_path / "root" / "icons" / "val"
    assert built_split("icons/val", built) == built / "val"
    (tmp_path / "icons").symlink_to(built)
    assert built_split("icons/val_concepts") == tmp_path / "icons" / "val_concepts"
    assert local_path("built:icons/train") == tmp_path / "icons" / "train"
    with pytest.raises(UserError, match=r"unknown data set 'built:icons/test'.*built:icons/train"):
        built_split("icons/test")


def test_the_name_and_the_folder_are_the_same_source(
    built: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DISTTEMPNET_CACHE", str(tmp_path))
    (tmp_path / "icons").symlink_to(built)
    rows = pq.read_table(built / "train").to_pylist()
    by_name, by_folder = (
        open_source((SourceConfig(path=path),), progress=False) for path in ("built:icons/train", str(built / "train"))
    )
    (built / "train" / "parquet.index").unlink()
    assert by_name.digest == by_folder.digest
    assert len(by_name) == len(rows) == 170
    for sample in (0, 77, 169):
        assert by_name.captions(sample) == (rows[sample]["caption"],)
        assert by_name.image_bytes(sample) == rows[sample]["image"]["bytes"]
        facts = by_name.metadata(sample)
        assert facts is not None
        assert facts["frequency"] == rows[sample]["frequency"]
