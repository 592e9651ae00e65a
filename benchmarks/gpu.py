"""What one NVIDIA GPU makes of it: whole training steps and the fraction of its peak, and the loss beside its peers.

    pip install triton inf-cl        # triton comes with torch for CUDA; inf-cl is only compared with
    python benchmarks/gpu.py --out benchmarks/results/gpu.json

Some thirty processes one after the other, the most important first, within --minutes: what one cannot do (out of
memory, a peer that is not installed) is a line of the result. The file is written after every row, so that a run that
is cut off leaves what it had. The same command goes on from there: rows that were measured with the same device,
versions and setting are kept, those that failed or were not reached are measured. Tables at the end are in Markdown.

Steps: the trainer's own step (towers in bf16, DistTempNet-v1, clipping, optimizers) on one batch that lies on the GPU:
random pixels, and captions that are --tokens long with start and end of text. Times are medians between CUDA events.
`positions` is how many of a text the towers compute. MFU = operations of the towers, forward and backward, counted by
torch over a step of two pairs, times images/s, over the peak in bf16 without sparsity. `loss` is the time of the
contrast within it, forward and backward. Memory is the allocator's peak.

Loss alone: forward and backward of B unit features, D = 512. `core` is SogCLR, `network` DistTempNet-v1, `clip` CLIP;
`rank` is the contrast of one of eight ranks, B/8 rows and B columns. These four with the Triton kernels (bf16) and,
`… torch`, with the plain path (float32). Peers, float32: `dense`, `dense-network` (benchmarks/dense.py), `open_clip`'s
ClipLoss, `inf-cl`. Memory is what a step takes beside the features.

Agreement: value and gradient of two steps by the kernels, on features that are rounded to bf16 already, against the
plain path in float64. Limits: 1e-5 of the value, 2⁻⁷ of the norm of the gradient, whose weights are rounded to bf16.

Runs: `golden` is the smallest run in float32 on the device and on the CPU; `group` a process group of one rank
(collectives, DDP with bf16 gradients, FSDP2); `demo` the time of `disttempnet demo`.

Without a GPU, to see that it runs:
    python benchmarks/gpu.py --device cpu --model demo-vit-32 --tokens 12 --batches 16 --loss-batches 128 --steps 2
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
from gpu_cases import LOSS_CASES, RANKS, measure

PEAKS = (  # name of the device, TFLOP/s in bf16 with float32 sums, without sparsity; the first that fits
    (r"\bB200\b", 2250),  # NVIDIA's data sheets, as far as "GeForce": half of what they say with sparsity
    (r"\bH200 NVL\b", 836),
    (r"\b(H200|GH200)\b", 989),
    (r"\bH100 PCIe\b", 756),
    (r"\bH100 NVL\b", 835),
    (r"\bH100\b", 989),
    (r"\bA100\b", 312),
    (r"\bL40S\b", 362),
    (r"\bL4\b", 121),
    (r"\bA10\b", 125),
    (r"\bA40\b", 149.7),
    (r"\bRTX A6000\b", 154.8),
    (r"GeForce RTX 4090$", 165.2),  # whitepaper of Ada, appendix A
    (r"GeForce RTX 3090$", 71),  # whitepaper of GA102, appendix A
)
PEERS = {  # case → what its time and memory are compared with
    "core": ("core torch", "dense"),
    "network": ("network torch", "dense-network"),
    "clip": ("clip torch", "open_clip", "inf-cl"),
    "rank": ("rank torch",),
}
FIRST_LOSSES = ("rank", "core", "clip", "inf-cl", "open_clip", "dense", "network")
# --- one process a case -----------------------------------------------------------------------------------------------


def in_a_process(case: dict[str, Any], seconds: float) -> Iterator[dict[str, Any]]:
    """Yield the pieces that a process of its own finds, as it finds them: one that dies leaves those that it had.

    Args:
        case: for `measure`.
        seconds: after which the process, and all that it started, is ended.
    """
    command = [sys.executable, __file__, "--measure", json.dumps(case)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True)
    assert process.stdout
    late = threading.Timer(seconds, os.killpg, (process.pid, signal.SIGKILL))
    late.start()
    try:
        for line in process.stdout:
            if line.startswith("{"):
                yield json.loads(line)
        code = process.wait()
    finally:
        ended_in_time = late.is_alive()
        late.cancel()
        process.stdout.close()
    if code:
        why = f"the process ended with exit code {code}" if ended_in_time else f"not done after {seconds:.0f} s"
        yield {"failed": why}


def about(device: str) -> dict[str, Any]:
    """The machine and the versions."""
    import torch

    facts: dict[str, Any] = {"device": platform.processor() or platform.machine()}
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        facts = {
            "device": properties.name,
            "compute_capability": f"{properties.major}.{properties.minor}",
            "memory_gib": round(properties.total_memory / 2**30, 1),
            "cuda": torch.version.cuda,
        }
        if shutil.which("nvidia-smi"):
            wanted = "driver_version,power.limit,clocks.max.sm"
            asked = ["nvidia-smi", f"--query-gpu={wanted}", "--format=csv,noheader", f"--id=GPU-{properties.uuid}"]
            answer = subprocess.run(asked, capture_output=True, text=True)
            if not answer.returncode:
                facts |= dict(zip(wanted.split(","), answer.stdout.strip().split(", "), strict=False))
    for package in ("torch", "triton", "open_clip_torch", "inf-cl"):
        try:
            facts[package] = version(package)
        except PackageNotFoundError:
            facts[package] = None
    return {**facts, "python": platform.python_version()}


def peak_tflops(name: str) -> float | None:
    """Of a device, by its name; None where it is not in the table."""
    return next((tflops for pattern, tflops in PEAKS if re.search(pattern, name)), None)


# --- the tables -------------------------------------------------------------------------------------------------------


def show(results: dict[str, Any]) -> None:
    """Tables for docs/performance.md."""
    print(f"\n{results['device']}, torch {results['torch']}, peak {results['tflops'] or 'not known'} TFLOP/s\n")
    steps_table(results["steps"])
    table = {(row["case"], row.get("batch")): row for row in results["loss"]}
    batches = sorted({batch for _, batch in table if batch})

    def cells(name: str, key: str) -> list[Any]:
        return [table.get((name, batch), {}).get(key) for batch in batches]

    for title, key in (("loss alone, ms", "ms"), ("beside the features, MiB", "peak_mib")):
        print_table(title, batches, {name: cells(name, key) for name in LOSS_CASES})
    ratios = {
        f"{name} than {peer}": [
            round(theirs / ours, 2) if ours and theirs else None
            for ours, theirs in zip(cells(name, "ms"), cells(peer, "ms"), strict=True)
        ]
        for name, peers in PEERS.items()
        for peer in peers
    }
    print_table("times as fast", batches, ratios)
    print()
    for row in results["loss"]:
        if reason(row):
            print(f"{row['case']}, {row.get('batch', 'all')}: {reason(row)}")
    for row in results["agreement"]:
        print(f"kernels, {row.get('objective', 'all')}: {reason(row) or agreement(row)}")
    for row in results["runs"]:
        name = ", ".join(str(row[key]) for key in ("run", "checked", "backend") if key in row)
        found = (f"{key} {cell(row[key])}" for key in ("largest_difference", "gradient_error", "seconds") if key in row)
        print(f"{name}: {reason(row) or ', '.join([*found, *verdict(row)])}")
    for case in results["not_reached"]:
        print(f"not reached: {case}")


def steps_table(rows: list[dict[str, Any]]) -> None:
    if not rows:
        return
    keys = ("positions", "compile", "ms", "images_per_s", "mfu_per_cent", "peak_gib", "loss_ms", "loss_per_cent")
    print("| batch | positions | compile | ms a step | images/s | MFU, % | peak, GiB | loss, ms | loss, % |")
    print("|--:|--:|---|--:|--:|--:|--:|--:|--:|")
    for row in rows:
        shown = {"positions": row["tokens"], **row, "compile": "on" if row["compile"] else "off"}
        shown |= {"ms": reason(row)} if reason(row) else {}
        print(f"| {row['batch']} | " + " | ".join(cell(shown.get(key)) for key in keys) + " |")


def print_table(title: str, batches: list[int], rows: dict[str, list[Any]]) -> None:
    """Rows that hold a number at all."""
    rows = {name: values for name, values in rows.items() if any(values)}
    if rows:
        print(f"\n| {title} | " + " | ".join(map(str, batches)) + " |")
        print("|---|" + "--:|" * len(batches))
    for name, values in rows.items():
        print(f"| {name} | " + " | ".join(map(cell, values)) + " |")


def agreement(row: dict[str, Any]) -> str:
    errors = f"value {row['value_error']:.1e}, gradient {row['gradient_error']:.1e} from float64"
    return f"{'agree' if row['agree'] else 'DO NOT AGREE'} ({errors})"


def verdict(row: dict[str, Any]) -> list[str]:
    return [] if "agree" not in row else ["agrees" if row["agree"] else "DOES NOT AGREE"]


def reason(row: dict[str, Any]) -> str:
    return str(row.get("skipped") or row.get("failed") or "")


def cell(value: Any) -> str:
    return "–" if value is None else f"{value:,.4g}" if isinstance(value, float) else str(value)


# --- all of it --------------------------------------------------------------------------------------------------------


def main(arguments: list[str] | None = None) -> int:
    """Measure everything; 1 where something failed or does not agree."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10, help="after which no case is begun, and one is ended")
    parser.add_argument("--batches", type=int, nargs="*", default=[1024, 512, 4096], help="of whole steps")
    parser.add_argument("--tokens", type=int, nargs="+", default=[77, 20], help="of the longest caption of a batch")
    parser.add_argument("--compile", choices=("on", "off", "both"), default="both", help="torch.compile of the towers")
    parser.add_argument("--model", default="ViT-B-32", help="an open_clip name")
    parser.add_argument("--precision", choices=("bf16", "fp32"), default="bf16", help="of the towers")
    parser.add_argument("--loss-batches", type=int, nargs="*", default=[32768, 4096, 16384, 8192])
    parser.add_argument("--loss-cases", nargs="+", default=list(LOSS_CASES), choices=LOSS_CASES, metavar="CASE")
    parser.add_argument("--runs", nargs="*", default=list(RUNS), choices=RUNS, help="whole runs")
    parser.add_argument("--steps", type=int, default=10, help="that are timed, of each case")
    parser.add_argument("--warm", type=int, default=3, help="steps before that, not timed")
    parser.add_argument("--tflops", type=float, help="peak of the GPU in bf16, where its name is not in the table")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--out", type=Path, help="file for the result, JSON")
    parser.add_argument("--measure", type=json.loads, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if min(options.tokens) < 3 or min([2, *options.batches]) < 2 or min([RANKS, *options.loss_batches]) < RANKS:
        parser.error(f"at least 3 tokens, 2 pairs of a step and {RANKS} of the loss")
    if options.measure:
        for piece in measure(options.measure):
            print("\n" + json.dumps(piece), flush=True)
        return 0
    import torch

    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("no NVIDIA GPU here, or torch is built without CUDA; --help ends with a small run on the CPU")
    results: dict[str, Any] = about(options.device)
    results["tflops"] = options.tflops or peak_tflops(results["device"])
    if options.device == "cuda" and not results["tflops"]:
        print(f"the peak of {results['device']} is not known: no MFU; give it with --tflops", file=sys.stderr)
    setting = {key: getattr(options, key) for key in ("model", "precision", "steps", "warm", "device")}
    results |= {"setting": setting} | kept_rows(options.out, {**results, "setting": setting})
    end = time.monotonic() + 60 * options.minutes
    for kind, case in cases(options):
        left = missing(results[kind], case)
        named = ", ".join([kind, *(f"{key} {value}" for key, value in (left or case).items())])
        if left is None:
            print(f"{named}: known", file=sys.stderr, flush=True)
            continue
        if time.monotonic() > end:
            results["not_reached"].append(named)
            continue
        print(named, file=sys.stderr, flush=True)
        known = {key: value for key, value in left.items() if key != "batches"}
        what = {"what": case.get("run") or WHAT[kind], "tflops": results["tflops"], **setting, **left}
        for piece in in_a_process(what, max(1.0, end - time.monotonic())):
            results[kind].append({**known, **piece})
            write(options.out, results)
    write(options.out, results)
    show(results)
    rows = [row for kind in ROWS for row in results[kind]]
    return int(bool(results["not_reached"]) or any("failed" in row or row.get("agree") is False for row in rows))


WHAT = {"steps": "step", "loss": "loss", "agreement": "agreement"}  # list of the result → its measure
RUNS = ("golden", "group", "demo")  # these are measures themselves
ROWS = ("agreement", "loss", "steps", "runs")  # lists of the result


def write(out: Path | None, results: dict[str, Any]) -> None:
    """Replace the file of the result as a whole: a run that is cut off leaves the one before."""
    if out:
        part = out.with_suffix(".part")
        part.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
        part.replace(out)


def kept_rows(out: Path | None, facts: dict[str, Any]) -> dict[str, list[Any]]:
    """The rows of an earlier run that need not be measured again: those that did not fail.

    Args:
        out: its file.
        facts: device, versions and setting, which must be the same.
    """
    rows: dict[str, list[Any]] = {kind: [] for kind in (*ROWS, "not_reached")}
    if out is None or not out.exists():
        return rows
    before = json.loads(out.read_text(encoding="utf-8"))
    differing = [key for key, value in facts.items() if before.get(key) != value]
    if differing:
        told = "; ".join(f"{key} was {before.get(key)!r}, is {facts[key]!r}" for key in differing)
        raise SystemExit(f"{out}: {told}: take another file")
    return rows | {kind: [row for row in before.get(kind, []) if "failed" not in row] for kind in ROWS}


def missing(rows: list[dict[str, Any]], case: dict[str, Any]) -> dict[str, Any] | None:
    """The part of a case that no row has yet; None where all of it is known."""
    told = {key: value for key, value in case.items() if key != "batches"}
    own = [row for row in rows if told.items() <= row.items()]
    if "batches" not in case:
        return None if own else case
    known = {row.get("batch") for row in own}
    batches = [batch for batch in case["batches"] if batch not in known and None not in known]
    return {**case, "batches": batches} if batches else None


def cases(options: argparse.Namespace) -> Iterator[tuple[str, dict[str, Any]]]:
    """What is measured, a process each: the list of the result that it goes to, and what tells it from others there.

    The most important first: agreement, the loss at the largest batch, steps at their first batch and captions, runs;
    then the rest.
    """
    compiled = {"on": [True], "off": [False], "both": [True, False]}[options.compile]
    if options.loss_batches:
        yield "agreement", {}
        first = [name for name in FIRST_LOSSES if name in options.loss_cases]
        for name in (*first, *(name for name in options.loss_cases if name not in first)):
            yield "loss", {"case": name, "batches": options.loss_batches}
    steps = [(batch, tokens, on) for tokens in options.tokens for on in compiled for batch in options.batches]
    first_steps = [one for one in steps if one[0] == options.batches[0] or one[1:] == (options.tokens[0], compiled[0])]
    for group in (first_steps, [one for one in steps if one not in first_steps]):
        for batch, tokens, on in group:
            yield "steps", {"batch": batch, "tokens": tokens, "compile": on}
        if group is first_steps:
            for run in options.runs:
                yield "runs", {"run": run}


if __name__ == "__main__":
    sys.exit(main())
