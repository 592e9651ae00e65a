"""`disttempnet launch`: a training run as a SLURM job."""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from disttempnet.errors import UserError
from disttempnet.io.ranges import SEEDS, integers
from disttempnet.terminal import say

if TYPE_CHECKING:
    from disttempnet.config import Config, LossConfig

LAUNCH = """Writes a batch script for this run and submits it with sbatch. The config is checked first: mistakes cost no
time in the queue.

The job has one process for each GPU. Two minutes before the time limit it saves and requeues itself; it always resumes
from its last checkpoint. With --seeds it is a job array with a run NAME--seed-SEED for each seed.

examples:
  disttempnet launch cc12m_vitb32_v1_corrected --nodes 4 --gpus 2 --partition gpu --time 24:00:00
  disttempnet launch demo name=mine train.epochs=20 --nodes 1 --gpus 1 --seeds 1 2 3 --dry-run
"""


def add_launch_command(commands: Any) -> None:
    """Add the command to the sub-parsers; it sets `run`."""
    launch = commands.add_parser(
        "launch",
        help="train on a SLURM cluster: print or submit the batch script of a run",
        description=LAUNCH,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    launch.add_argument("config", help="a TOML file, or the name of a shipped config: demo")
    launch.add_argument("overrides", nargs="*", metavar="key=value", help="config keys, as for train")
    launch.add_argument("--nodes", type=integers(1, 100_000).parse, default=4, metavar="N", help="nodes (default: 4)")
    launch.add_argument("--gpus", type=integers(1, 1024).parse, default=2, metavar="N", help="GPUs a node (default: 2)")
    launch.add_argument("--partition", default="", help="partition (default: the site's)")
    launch.add_argument("--account", default="", help="account (default: the site's)")
    launch.add_argument("--time", default="24:00:00", metavar="LIMIT", help="time limit (default: 24:00:00)")
    launch.add_argument("--seeds", nargs="+", default=[], metavar="SEED", help="one run for each seed, as a job array")
    launch.add_argument("--dry-run", action="store_true", help="print the script; submit nothing")
    launch.set_defaults(run=run_launch)


def run_launch(options: argparse.Namespace) -> int:
    from disttempnet.cli.slurm import Job, script, submit
    from disttempnet.config import load_config

    # argparse takes overrides behind --seeds for seeds
    overrides = [*options.overrides, *(word for word in options.seeds if "=" in word)]
    seeds = [_seed(word) for word in options.seeds if "=" not in word]
    config = load_config(options.config, overrides)
    job = Job(
        name=config.name,
        nodes=options.nodes,
        gpus=options.gpus,
        cpus=config.data.workers + 2,  # loader workers, the training process, and the GPU driver
        time=options.time,
        partition=options.partition,
        account=options.account,
        seeds=tuple(seeds),
    )
    text = script(job, options.config, config, overrides)
    _refuse_wrong_loss(config.loss)
    for line in _not_here(config):
        say(f"note: {line}: not on this machine; the nodes must have it", error=True)
    say(text if options.dry_run else submit(text), end="" if options.dry_run else "\n")
    return 0


def _not_here(config: Config) -> Iterator[str]:
    """Yield the local data of a config that does not exist on this machine: key and path, a line each."""
    paths = [("data.train", one.path) for one in config.data.sources]
    paths += [("data.train images", one.images) for one in config.data.sources if one.images]
    paths += [("data.validation", config.data.validation)] if isinstance(config.data.validation, str) else []
    paths += [("eval.data_root", config.eval.data_root)]
    for key, path in paths:
        if path and not re.match(r"\w+:", path):  # embedded:, generated:, s3://
            fixed = re.split(r"[{*?\[]", path)[0]
            place = Path(fixed).expanduser()
            if not (place if fixed == path or fixed.endswith("/") else place.parent).exists():
                yield f"{key} = {path}"


def _seed(word: str) -> int:
    try:
        return int(SEEDS.parse(word))
    except argparse.ArgumentTypeError as error:
        raise UserError(f"launch: --seeds: {error}") from None


def _refuse_wrong_loss(loss: LossConfig) -> None:
    """Raise UserError for an unknown objective or argument in `[loss]`, or a value out of range."""
    from disttempnet.losses import build_loss  # imports torch, so it comes after all other checks

    try:
        build_loss(loss.name, num_samples=1, embed_dim=8, **loss.arguments)
    except ValueError as error:
        raise UserError(f"[loss] {error}") from None
