"""`disttempnet compare`: a resumable grid of objectives × seeds; finished runs are skipped.

The code knows no objective: the grid file names them. Every run is an ordinary run folder, for `disttempnet train`,
`evaluate` and `report` as well.

display.py   progress of the whole grid
grid.py      grid file → configs; the state of each run
pool.py      worker processes, and what happens when one dies
trials.py    trials of settings, and the choice of the best
worker.py    a worker: trains one run after another
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from rich.table import Table
from rich.text import Text

from disttempnet.compare.display import GridDisplay
from disttempnet.compare.grid import Grid, RunState, load_grid, run_state
from disttempnet.compare.pool import GridOutcome, Pool
from disttempnet.compare.trials import CellTuning, chosen_settings, missing_trials, tuning_of, write_tuning
from disttempnet.config import Config
from disttempnet.distributed.launcher import launched
from disttempnet.errors import TERMINATED, UserError
from disttempnet.io.files import locked
from disttempnet.terminal import console, say
from disttempnet.training import run_folder

__all__ = ["load_grid", "run_compare"]


def run_compare(path: Path, overrides: Sequence[str], jobs: int = 1, only_list: bool = False) -> int:
    """Train the remaining runs of a grid, print the table over seeds, write report.html and results.jsonl.

    Args:
        path: TOML file of the grid.
        overrides: `key=value` of the file, or of every run.
        jobs: number of runs at a time, each in its own process.
        only_list: only print the grid and the state of each run.

    Returns:
        The exit code: 0, 1 where runs have failed, TERMINATED where it was stopped.

    Raises:
        UserError: a mistake in the file, a run folder that holds another run, an `out` that cannot be written or is
            in use by another compare.
    """
    if launch := launched():
        raise UserError(f"compare starts its own processes: call it without {launch.launcher}, and give --jobs N")
    grid = load_grid(path, overrides)
    if only_list:
        _print_list(grid)
        return 0
    run_folder.refuse_unwritable_folder(grid.out)
    with _alone_in(grid.out):
        return _run(grid, jobs)


def _run(grid: Grid, jobs: int) -> int:
    # settings first: each round of trials may ask for another, beyond the edge that holds the best
    tunings = tuning_of(grid)
    while waiting := missing_trials(grid, tunings):
        say(f"tuning by {grid.tune and grid.tune.metric}: {len(waiting)} trials to run")
        outcome = _train(waiting, jobs, grid.out)
        if outcome.stopped or outcome.failed:
            return _end(outcome, len(waiting))
        tunings = tuning_of(grid)
    grid = grid.chosen(chosen_settings(tunings))

    # then the runs of all seeds
    outcome = _train(grid.configs, jobs, grid.out)
    done = [config.folder for config in grid.configs if run_state(config).kind == "done"]
    if done and not outcome.stopped:
        _report(done, grid, tunings)
    return _end(outcome, len(grid.configs))


def _end(outcome: GridOutcome, total: int) -> int:
    """Print what failed or was stopped, and return the exit code."""
    _print_failed(outcome, total)
    if outcome.stopped:
        say("stopped: resume with the same command")
        return TERMINATED
    return 1 if outcome.failed else 0


def _states(configs: Sequence[Config]) -> dict[str, RunState]:
    return {config.name: run_state(config) for config in configs}


@contextmanager
def _alone_in(out: Path) -> Iterator[None]:
    """Hold the lock of the output folder; refuse where another compare holds it."""
    out.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        try:
            stack.enter_context(locked(out / "lock", wait=False))
        except BlockingIOError:
            raise UserError(f"{out}: another compare is running here: wait for its end, or give another out") from None
        except OSError as error:
            run_folder.warn_without_lock(out, error)
        yield


def _train(configs: Sequence[Config], jobs: int, out: Path) -> GridOutcome:
    """Train what is left of these runs. Raises UserError where a folder holds another run."""
    states = _states(configs)
    for name, state in states.items():
        if state.kind == "differs":
            raise UserError(f"{name}: {state.why}")
    left = [config for config in configs if states[config.name].kind != "done"]
    if not left:
        return GridOutcome()
    with GridDisplay(len(configs), len(configs) - len(left)) as display:
        return Pool(left, jobs, _gpus(), display, out / "workers.log").run()


def _gpus() -> list[str]:
    """Return the GPUs of this process, as CUDA_VISIBLE_DEVICES names them."""
    import torch

    named = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
    count = torch.cuda.device_count()
    return named[:count] if named else [str(i) for i in range(count)]


def _report(folders: Sequence[Path], grid: Grid, tunings: Sequence[CellTuning]) -> None:
    """Print the table over seeds; write OUT/results.jsonl, OUT/tuning.jsonl and OUT/report.html."""
    from disttempnet.report.compact import TUNING_FILE, read_results, write_compact
    from disttempnet.report.page import publish
    from disttempnet.report.seeds.comparison import compare_groups
    from disttempnet.report.seeds.groups import name_parts
    from disttempnet.report.seeds.page import comparison_page
    from disttempnet.report.seeds.tables import text_table

    out, baseline = grid.out, grid.baseline
    if tunings:
        publish(out / TUNING_FILE, write_tuning(grid, tunings))  # first: results name the keys that were tuned
    results = read_results(folders)
    if baseline not in {name_parts(result.name)[0] for result in results}:
        say(f"no run of the baseline '{baseline}' is finished: differences are to the first run that is")
        baseline = ""
    comparison = compare_groups(results, baseline=baseline)
    console().print(text_table(comparison))  # first, so that a full disk does not lose it
    publish(out / "results.jsonl", write_compact(results))
    publish(out / "report.html", comparison_page(comparison))
    say(f"results: {(out / 'results.jsonl').resolve()}")
    say(f"report: {(out / 'report.html').resolve()}")


def _print_failed(outcome: GridOutcome, total: int) -> None:
    if outcome.failed:
        say(f"{len(outcome.failed)} of {total} runs failed; the same command retries them:")
    for name, reason in outcome.failed.items():
        say(f"  {name}: {reason}")


def _print_list(grid: Grid) -> None:
    tunings = tuning_of(grid)
    grid = grid.chosen(chosen_settings(tunings))
    table = Table(box=None)
    for heading in ("run", "objective", "state"):
        table.add_column(heading)
    for tuning in tunings:
        chosen = dict(zip(tuning.cell.tuned, tuning.best, strict=True)) if not tuning.waiting else {}
        words = ", ".join(f"{key} = {value}" for key, value in chosen.items()) or f"{len(tuning.waiting)} trials left"
        table.add_row(Text(tuning.cell.name), Text("tuning"), Text(words))
    states = _states(grid.configs)
    for config in grid.configs:
        state = states[config.name]
        words = f"{state.kind}: {state.why}" if state.why else state.kind
        table.add_row(Text(config.name), Text(config.loss.name), Text(words))
    for cell in grid.untuned:
        table.add_row(Text(cell.name), Text(cell.table["loss"]["name"]), Text("waits for its tuning"))
    console().print(table)
    done = sum(state.kind == "done" for state in states.values())
    say(f"{done} of {len(grid.cells) * len(grid.seeds)} runs are done, in {grid.out}")
