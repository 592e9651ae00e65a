"""Several sources are one: ids one after another, read as often as their weights say, resumable on any world size."""

import json
import pickle
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from disttempnet.config import DataConfig, SourceConfig
from disttempnet.data import EpochPlan, MixedSource, Source, open_index, open_source
from disttempnet.errors import UserError
from tests.data.conftest import png, sample, write_shard
from tests.data.test_epoch_plan import epoch_of, index_of

quick = settings(deadline=None, max_examples=50)
Write = Callable[..., Path]


@st.composite
def mixtures(draw: st.DrawFn) -> MixedSource:
    part = st.lists(st.lists(st.sampled_from([0, 0, 0, 2]), max_size=12), min_size=1, max_size=4)
    parts = draw(st.lists(part, min_size=1, max_size=3))
    weights = [draw(st.sampled_from([0.5, 1.0, 1.0, 1.75, 2.0, 3.4])) for _ in parts]
    # enough usable samples in every part for its weight to mean something
    return MixedSource([index_of([[0, 0, 0], *codes]) for codes in parts], weights)


def times(plan: EpochPlan, epoch: int) -> np.ndarray:
    """How often an epoch reads each id."""
    return np.bincount(epoch_of(plan, epoch).ravel(), minlength=len(plan.source))


@quick
@given(mixtures(), st.integers(0, 99), st.integers(0, 4))
def test_an_epoch_reads_every_sample_as_often_as_its_weight_says(mixed: MixedSource, seed: int, epoch: int) -> None:
    plan = EpochPlan(mixed, 1, 1, seed, "drop", 7)  # batches of one have no tail
    counts = times(plan, epoch)
    assert counts.sum() == counts[mixed.usable].sum()
    for part, weight, first in zip(mixed.parts, mixed.weights, mixed.offsets[:-1], strict=True):
        own = counts[first : first + len(part)][part.status == 0]
        assert set(own.tolist()) <= {int(np.floor(weight)), int(np.ceil(weight))}
        assert own.sum() == int(weight) * len(own) + round((weight - int(weight)) * len(own))


@quick
@given(mixtures(), st.integers(0, 99))
def test_a_part_of_a_source_goes_round_over_epochs(mixed: MixedSource, seed: int) -> None:
    plan = EpochPlan(mixed, 1, 1, seed, "drop", 7)
    total = np.sum([times(plan, epoch) for epoch in range(8)], axis=0)
    for part, first in zip(mixed.parts, mixed.offsets[:-1], strict=True):
        own = total[first : first + len(part)][part.status == 0]
        assert own.max() - own.min() <= 1


@quick
@given(mixtures(), st.integers(0, 2), st.data())
def test_world_sizes_and_resuming_see_the_same_batches(mixed: MixedSource, epoch: int, data: st.DataObject) -> None:
    lanes, batch = data.draw(st.sampled_from([(1, 3), (2, 4), (2, 2)]))
    mixed.weights = tuple(max(weight, 2.0) for weight in mixed.weights)  # enough for a batch
    plan = EpochPlan(mixed, batch, lanes, 5, "wrap", 4)
    batches = epoch_of(plan, epoch)
    for world_size in (1, lanes):
        start = data.draw(st.integers(0, plan.steps - 1))
        for rank in range(world_size):
            resumed = EpochPlan(mixed, batch, lanes, 5, "wrap", 4)
            share = batch // world_size
            for step in range(start, plan.steps):
                own = resumed.local_batch(epoch, step, rank, world_size)
                assert own.tolist() == batches[step, rank * share : (rank + 1) * share].tolist()


@quick
@given(st.lists(st.lists(st.sampled_from([0, 0, 1]), max_size=9), min_size=2, max_size=6), st.data())
def test_weights_of_one_are_the_order_of_one_source(codes: list[list[int]], data: st.DataObject) -> None:
    codes = [[0], *codes]
    cut = data.draw(st.integers(1, len(codes) - 1))
    limit = data.draw(st.integers(0, sum(map(len, codes))))
    whole, mixed = index_of(codes), MixedSource([index_of(codes[:cut]), index_of(codes[cut:])], [1, 1])
    assert mixed.first.tolist() == whole.first.tolist()
    assert [mixed.status_of(sample) for sample in range(len(mixed))] == whole.status.tolist()
    assert mixed.usable.tolist() == whole.usable.tolist()
    assert mixed.usable_counts.tolist() == whole.usable_counts.tolist()
    assert [mixed.usable_in(g).tolist() for g in range(len(codes))] == [
        whole.usable_in(g).tolist() for g in range(len(codes))
    ]
    for epoch in (0, 3):
        plans = [EpochPlan(source, 1, 1, 2024, "wrap", 5, limit) for source in (whole, mixed)]
        assert epoch_of(plans[0], epoch).tolist() == epoch_of(plans[1], epoch).tolist()


