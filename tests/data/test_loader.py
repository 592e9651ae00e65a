"""Samples and batches: reproducible whatever loads them, and broken ones are replaced, named and counted."""

import json
import os
import pickle
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Container
from itertools import chain
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from disttempnet.config import DataConfig
from disttempnet.data import (
    Batch,
    EpochPlan,
    PairDataset,
    PlanSampler,
    Skip,
    Source,
    UnreadableImage,
    decode,
    eval_transform,
    lost_workers_named,
    make_loader,
    open_index,
    open_training_data,
    train_transform,
)
from disttempnet.errors import UserError
from disttempnet.models import AS_CLIP
from tests.data.conftest import png
from tests.data.pictures import encoded, gradient
from tests.data.test_images import BOMB
from tests.data.training_data import Write, data_of, tokenizer

fork = pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")


def as_evaluated(size: int) -> Callable[[bytes, int], Tensor]:
    """A training transform without augmentation."""
    transform = eval_transform(size)
    return lambda data, seed: transform(decode(data))


def same(first: Batch, second: Batch) -> bool:
    tensors = ((getattr(first, n), getattr(second, n)) for n in ("images", "tokens", "ids"))
    return all(torch.equal(a, b) for a, b in tensors) and first.skipped == second.skipped


def test_batches_carry_the_plans_samples(shards: Write) -> None:
    data = data_of(shards(5, 6))
    batches = list(data.loader_from(0))
    assert len(batches) == data.plan.steps == 3
    for step, batch in enumerate(batches):
        assert batch.ids.tolist() == data.plan.batch(0, step).tolist()
        assert torch.equal(batch.tokens, tokenizer([f"caption {n}" for n in batch.ids.tolist()]))
        assert (batch.images.shape, batch.images.dtype) == ((4, 3, 24, 24), torch.uint8)
        assert (batch.ids.dtype, batch.tokens.dtype) == (torch.int64, torch.int64)
        assert batch.skipped == ()


@fork
@pytest.mark.parametrize("workers", [0, 1])
def test_tokens_come_trimmed_to_the_longest_caption_of_a_batch(shards: Write, workers: int) -> None:
    from disttempnet.models import load_model

    towers = load_model("demo-vit-32")
    words = [30 if n == 5 else 12 if n % 9 == 0 else 1 + n % 6 for n in range(24)]
    changes = {n: {"png": png(n), "txt": b"word " * count} for n, count in enumerate(words)}
    config = DataConfig(train=str(shards(24, changes=changes)), global_batch=4, lanes=2, workers=workers)
    lengths = set()
    for batch in open_training_data(config, 5, towers).loader_from(0):
        whole = towers.tokenizer(["word " * words[n] for n in batch.ids.tolist()])
        longest = 2 + max(words[n] for n in batch.ids.tolist())  # start, words, end
        length = next(n for n in (8, 16, 20) if n >= min(longest, 20))  # twenty are all that this tower has
        assert torch.equal(batch.tokens, whole[:, :length])
        assert batch.tokens.is_contiguous()
        lengths.add(length)
    assert {8, 20} <= lengths


def test_image_caption_and_id_belong_together(shards: Write) -> None:
    index = open_index(str(shards(4, 4)), progress=False)
    dataset = PairDataset(index, as_evaluated(7), 0)
    assert len(dataset) == 8
    for number in range(8):
        sample = dataset[0, number]
        assert (sample.id, sample.caption) == (number, f"caption {number}")
        assert sample.image[:, 3, 3].tolist() == [number, 0, 77]


@fork
@pytest.mark.parametrize("workers", [1, 2])
def test_worker_count_changes_nothing(workers: int) -> None:
    options = {"global_batch": 64, "transform": "emoji"}
    alone = data_of("embedded:emoji/val_concepts", **options)
    helped = data_of("embedded:emoji/val_concepts", workers=workers, **options)
    for epoch, start in ((0, 0), (1, 2)):  # workers persist from one to the next
        expected, batches = (list(data.loader_from(epoch, start)) for data in (alone, helped))
        assert len(batches) == 6 - start
        assert all(map(same, batches, expected))


