"""What loader workers need to hand batches over: a lack of shared memory or open files is one line, no hang."""

import os
import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from disttempnet.cli.main import main
from disttempnet.data import workers
from disttempnet.data.loader import PREFETCH, Collate, Sample
from disttempnet.data.workers import check_open_files, fit_prefetch, lost_workers_named, share_tensor
from disttempnet.errors import UserError, UserNotice
from disttempnet.io import machine
from tests.data.training_data import data_of, tokenizer

Write = Callable[..., Path]
MB = 10**6


@pytest.fixture
def room(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Say how many bytes of shared memory are free."""

    def free(size: int) -> None:
        disk = SimpleNamespace(f_bavail=size // 4096, f_frsize=4096)
        monkeypatch.setattr(workers, "os", SimpleNamespace(environ=os.environ, path=os.path, statvfs=lambda _: disk))

    return free


def test_workers_hold_as_many_batches_as_there_is_room_for(room: Callable[[int], None]) -> None:
    room(64 * MB)
    assert fit_prefetch(4, 5 * MB, 2) == 4, "nine are forty-five"
    assert fit_prefetch(4, 60 * MB, 0) == 4, "no workers need none"
    told = (
        r"^/dev/shm is small: .* prefetches 2 batches, not 4; .* \(64\.0 MB are free .*, and a batch takes 10\.0 MB\)$"
    )
    with pytest.warns(UserNotice, match=told):
        assert fit_prefetch(4, 10 * MB, 2) == 2, "five are fifty"
    with pytest.raises(UserError, match=r"^/dev/shm is too small for 8 loader workers: .*\(docker run --shm-size=8g\)"):
        fit_prefetch(4, 10 * MB, 8)


def test_ranks_of_a_node_share_the_room(room: Callable[[int], None], monkeypatch: pytest.MonkeyPatch) -> None:
    room(64 * MB)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    with pytest.raises(UserError, match=r"16\.0 MB are free for this process"):
        fit_prefetch(4, 10 * MB, 1)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "0")
    with pytest.raises(UserError, match=r"^the environment has LOCAL_WORLD_SIZE=0: must be a whole number from 1"):
        fit_prefetch(4, 10 * MB, 1)


def test_too_little_room_is_found_before_the_first_batch(shards: Write, room: Callable[[int], None]) -> None:
    folder = shards(9)
    room(4096)
    with pytest.raises(UserError, match=r"^/dev/shm is too small"):
        data_of(folder, workers=1)
    assert len([*data_of(folder, workers=0).loader_from(0)]) == 3


@pytest.mark.parametrize(
    "words",
    [
        "unable to write to file </torch_812_2310_9>: No space left on device (28)",
        "unable to allocate shared memory(shm) for file </torch_8_9_0>: No space left on device (28)",
        "DataLoader worker (pid 8) is killed by signal: Bus error. It is possible that dataloader's workers are out of "
        "shared memory. Please try to raise your shared memory limit.",
    ],
)
def test_what_torch_says_of_full_shared_memory_is_one_line(words: str) -> None:
    with (
        pytest.raises(UserError, match=r"^/dev/shm is full; .*--shm-size=8g\), or set data\.workers lower"),
        lost_workers_named(),
    ):
        raise RuntimeError(words)
    with pytest.raises(RuntimeError, match="No space left"), lost_workers_named():
        raise RuntimeError("[enforce fail] write: No space left on device: /runs/demo/open_clip_model.safetensors")


def test_a_worker_shares_all_of_a_batch_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """The thread that sends it would print what is wrong, drop the batch and let the trainer wait for ever."""
    sample = Sample(torch.zeros(3, 4, 4, dtype=torch.uint8), "a caption", 7, ())
    assert not Collate(tokenizer)([sample]).tokens.is_shared()
    monkeypatch.setattr(workers, "get_worker_info", lambda: object())
    batch = Collate(tokenizer)([sample])
    assert batch.tokens.is_shared()
    assert batch.ids.is_shared()
    assert share_tensor(torch.zeros(3)).is_shared()


@contextmanager
def limit(soft: int) -> Iterator[None]:
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


def test_the_limit_of_open_files_is_raised_as_far_as_is_allowed() -> None:
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    with limit(200):
        assert machine.open_files() == min(hard, machine.MOST_FILES) == resource.getrlimit(resource.RLIMIT_NOFILE)[0]


def test_workers_that_need_more_open_files_are_refused(shards: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    check_open_files(8)
    monkeypatch.setattr(workers, "open_files", lambda: 64)
    with pytest.raises(
        UserError, match=r"^data\.workers: they need 76 open files, and this process may open 64: .*ulimit"
    ):
        data_of(shards(9), workers=1)
    monkeypatch.setattr(workers, "open_files", lambda: 76)
    check_open_files(PREFETCH)


def test_a_lack_of_open_files_is_one_line_in_every_command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def raise_it(error: Exception, options: object) -> int:
        raise error

    for error in (OSError(24, "Too many open files"), RuntimeError("unable to mmap: Too many open files (24)")):
        monkeypatch.setattr("disttempnet.cli.data.run_index", partial(raise_it, error))
        assert main(["data", "index", "x"]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("disttempnet: too many open files: this process may open ")
        assert line.endswith("; raise the limit (ulimit -n 4096), or use fewer workers")
