"""A loader worker leaves the job's signals to the trainer, and ends when the trainer ends it."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import time
from multiprocessing.synchronize import Event

import pytest
from torch.utils.data import DataLoader

from disttempnet.data.loader import batches_of, start_worker


def work(ready: Event) -> None:
    start_worker(0)
    ready.set()
    time.sleep(300)


def start_slowly(number: int) -> None:
    os.kill(os.getpid(), signal.SIGTERM)  # from another process than the trainer
    start_worker(number)


@pytest.mark.skipif(not hasattr(signal, "sigwaitinfo"), reason="the system cannot tell who sent a signal")
@pytest.mark.filterwarnings("ignore:.*multi-threaded:DeprecationWarning")
def test_a_signal_while_a_worker_starts_does_not_end_it() -> None:
    loader = DataLoader(range(3), batch_size=None, num_workers=1, worker_init_fn=start_slowly)  # type: ignore[arg-type]
    assert [int(number) for number in batches_of(loader)] == [0, 1, 2]  # type: ignore[call-overload]
    assert signal.SIGTERM not in signal.pthread_sigmask(signal.SIG_BLOCK, [])
    with pytest.raises(RuntimeError, match=r"killed by signal: Terminated|exited unexpectedly"):
        list(loader)  # as torch has it


@pytest.mark.skipif(not hasattr(signal, "sigwaitinfo"), reason="the system cannot tell who sent a signal")
@pytest.mark.filterwarnings("ignore:.*multi-threaded:DeprecationWarning")
@pytest.mark.parametrize("start", ["fork", pytest.param("forkserver", marks=pytest.mark.slow)])
def test_only_the_trainer_ends_a_worker(start: str) -> None:
    """However it is started: under forkserver its parent in the system is not the trainer."""
    context = multiprocessing.get_context(start)
    ready = context.Event()
    worker = context.Process(target=work, args=(ready,), daemon=True)
    worker.start()
    try:
        assert ready.wait(120)
        for name in ("INT", "USR1", "TERM"):
            subprocess.run(["kill", f"-{name}", str(worker.pid)], check=True)
        worker.join(1.0)
        assert worker.is_alive(), worker.exitcode
        worker.terminate()
        worker.join(30)
        assert worker.exitcode == 0
    finally:
        worker.kill()
        worker.join()