def test_the_mixed_order_is_recorded() -> None:
    """Checkpoints resume in the same order in every version of this library and of numpy."""
    mixed = MixedSource([index_of([[0] * 5, [0, 1, 0]]), index_of([[0] * 4, [0] * 2])], [0.5, 1.5])
    plan = EpochPlan(mixed, 4, 2, 2024, "wrap", 4)
    assert plan.samples == 4 + 6 + 3
    assert epoch_of(plan, 0).tolist() == [[0, 13, 10, 9], [12, 1, 8, 11], [3, 2, 8, 9], [13, 0, 10, 12]]
    assert epoch_of(plan, 1).tolist() == [[13, 5, 8, 9], [12, 7, 10, 4], [12, 13, 11, 11], [12, 0, 5, 13]]


def test_a_part_reads_few_shards() -> None:
    """A tenth of 40 shards is 4 of them, or 5 with two cut ones: not a tenth of each."""
    mixed = MixedSource([index_of([[0] * 10] * 40)], [0.1])
    plan = EpochPlan(mixed, 4, 2, 1, "drop")
    groups = [np.unique(epoch_of(plan, epoch) // 10) for epoch in range(10)]
    assert all(len(found) <= 5 for found in groups)
    assert len(np.unique(np.concatenate(groups))) == 40
    assert np.diff(groups[0]).max() > 1  # they are not neighbours


def test_a_weight_that_reads_nothing() -> None:
    mixed = MixedSource([index_of([[0] * 100]), index_of([[0] * 10])], [1, 0.01])
    with pytest.raises(UserError, match=r"data.train: a weight of 0.01 reads none of the 10 samples"):
        EpochPlan(mixed, 4, 2, 1)


@pytest.fixture
def two(tmp_path: Path) -> list[SourceConfig]:
    """Two folders; the keys of the second repeat those of the first."""
    sources = []
    for name, shift in (("a", 0), ("b", 100)):
        (tmp_path / name).mkdir()
        for shard in range(2):
            members = {f"{n:03d}": sample(shift + 3 * shard + n) for n in range(3)}
            write_shard(tmp_path / name / f"{shard}.tar", members)
        sources.append(SourceConfig(path=str(tmp_path / name)))
    return sources


def with_weights(sources: list[SourceConfig], *weights: float) -> Source:
    chosen = [SourceConfig(path=s.path, weight=w) for s, w in zip(sources, weights, strict=True)]
    return open_source(chosen, progress=False)


def test_reads_both_with_keys_that_repeat(two: list[SourceConfig]) -> None:
    mixed = with_weights(two, 1, 2)
    numbers = [*range(6), *range(100, 106)]
    for copy in (mixed, pickle.loads(pickle.dumps(mixed))):
        assert [copy.captions(n)[0] for n in range(12)] == [f"caption {number}" for number in numbers]
        assert [copy.image_bytes(n) for n in range(12)] == [png(number) for number in numbers]
        assert [copy.metadata(n) for n in range(12)] == [{"number": number} for number in numbers]
        assert [copy.name(n) for n in (0, 5, 6, 11)] == ["0.tar:000", "1.tar:002", "0.tar:000", "1.tar:002"]
        copy.close()
    for outside in (-1, 12):
        with pytest.raises(IndexError):
            mixed.captions(outside)


def test_the_digest_tells_mixtures_apart(two: list[SourceConfig]) -> None:
    alone = open_index(two[0].path, progress=False)
    assert with_weights(two[:1], 1).digest == alone.digest
    digests = [
        with_weights(two, 1, 1).digest,
        with_weights(two[::-1], 1, 1).digest,
        with_weights(two, 1, 2).digest,
        with_weights(two[:1], 2).digest,
    ]
    assert len({*digests, alone.digest}) == 5
    assert digests == [
        with_weights(two, 1, 1).digest,
        with_weights(two[::-1], 1, 1).digest,
        with_weights(two, 1, 2).digest,
        with_weights(two[:1], 2).digest,
    ]


def test_problems_say_which_source(two: list[SourceConfig]) -> None:
    write_shard(Path(two[1].path) / "1.tar", {"x": {"txt": b"no image"}, "y": sample(1)})
    assert with_weights(two, 1, 1).problems() == f"{two[1].path}: 1 samples left out, no image: 1.tar:x"


def test_configs_name_several_sources(two: list[SourceConfig]) -> None:
    a, b = (source.path for source in two)
    joined = DataConfig(train=f"{a}::{b}", global_batch=8)
    listed = DataConfig.model_validate(json.loads(json.dumps({"train": [{"path": a}, {"path": b}], "global_batch": 8})))
    assert joined.sources == listed.sources == tuple(two)
    assert len(open_source(joined.sources, progress=False)) == 12
    for empty in ("", []):
        with pytest.raises(ValueError, match="must name a source"):
            DataConfig.model_validate({"train": empty, "global_batch": 8})
