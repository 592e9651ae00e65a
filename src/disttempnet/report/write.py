"""Write the report that a file's ending asks for: a page about runs, tables or a page over seeds or evaluations."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from disttempnet.errors import UserError
from disttempnet.io.files import refuse_unwritable
from disttempnet.report.compact import CompactResult, compact, read_results, write_compact
from disttempnet.report.evaluations.compare import holds_evaluations, read_evaluations
from disttempnet.report.evaluations.page import evaluation_report
from disttempnet.report.page import publish
from disttempnet.report.read import read_run
from disttempnet.report.runs.page import runs_page
from disttempnet.report.seeds.comparison import compare_groups
from disttempnet.report.seeds.figure import figure_svg
from disttempnet.report.seeds.groups import by_config
from disttempnet.report.seeds.page import comparison_page
from disttempnet.report.seeds.tables import csv_table, latex_table, markdown_table

WRITERS = {
    ".html": comparison_page, ".md": markdown_table, ".tex": latex_table, ".csv": csv_table, ".svg": figure_svg
}  # fmt: skip
REPORT_SUFFIXES = (*WRITERS, ".jsonl")


def write_report(paths: Sequence[Path], out: Path, metrics: Sequence[str] = (), baseline: str = "") -> Path:
    """Write the report that the ending of `out` asks for.

    A page shows single runs in depth if run folders are given and no config has two seeds; otherwise it shows groups of
    seeds.

    Args:
        paths: run folders, folders of run folders, compact files; or evaluations: their folders, folders of such
            folders, eval_results.jsonl.
        out: .html for a page, .md .tex .csv for the table over seeds, .svg for a figure of one metric, .jsonl for
            compact results; the last two of runs only.
        metrics: `TASK/METRIC` columns; empty = the main metrics of every task.
        baseline: the run, without its seed, that the others are compared with; empty = the first one.

    Raises:
        UserError: a path that is no run, an unknown ending, metric or baseline, a damaged file, or `out` cannot be
            written.
    """
    if out.suffix not in REPORT_SUFFIXES:
        raise UserError(f"{out}: unknown ending; give one of {', '.join(REPORT_SUFFIXES)}")
    refuse_unwritable(out)
    if any(holds_evaluations(path) for path in paths):
        if out.suffix in (".jsonl", ".svg"):
            why = "evaluations are compact as they are" if out.suffix == ".jsonl" else "a figure is of runs"
            raise UserError(f"{out}: {why}; give one of .html, .md, .tex, .csv")
        return publish(out, evaluation_report(read_evaluations(paths), out.suffix, metrics, baseline))
    if out.suffix == ".html" and not metrics and all((path / "config.toml").is_file() for path in paths):
        runs = [read_run(path) for path in paths]
        results = [compact(run) for run in runs]
        if not _have_seeds(results):
            return publish(out, runs_page(runs, baseline))
    else:
        results = read_results(paths)
    if out.suffix == ".jsonl":
        return publish(out, write_compact(results))
    return publish(out, WRITERS[out.suffix](compare_groups(results, metrics, baseline)))


def _have_seeds(results: Sequence[CompactResult]) -> bool:
    """Return whether a config was run with several different seeds."""
    finished = [result for result in results if result.finished]
    return any(len({result.seed for result in same}) > 1 for same in by_config(finished))
