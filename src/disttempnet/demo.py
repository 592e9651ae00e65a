"""`disttempnet demo`: DistTempNet-v1 and plain CLIP on the embedded data, one table, one page.

Towers, order of the data, seed and number of steps are the same; only the objective differs. An interrupted demo
resumes.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

from disttempnet.config import CONFIG_FOLDER, load_config
from disttempnet.errors import UserError
from disttempnet.terminal import console, say

CONTENDERS = {"demo": (), "demo-clip": ("name=demo-clip", 'loss={name = "clip"}')}


def run_demo(out: str | None, overrides: Sequence[str], fresh: bool) -> bool:
    """Train both runs into OUT, print the table, write OUT/demo-report.html; return False if it was stopped.

    Args:
        out: folder of run folders; None = `out` of the overrides, else `runs`.
        overrides: `section.key=value`, applied to both runs.
        fresh: remove an earlier demo in that folder first; otherwise it is resumed.
    """
    if out is not None:
        if any(override.partition("=")[0].strip() == "out" for override in overrides):
            raise UserError("demo: --out and out=… are both given; give one")
        overrides = [*overrides, f"out={json.dumps(out)}"]
    configs = [load_config(CONFIG_FOLDER / "demo.toml", [*own, *overrides]) for own in CONTENDERS.values()]
    if [config.name for config in configs] != list(CONTENDERS):
        raise UserError("demo: the names of its two runs are fixed; use --out FOLDER for another place")

    from disttempnet.evaluation.results.tables import results_table
    from disttempnet.report.page import publish
    from disttempnet.report.read import read_run
    from disttempnet.report.runs.page import runs_page
    from disttempnet.training.trainer import train

    for config in configs:
        if fresh:
            shutil.rmtree(config.folder, ignore_errors=True)
        if not train(config, resume="auto"):
            return False
    runs = [read_run(config.folder) for config in configs]
    console().print(results_table({run.title: run.final for run in runs}))
    page = publish(Path(configs[0].out) / "demo-report.html", runs_page(runs))
    say(f"report: {page.resolve()}")
    return True
