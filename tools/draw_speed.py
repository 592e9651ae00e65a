"""Draw docs/images/speed.svg from benchmarks/results: loss, memory, loader and evaluation beside their peers.

Every bar is a ratio that was measured in one run. docs/performance.md names the commands.
"""

import json
import sys
from pathlib import Path
from typing import Any

from disttempnet.report.runs.plots import FAINT, INK, RUN_COLOURS, grid, styled, svg_text

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
OUT = Path("docs", "images", "speed.svg")


def ratios(results: Path = RESULTS) -> dict[str, list[tuple[str, float]]]:
    """Return heading → (label, ratio) of each panel."""
    read: dict[str, Any] = {
        name: json.loads((results / f"{name}.json").read_text("utf-8")) for name in ("loss", "loader", "evaluation")
    }
    batches = [(size, row) for size, row in read["loss"]["batches"].items() if "open_clip" in row]
    sizes = [name for name in read["loader"] if "x" in name]
    return {
        "contrast of a batch, one core:\ntimes as fast as open_clip's loss": [
            (f"batch {int(size):,}", row["core"]["times_as_fast_as_open_clip_cpu"]) for size, row in batches
        ],
        "its memory:\nopen_clip's over ours": [
            (f"batch {int(size):,}", row["core"]["memory_of_open_clip_over_ours"]) for size, row in batches
        ],
        "CPU time of the peer\nover ours": [
            *((f"images of {size}", read["loader"][size]["ours"]["times_open_clip_cpu"]) for size in sizes),
            ("38 tasks", read["evaluation"]["clip-benchmark / ours, cpu"]),
        ],
    }


@styled
def speed_svg(panels: dict[str, list[tuple[str, float]]]) -> str:
    """Return the figure as the text of an SVG file, in light and dark."""
    figure, ((*axes,),) = grid(1, len(panels), height=2.2, width=10.0)
    for axis, (heading, bars) in zip(axes, panels.items(), strict=True):
        labels, values = zip(*bars, strict=True)
        axis.barh(range(len(bars)), values, color=RUN_COLOURS[0], height=0.55)
        axis.set_yticks(range(len(bars)), labels, color=INK)
        axis.set_ylim(len(bars) - 0.5, -0.5)
        axis.axvline(1, color=FAINT, linewidth=1.1)
        for place, value in enumerate(values):
            axis.text(value, place, f" {value:.3g}×", va="center", color=INK)
        axis.set_xlim(0, 1.18 * max(values))
        axis.set_title(heading, fontsize=10.0)
    return svg_text(figure)


if __name__ == "__main__":
    out = Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / OUT
    out.write_text(speed_svg(ratios()), encoding="utf-8")
    print(out)
