"""The index gives every sample one id for ever, reads it back, and names every fault of the shards."""

import json
import pickle
import tarfile

import numpy as np

from disttempnet.data import (
    ShardIndex,
    open_index,
)
from tests.data.conftest import png
from tests.data.shards.refusals import Write


def test_reads_back_what_tarfile_reads() -> None:
    index = open_index("embedded:emoji/val", progress=False)
    sizes, number = 0, 0
    for name in ("00000.tar", "00001.tar"):
        with tarfile.open(index.folder / name) as shard:
            contents = [(member.name, shard.extractfile(member).read()) for member in shard]  # type: ignore[union-attr]
        for (image_name, image), (_, caption), (_, text) in zip(*[iter(contents)] * 3, strict=True):
            assert index.image_bytes(number) == image
            assert index.captions(number)[0] == caption.decode()
            assert index.metadata(number) == json.loads(text)
            assert index.name(number) == f"{name}:{image_name.removesuffix('.webp')}"
            sizes, number = sizes + len(image), number + 1
    assert number == len(index) == 1172
    assert sizes == int(index.spans[:, 0, 1].sum())
    assert (index.status == 0).all()
    assert index.problems() == ""


def test_ids_digest_and_file_are_stable(shards: Write) -> None:
    folder = shards(3, 2)
    first = open_index(str(folder), progress=False)
    content, digest = first.path.read_bytes(), first.digest
    again = open_index(str(folder), progress=False)
    assert again.path.read_bytes() == content  # the second time nothing is written
    assert again.digest == digest
    first.path.unlink()
    assert open_index(str(folder), progress=False).digest == digest
    assert again.first.tolist() == [0, 3, 5]
    assert [again.captions(n)[0] for n in range(5)] == [f"caption {n}" for n in range(5)]
    assert len(content) <= 33 * 5 + 2048
    copy = pickle.loads(pickle.dumps(again))
    assert isinstance(copy, ShardIndex)
    assert copy.digest == digest
    assert copy.captions(4)[0] == "caption 4"


def test_digest_tells_data_sets_apart(shards: Write) -> None:
    folder = shards(3, 2)
    whole = open_index(str(folder), progress=False)
    part = open_index(f"{folder}/{{00000..00000}}.tar", progress=False)
    assert whole.path != part.path
    assert len(part) == 3
    assert whole.digest != part.digest


def test_unusable_samples_keep_their_ids_and_are_named(shards: Write) -> None:
    changes = {
        1: {"txt": b"no image"},
        2: {"png": png(2)},
        3: {"png": png(3), "txt": b" \n"},
        4: {"png": png(4), "txt": b"\xff\xfe"},
        5: {"png": b"", "txt": b"empty image"},
        6: {"png": png(6), "txt": b""},
    }
    index = open_index(str(shards(3, 5, changes=changes)), progress=False)
    assert len(index) == 8
    assert index.usable.tolist() == [0, 7]
    assert index.usable_counts.tolist() == [1, 1]
    assert index.usable_in(1).tolist() == [7]
    assert index.captions(7)[0] == "caption 7"
    problems = index.problems()
    for line in (
        "2 samples left out, no image: 00000.tar:000000001, 00001.tar:000000005",
        "1 samples left out, no caption: 00000.tar:000000002",
        "2 samples left out, empty caption: 00001.tar:000000003, 00001.tar:000000006",
        "1 samples left out, caption is not UTF-8: 00001.tar:000000004",
    ):
        assert line in problems


def test_a_name_that_cannot_be_read_is_the_id(shards: Write) -> None:
    """Messages name samples; a header that is damaged by then must not hide what they say."""
    index = open_index(str(shards(3, 2)), progress=False)
    assert index.captions(3) == ("caption 3",)  # now the shard is open
    with (index.folder / "00001.tar").open("r+b") as file:
        file.write(b"x" * 512)
    assert index.name(3) == "00001.tar:sample 3"


def test_columns_are_small_and_typed(shards: Write) -> None:
    index = open_index(str(shards(2)), progress=False)
    assert (index.start.dtype, index.spans.dtype, index.status.dtype) == (np.int64, np.uint32, np.uint8)
    assert sum(column.nbytes for column in (index.start, index.spans, index.status)) == 33 * 2
