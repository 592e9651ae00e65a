"""Training data of a config: limit and draft, as it says."""

import pytest

from disttempnet.data import (
    EpochPlan,
)
from disttempnet.errors import UserError
from tests.data.training_data import Write, data_of


def test_draft_is_what_the_config_says(shards: Write) -> None:
    folder = shards(4)
    assert [data_of(folder, draft=draft).dataset.transform.draft for draft in (False, True)] == [False, True]
    with pytest.raises(UserError, match=r"data\.draft has no effect"):
        data_of(folder, transform="emoji", draft=True)


def test_limit_takes_the_first_usable_samples(shards: Write) -> None:
    data = data_of(shards(5, 6, changes={1: {"txt": b"no image"}}), limit=7)
    ids = [sample for batch in data.loader_from(2) for sample in batch.ids.tolist()]
    assert set(ids) == {0, 2, 3, 4, 5, 6, 7}
    assert isinstance(data.plan, EpochPlan)
