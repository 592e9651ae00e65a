"""Ranks: how they start, what they exchange, how they learn that one of them has died.

collectives.py   start, gather, sum, data parallel
launcher.py      rank and world size, from torchrun's, SLURM's or MPI's variables
watchdog.py      connections between ranks: who has died or stands still
fsdp.py          towers that outgrow a GPU, sharded over the ranks (FSDP2)
"""

from disttempnet.distributed.collectives import (
    OtherRankFailed,
    all_gather,
    all_mean,
    all_sum,
    barrier,
    data_parallel,
    describe,
    file_of_main,
    first_rows,
    gather_objects,
    is_main,
    largest,
    rank,
    ring,
    session,
    together,
    without_exchange,
    world_size,
)

__all__ = [
    "OtherRankFailed",
    "all_gather",
    "all_mean",
    "all_sum",
    "barrier",
    "data_parallel",
    "describe",
    "file_of_main",
    "first_rows",
    "gather_objects",
    "is_main",
    "largest",
    "rank",
    "ring",
    "session",
    "together",
    "without_exchange",
    "world_size",
]