@fork
def test_an_iteration_that_stops_early_leaves_nothing_behind() -> None:
    options = {"global_batch": 32, "transform": "emoji"}
    alone = data_of("embedded:emoji/val_concepts", **options)
    helped = data_of("embedded:emoji/val_concepts", workers=2, **options)
    for _ in helped.loader_from(0):
        break
    assert all(map(same, helped.loader_from(3, 4), alone.loader_from(3, 4)))


def test_world_size_changes_nothing(shards: Write) -> None:
    folder = shards(9, 8)
    whole = list(data_of(folder).loader_from(1))
    parts = [data_of(folder, rank=rank, world_size=2).loader_from(1) for rank in range(2)]
    for batch, (first, second) in zip(whole, zip(*parts, strict=True), strict=True):
        assert torch.equal(batch.images, torch.cat([first.images, second.images]))
        assert torch.equal(batch.ids, torch.cat([first.ids, second.ids]))
    with pytest.raises(UserError, match=r"3 processes cannot share data\.lanes = 2"):
        data_of(folder, world_size=3)


def test_augmentation_depends_on_seed_epoch_and_id_only() -> None:
    index = open_index("embedded:emoji/val_concepts", progress=False)
    dataset, other = (PairDataset(index, train_transform("emoji", 24), seed) for seed in (1, 2))
    view = dataset[3, 7].image
    torch.rand(5)
    dataset[3, 8]
    assert torch.equal(dataset[3, 7].image, view)
    assert torch.equal(pickle.loads(pickle.dumps(dataset))[3, 7].image, view)
    assert not torch.equal(dataset[4, 7].image, view)
    assert not torch.equal(other[3, 7].image, view)
    assert not torch.equal(dataset[3, 8].image, view)


def test_one_of_several_captions_is_drawn_by_seed_epoch_and_id(shards: Write) -> None:
    changes = {
        n: {"png": png(n), "json": json.dumps({"captions": [f"{n}: {word}" for word in "abcde"]}).encode()}
        for n in range(2)
    }
    index = open_index(str(shards(2, changes=changes)), progress=False, caption_key="captions")
    dataset, again, other = (PairDataset(index, as_evaluated(7), seed) for seed in (1, 1, 2))
    epochs = 100  # each of the five is missed by that many fair draws with a chance of (4/5)^100 = 2e-10
    drawn = {n: [dataset[epoch, n].caption for epoch in range(epochs)] for n in range(2)}
    for number, captions in drawn.items():
        assert set(captions) == {f"{number}: {word}" for word in "abcde"}
        assert captions == [again[epoch, number].caption for epoch in range(epochs)]
        assert captions != [other[epoch, number].caption for epoch in range(epochs)]
    assert [text[-1] for text in drawn[0]] != [text[-1] for text in drawn[1]], "each id draws for itself"


def test_loading_leaves_the_global_generator_alone() -> None:
    data = data_of("embedded:emoji/val_concepts", global_batch=64)
    torch.manual_seed(11)
    expected = torch.rand(4)
    torch.manual_seed(11)
    for _ in zip(range(2), data.loader_from(0), strict=False):
        pass
    assert torch.equal(torch.rand(4), expected)


@fork
@pytest.mark.parametrize("workers", [0, 2])
def test_broken_samples_are_replaced_named_and_counted(shards: Write, workers: int) -> None:
    changes = {
        2: {"png": b"garbage" * 30, "txt": b"two"},
        3: {"png": png(3)[:-30], "txt": b"three"},
        7: {"png": b"garbage" * 30, "txt": b"seven"},
        5: {"txt": b"known to the index: never drawn"},
    }
    data, broken = data_of(shards(4, 4, changes=changes), workers=workers, tail="drop", global_batch=2), {2, 3, 7}
    batches = list(data.loader_from(0))
    assert len(batches) == 3  # 7 usable as far as the index knows
    named, drawn = [], []
    for step, batch in enumerate(batches):
        named += [": ".join(skip[:2]) for skip in batch.skipped]
        planned = data.plan.batch(0, step).tolist()
        replaced = [replacement(data.plan, step, slot, broken) for slot in range(2)]
        assert batch.ids.tolist() == [found for found, _ in replaced]
        drawn += [name for _, tried in replaced for name in tried]
        assert [bytes(text).decode().strip() for text in batch.tokens.tolist()] == [f"caption {n}" for n in batch.ids]
        assert [n for n in planned if n not in broken] == [n for n in batch.ids.tolist() if n in planned]
    texts = {
        2: "00000.tar:000000002: cannot identify image",
        3: "00000.tar:000000003: cannot decode image",
        7: "00001.tar:000000007: cannot identify image",
    }
    assert len(named) == len(drawn) >= 2
    assert all(name.startswith(texts[sample]) for name, sample in zip(named, drawn, strict=True))


