"""The number of processes, and options of `launch`, from launchers and #SBATCH lines."""

from __future__ import annotations

import pytest

from disttempnet.errors import UserError
from disttempnet.migrate.launcher import count_processes, gpus_per_node, launch_words, sbatch_options
from disttempnet.migrate.script import Word


def options(text: str) -> dict[str, str]:
    return sbatch_options(text.split())


@pytest.mark.parametrize(
    ("prefix", "job", "count"),
    [
        ("python", "", 1),
        ("srun python -u", "--ntasks=8 --ntasks-per-node=2", 8),
        ("srun python", "-N 4 --ntasks-per-node 2", 8),
        ("srun -n 6 python", "--ntasks=8", 6),
        ("srun --nodes=2 --ntasks-per-node=4 python", "", 8),
        ("srun python", "--mem=80G", None),
        ("torchrun --nproc_per_node 8 -m", "", 8),
        ("torchrun --nproc-per-node=4 --nnodes=2 -m", "", 8),
        ("srun torchrun --nproc_per_node=4 -m", "--nodes=3 --ntasks-per-node=1", 12),
        ("python -m torch.distributed.launch --nproc_per_node=2", "", 2),
        ("mpirun -np 16 python", "", 16),
    ],
)
def test_processes_are_counted(prefix: str, job: str, count: int | None) -> None:
    assert count_processes([Word(word) for word in prefix.split()], options(job)).count == count


def test_a_number_that_is_set_elsewhere_asks_for_it() -> None:
    words = [Word("torchrun"), Word("--nproc_per_node"), Word("$N", ("$N",))]
    with pytest.raises(UserError, match=r"--nproc_per_node \$N: no number: .*--processes N"):
        count_processes(words, {})


@pytest.mark.parametrize(
    ("job", "gpus"),
    [
        ("--gres=gpu:a100:2", 2),
        ("--gres=gpu", 1),
        ("--gpus-per-node=h100:4", 4),
        ("--nodes=2 -G 8", 4),
        ("--gres=x:2", None),
    ],
)
def test_gpus_of_a_node(job: str, gpus: int | None) -> None:
    assert gpus_per_node(options(job)) == gpus


def test_options_become_those_of_launch_or_are_named() -> None:
    words, left = launch_words(
        options("-N4 --ntasks-per-node=2 -t 1-0 -p gpu -A lab --exclusive --mem=80G -J mine --array 1-3"), processes=8
    )
    assert words == ["--nodes", "4", "--gpus", "2", "--time", "1-0", "--partition", "gpu", "--account", "lab"]
    assert [what for what, _ in left] == [
        "#SBATCH --exclusive",
        "#SBATCH --mem=80G",
        "#SBATCH --job-name=mine",
        "#SBATCH --array=1-3",
    ]
    assert "launch --seeds" in left[-1][1]
    assert all(why for _, why in left)


def test_processes_that_nodes_do_not_share_evenly_are_said() -> None:
    _, left = launch_words(options("--nodes=3"), processes=8)
    assert left == [("8 processes", "are no multiple of 3 nodes, which `launch` fills evenly")]
