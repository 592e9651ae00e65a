"""The command `disttempnet env`: versions, devices and settings, for a report about a fault."""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import sys
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, distribution, requires, version
from pathlib import Path
from typing import Any

from disttempnet.sanitize import redacted
from disttempnet.terminal import say

ENV = """Prints what a report about a fault needs: versions, devices, folders, and the variables of the environment that
change what commands do. Credentials in them are hidden. Nothing is sent anywhere.
"""
# Variables that this package, torch, the hub or a launcher read.
_PREFIXES = (
    "CUDA_", "DISTTEMPNET_", "HF_", "MASTER_", "MKL_", "NCCL_", "OMP_", "OMPI_COMM_WORLD_", "PMI_", "PYTORCH_",
    "TORCH_", "TRANSFORMERS_", "TRITON_",
)  # fmt: skip
# Of a SLURM job only what says where and how wide it runs: others hold its token, its user, its account.
_SLURM = {
    f"SLURM_{name}"
    for name in (
        "ARRAY_TASK_ID", "CPUS_PER_TASK", "GPUS", "GPUS_ON_NODE", "GPUS_PER_NODE", "GPUS_PER_TASK", "JOB_ID",
        "JOB_NODELIST", "JOB_NUM_NODES", "LOCALID", "NNODES", "NODEID", "NTASKS", "NTASKS_PER_NODE", "PROCID",
        "STEP_GPUS", "STEP_ID", "STEP_NODELIST", "STEP_NUM_NODES", "STEP_NUM_TASKS",
    )
}  # fmt: skip
_NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "XDG_CACHE_HOME", "PYTHONPATH", "FORCE_COLOR", "NO_COLOR")
_SECRET = ("TOKEN", "KEY", "SECRET", "PASS", "JWT", "AUTH", "CRED")


def add_env_command(commands: Any) -> None:
    """Add `env` to the commands of the program."""
    env = commands.add_parser(
        "env",
        help="versions, devices and settings, for a report about a fault",
        description=ENV,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    env.add_argument("--json", action="store_true", help="print them as JSON")
    env.set_defaults(run=_env)


def _env(options: argparse.Namespace) -> int:
    found = environment()
    if options.json:
        say(json.dumps(found, indent=2, ensure_ascii=False))
        return 0
    for section, values in found.items():
        say(f"{section}:")
        width = max((len(name) for name in values), default=0)
        for name, value in values.items():
            say(f"  {name:<{width}}  {value}")
    return 0


def environment() -> dict[str, dict[str, str]]:
    """Return section → name → value."""
    return {
        "versions": dict(_versions()),
        "machine": dict(_machine()),
        "devices": dict(_devices()),
        "settings": dict(_settings()),
    }


def _versions() -> Iterator[tuple[str, str]]:
    """Yield each package that this one names, required or optional, with its version."""
    from disttempnet.training.run_info import process_provenance

    known = process_provenance()
    yield "disttempnet", f"{known['versions']['disttempnet']}{_origin(known['git'])}"
    yield "python", f"{platform.python_version()} ({platform.python_implementation()}, {sys.executable})"
    try:
        names = {_bare(requirement) for requirement in requires("disttempnet") or ()}
    except PackageNotFoundError:  # run from its source, by PYTHONPATH alone
        names = known["versions"].keys() - {"python"}
    for name in sorted(names - {"disttempnet"}, key=str.lower):
        try:
            yield name, version(name)
        except PackageNotFoundError:
            yield name, "not installed"


def _bare(requirement: str) -> str:
    """Return the name at the beginning of a requirement."""
    end = next((place for place, letter in enumerate(requirement) if letter in " <>=!~;[("), len(requirement))
    return requirement[:end]


def _origin(revision: str) -> str:
    """Return where the package runs from, with the revision of a checkout; empty for a source that has none."""
    try:
        record = distribution("disttempnet").read_text("direct_url.json") or ""
        how = ["editable" if '"editable": true' in record else "installed"]
    except PackageNotFoundError:  # its version is "not installed"
        how = []
    how += [f"git {revision}"] if revision else []
    return f" ({', '.join(how)})" if how else ""


def _machine() -> Iterator[tuple[str, str]]:
    from disttempnet.data.builtin.cache import cache_folder
    from disttempnet.io.machine import cores

    yield "system", f"{platform.system()} {platform.release()} {platform.machine()}"
    yield "C library", " ".join(platform.libc_ver()) or "unknown"
    yield "cores", f"{cores()} of {os.cpu_count()}"
    yield "memory", f"{gigabytes:,.1f} GB" if (gigabytes := _memory_gb()) else "unknown"
    for name, folder in (("cache", cache_folder()), ("working folder", Path.cwd())):
        existing = next(path for path in (folder, *folder.parents) if path.exists())
        yield name, f"{folder} ({shutil.disk_usage(existing).free / 1e9:,.1f} GB free)"


def _memory_gb() -> float:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9
    except (OSError, ValueError):
        return 0.0


def _devices() -> Iterator[tuple[str, str]]:
    import torch

    yield "torch built for", f"CUDA {torch.version.cuda}" if torch.version.cuda else "the CPU"
    yield "threads", str(torch.get_num_threads())
    if not torch.cuda.is_available():
        yield "GPUs", "none that torch can use"
        return
    for number in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(number)
        memory = f"{properties.total_memory / 1e9:.0f} GB, capability {properties.major}.{properties.minor}"
        yield f"GPU {number}", f"{properties.name}, {memory}"
    yield "bf16", "yes" if torch.cuda.is_bf16_supported() else "no"


def _settings() -> Iterator[tuple[str, str]]:
    """Yield the variables of the environment that change what commands do."""
    for name in sorted(os.environ):
        if name in _NAMES or name in _SLURM or name.startswith(_PREFIXES):
            hidden = any(word in name.upper() for word in _SECRET)
            yield name, "***" if hidden and os.environ[name] else redacted(os.environ[name])