def replacement(plan: EpochPlan, step: int, slot: int, broken: Container[int], epoch: int = 0) -> tuple[int, list[int]]:
    """The first readable id for a slot, and those that were tried before."""
    tried = []
    for sample in chain([int(plan.batch(epoch, step)[slot])], plan.stand_ins(epoch, step, slot)):
        if sample not in broken:
            return sample, tried
        tried.append(sample)
    raise AssertionError("there is no end of stand-ins")


class Numbers(Source):
    """Samples without content, some of which are lost; an image is its id in eight bytes."""

    where, digest = "numbers", "0"

    def __init__(self, samples: int, lost: Container[int]) -> None:
        self.status, self.first = np.zeros(samples, np.uint8), np.append(np.arange(0, samples, 1000), samples)
        self.lost = lost

    def image_bytes(self, sample: int) -> bytes:
        if sample in self.lost:
            raise UnreadableImage("No such file or directory: it")
        return sample.to_bytes(8, "little")

    def captions(self, sample: int) -> tuple[str, ...]:
        return (f"caption {sample}",)

    def name(self, sample: int) -> str:
        return f"numbers:{sample}"

    def problems(self, names: int = 3) -> str:
        return ""

    def reason(self, sample: int) -> str:
        return ""

    def hashes(self) -> NDArray[np.uint64]:
        return np.arange(len(self), dtype=np.uint64)


def batches_of_numbers(source: Source, plan: EpochPlan, epoch: int, workers: int = 0, ranks: int = 1) -> list[Batch]:
    """The global batches of an epoch, put together from those of the ranks."""
    pairs = PairDataset(source, lambda data, seed: torch.tensor([*data], dtype=torch.uint8), 0)
    parts = []
    for rank in range(ranks):
        sampler = PlanSampler(plan, rank, ranks)
        sampler.seek(epoch)
        parts.append([*make_loader(pairs, sampler, tokenizer, workers)])
    return [
        Batch(
            torch.cat([one.images for one in step]),
            torch.cat([one.tokens for one in step]),
            torch.cat([one.ids for one in step]),
            tuple(skip for one in step for skip in one.skipped),
        )
        for step in zip(*parts, strict=True)
    ]


def test_a_lost_folder_is_replaced_from_all_over_the_epoch() -> None:
    """90 files in a row of 2,000: each batch of 128 is others' samples, hardly any stands in twice in an epoch."""
    lost = range(1000, 1090)
    source = Numbers(2000, lost)
    plan = EpochPlan(source, 128, 8, 1)
    batches = batches_of_numbers(source, plan, 1)
    stood_in: list[int] = []
    for step, batch in enumerate(batches):
        planned, ids = plan.batch(1, step).tolist(), batch.ids.tolist()
        assert max(Counter(ids).values()) == 1, "no id twice in a batch"
        assert [n for n in ids if n in planned] == [n for n in planned if n not in lost]
        stood_in += [n for n in ids if n not in planned]
    assert {skip.id for batch in batches for skip in batch.skipped} == set(lost), "each is named"
    places = sum(n in lost for step in range(plan.steps) for n in plan.batch(1, step).tolist())
    assert len(stood_in) == places
    assert max(Counter(stood_in).values()) <= 2
    assert len(set(stood_in)) >= 0.9 * places
    assert np.histogram(stood_in, 4, (0, 2000))[0].min() > places / 10, "from all over"


@fork
def test_stand_ins_do_not_depend_on_world_size_and_workers() -> None:
    source = Numbers(300, {*range(20, 90), 150, 299})
    plan = EpochPlan(source, 32, 4, 3)
    whole = batches_of_numbers(source, plan, 2)
    for workers, ranks in ((0, 2), (0, 4), (2, 1)):
        assert all(map(same, batches_of_numbers(source, plan, 2, workers, ranks), whole)), (workers, ranks)
    sampler = PlanSampler(EpochPlan(source, 32, 4, 3))
    sampler.seek(2, 5)  # resumed, by a plan that has seen nothing
    pairs = PairDataset(source, lambda data, seed: torch.tensor([*data], dtype=torch.uint8), 0)
    assert all(map(same, make_loader(pairs, sampler, tokenizer, 0), whole[5:]))


def test_most_of_the_data_may_be_lost_but_not_all() -> None:
    """1,500 lost in a row are no reason to end; 100 of 2,000 that are left may serve a small run."""
    source = Numbers(2000, range(100, 2000))
    batches = batches_of_numbers(source, EpochPlan(source, 16, 4, 0), 0)
    assert {n for batch in batches for n in batch.ids.tolist()} <= set(range(100))
    source = Numbers(2000, range(2000))
    with pytest.raises(
        UserError, match=r"^200 samples from all over the data cannot be read, the first is numbers:\d+: No"
    ):
        batches_of_numbers(source, EpochPlan(source, 16, 4, 0), 0)


@fork
@pytest.mark.parametrize("workers", [0, 1])
def test_every_fault_is_named_and_no_id_shifts(shards: Write, workers: int) -> None:
    """Three samples of nine are whole, and stand in for the others of their own, only, batch."""
    exif = Image.Exif()
    exif[0x0112] = 6
    jpeg = encoded(gradient(80, 60), "JPEG")
    faults = {
        "cannot identify image": [b"<!DOCTYPE html><html>404 Not Found</html>", b"\xff\xd8\xff"],
        "cannot decode image": [jpeg[: len(jpeg) // 2], png(7)[:-30]],
        "one pixel: a placeholder": [png(1, size=(1, 1))],
        "over 89,478,485 pixels": [BOMB],
    }
    good = {
        "CMYK": encoded(Image.new("CMYK", (30, 20), (0, 255, 0, 0)), "JPEG"),
        "grey and alpha": encoded(Image.new("LA", (30, 20), (90, 100)), "PNG"),
        "turned": encoded(gradient(80, 60), "JPEG", exif=exif.tobytes()),
    }
    broken = [(reason, data) for reason, group in faults.items() for data in group]
    contents = [data for _, data in broken] + [*good.values()]
    changes = {n: {"jpg": data, "txt": f"caption {n}".encode()} for n, data in enumerate(contents)}
    data = data_of(shards(4, len(contents) - 4, changes=changes), workers=workers, global_batch=9, lanes=1, tail="drop")
    (batch,) = data.loader_from(0)
    assert batch.ids.tolist() == [replacement(data.plan, 0, slot, range(len(broken)))[0] for slot in range(9)]
    assert set(batch.ids.tolist()) == set(range(len(broken), 9))
    assert [bytes(text).decode().strip() for text in batch.tokens.tolist()] == [f"caption {n}" for n in batch.ids]
    assert batch.images.shape == (9, 3, 24, 24)
    named = {skip.name: skip.reason for skip in batch.skipped}
    for number, (reason, _) in enumerate(broken):
        assert named[f"{number // 4:05d}.tar:{number:09d}"].startswith(reason)
    assert len(named) == len(broken)


def test_a_caption_of_100_kb_takes_no_time(shards: Write) -> None:
    """Byte-pair encoding is quadratic in the length of a word: open_clip's would take minutes over this one."""
    from disttempnet.models.towers import open_clip

    letters = bytes(torch.randint(97, 123, (100_000,), generator=torch.Generator().manual_seed(0)).tolist())
    changes = {n: {"png": png(n), "txt": text} for n, text in enumerate((letters, b"caption " * 12_500))}
    tokenizer = open_clip.get_tokenizer("ViT-B-32")
    towers: Any = SimpleNamespace(image_size=24, tokenizer=tokenizer, module=None, resizing=AS_CLIP)
    folder, begin = shards(2, changes=changes), time.process_time()
    config = DataConfig(train=str(folder), global_batch=2, lanes=1, workers=0)
    (batch,) = open_training_data(config, 5, towers).loader_from(0)
    assert time.process_time() - begin < 20
    assert sorted(batch.ids.tolist()) == [0, 1]
    row = batch.tokens[batch.ids.tolist().index(1)]
    assert torch.equal(row, towers.tokenizer(["caption " * 80])[0])


def test_captions_that_changed_after_indexing_are_skipped_too(shards: Write) -> None:
    """Only the middle of a large shard can change unseen, so this one is changed in place while it is open."""
    folder = shards(3)
    index = open_index(str(folder), progress=False)
    index.image_bytes(0)
    plan = EpochPlan(index, 3, 1, 0)
    place = (folder / "00000.tar").read_bytes().index(b"caption 1")
    for text, reason in ((b" " * 9, "empty caption"), (b"\xff" * 9, "caption is not UTF-8")):
        with (folder / "00000.tar").open("r+b") as shard:
            shard.seek(place)
            shard.write(text)
        (batch,) = make_loader(PairDataset(index, as_evaluated(8), 0), PlanSampler(plan), tokenizer, 0)
        slot = plan.batch(0, 0).tolist().index(1)
        assert batch.ids[slot] == replacement(plan, 0, slot, {1})[0]
        assert set(batch.skipped) == {("00000.tar:000000001", reason, 1)}


@fork
@pytest.mark.parametrize("workers", [0, 1])
def test_broken_data_ends_in_one_line(shards: Write, workers: int) -> None:
    changes = {n: {"png": b"garbage", "txt": b"text"} for n in range(6)}
    folder = shards(6, changes=changes)
    with pytest.raises(UserError) as caught:
        list(data_of(folder, workers=workers).loader_from(0))
    assert str(caught.value).startswith("200 samples from all over the data cannot be read, the first is 00000.tar:0")
    assert "\n" not in str(caught.value)


@fork
@pytest.mark.parametrize("workers", [0, 1])
def test_a_shard_lost_while_training_ends_in_one_line(shards: Write, workers: int) -> None:
    folder = shards(6)
    data = data_of(folder, workers=workers)
    os.truncate(folder / "00000.tar", 600)
    with pytest.raises(UserError, match=r"^\S*00000\.tar: this shard has changed since it was indexed: .*Restore it"):
        list(data.loader_from(0))


@fork
def test_a_killed_worker_is_named(shards: Write) -> None:
    data = data_of(shards(9, 9), workers=1, global_batch=2)
    # torch knows the signal only where its handler saw the death before its poll of the workers did
    told = r"^loader worker \d+ died( \(Killed\))?, usually out of memory.*--resume auto"
    with pytest.raises(UserError, match=told) as caught:  # noqa: PT012, SIM117
        with lost_workers_named():
            for _ in data.loader_from(0):
                os.kill(data.loader._iterator._workers[0].pid, signal.SIGKILL)
                time.sleep(1)
    assert "\n" not in str(caught.value)
    with pytest.raises(RuntimeError, match=r"^out of cheese$"), lost_workers_named():
        raise RuntimeError("out of cheese")


@fork
def test_workers_leave_interrupts_to_the_trainer(shards: Write) -> None:
    data = data_of(shards(9, 9), workers=1)
    batches = data.loader_from(0)
    first = next(batches)
    (worker,) = data.loader._iterator._workers
    assert os.getpgid(worker.pid) != os.getpgid(0)  # what a terminal or a launcher signals is the trainer's group
    os.kill(worker.pid, signal.SIGINT)
    assert 1 + sum(1 for _ in batches) == data.plan.steps
    assert len(first.ids) == 4
    assert worker.is_alive()


def test_a_process_with_workers_ends(shards: Write) -> None:
    """Python's exit ends workers with SIGTERM and waits for them: ones that ignored it would hang every run."""
    script = (
        "import sys; sys.path.insert(0, sys.argv[1]); from tests.data.training_data import data_of\n"
        "data = data_of(sys.argv[2], workers=2)\n"
        "next(data.loader_from(0))\n"
        "raise SystemExit(3)"
    )
    root = str(Path(__file__).parents[2])
    command = [sys.executable, "-c", script, root, str(shards(9, 9))]
    assert subprocess.run(command, timeout=300, check=False, capture_output=True).returncode == 3


def test_batches_move_as_a_whole() -> None:
    batch = Batch(
        torch.zeros(2, 3, 4, 4, dtype=torch.uint8), torch.ones(2, 5).long(), torch.arange(2), (Skip("x", "y", 0),)
    )
    moved = batch.to("meta")
    assert {tensor.device.type for tensor in (moved.images, moved.tokens, moved.ids)} == {"meta"}
    assert moved.skipped == (("x", "y", 0),)
    assert same(batch.to("cpu"), batch)
    if torch.cuda.is_available():
        assert batch.pin_memory().images.is_pinned()
