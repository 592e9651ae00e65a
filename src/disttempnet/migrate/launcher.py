"""Launchers: what srun, torchrun, mpirun and #SBATCH lines say about the processes of a run."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from disttempnet.errors import UserError
from disttempnet.migrate.script import Word

_SHORT = {
    "-N": "--nodes", "-n": "--ntasks", "-t": "--time", "-p": "--partition", "-A": "--account", "-J": "--job-name",
    "-c": "--cpus-per-task", "-G": "--gpus", "-a": "--array", "-o": "--output", "-e": "--error", "-q": "--qos",
    "-C": "--constraint", "-w": "--nodelist", "-x": "--exclude", "-d": "--dependency", "-D": "--chdir",
}  # fmt: skip
_SWITCHES = {"--exclusive", "--requeue", "--no-requeue", "--overcommit", "--hold", "--contiguous", "--verbose"}
_COUNTED = {  # options that say how many processes run, or that `launch` has
    "--nodes", "--ntasks", "--ntasks-per-node", "--gres", "--gpus", "--gpus-per-node", "--gpus-per-task", "--time",
    "--partition", "--account", "--tasks-per-node",
}  # fmt: skip
_LEFT_OUT = {
    "--job-name": "the job is called as the run",
    "--cpus-per-task": "`launch` asks for data.workers + 2",
    "--output": "`launch` writes NAME-JOBID.log",
    "--error": "`launch` writes NAME-JOBID.log",
    "--open-mode": "`launch` appends",
    "--requeue": "`launch` requeues at the time limit",
    "--signal": "`launch` has its own: it saves and requeues",
    "--array": "for a run a seed: launch --seeds",
}
_BY_HAND = "`launch` has no such option: put it into the script that launch --dry-run prints"
# launchers that start the processes of one node, and their options
_LOCAL = {"torchrun", "torch.distributed.launch", "torch.distributed.run"}
_PER_NODE = ("--nproc_per_node", "--nproc-per-node")
_NODES = ("--nnodes",)
NO_LAUNCHER = "the command has no launcher"
_TOTAL = ("-np", "-n", "--np")  # of mpirun


@dataclass(frozen=True)
class Processes:
    """Processes of a command.

    Attributes:
        count: their number; None where nothing says it.
        source: what says so, as it is written.
    """

    count: int | None = None
    source: str = ""


def sbatch_options(words: Sequence[str]) -> dict[str, str]:
    """Return option → value of #SBATCH lines, by their long names."""
    options: dict[str, str] = {}
    rest = list(words)
    while rest:
        word = rest.pop(0)
        name, equals, value = word.partition("=")
        if not name.startswith("--") and len(name) > 2 and name[:2] in _SHORT:
            name, value, equals = name[:2], word[2:].removeprefix("="), "="  # -N4
        name = _SHORT.get(name, name)
        if not equals and name not in _SWITCHES and rest and not rest[0].startswith("-"):
            value = rest.pop(0)
        options[name] = value
    return options


def gpus_per_node(options: dict[str, str]) -> int | None:
    """Return the GPUs of a node that #SBATCH lines ask for: `--gres=gpu:a100:2`, `--gpus-per-node=2`."""
    nodes = _number(options.get("--nodes"))
    for option in ("--gpus-per-node", "--gres"):
        for part in options.get(option, "").split(","):
            if option == "--gres" and not part.startswith("gpu"):
                continue
            if part and (count := _number(part.rpartition(":")[2] if ":" in part or option != "--gres" else "1")):
                return count
    if (total := _number(options.get("--gpus", "").rpartition(":")[2])) and nodes and total % nodes == 0:
        return total // nodes
    return None


def _tasks(options: dict[str, str]) -> tuple[int | None, int | None, str]:
    """Return processes, nodes, and what says so."""
    nodes = _number(options.get("--nodes"))
    per_node_name = next((n for n in ("--ntasks-per-node", "--tasks-per-node") if n in options), "")
    per_node, total = _number(options.get(per_node_name)), _number(options.get("--ntasks"))
    if total:
        if nodes is None and per_node:
            nodes = -(-total // per_node)
        return total, nodes, f"--ntasks={total}"
    if nodes and per_node:
        return nodes * per_node, nodes, f"--nodes={nodes} × {per_node_name}={per_node}"
    return None, nodes, ""


def launch_words(options: dict[str, str], processes: int) -> tuple[list[str], list[tuple[str, str]]]:
    """Return the options of `disttempnet launch` for #SBATCH lines, and those that have none with the reason.

    Args:
        options: of the #SBATCH lines.
        processes: of the run.
    """
    _, nodes, _ = _tasks(options)
    per_node = gpus_per_node(options) or _number(options.get("--ntasks-per-node"))
    if nodes is None and per_node and processes % per_node == 0:
        nodes = processes // per_node
    nodes = nodes or 1
    words = ["--nodes", str(nodes), "--gpus", str(-(-processes // nodes))]
    for option in ("--time", "--partition", "--account"):
        if options.get(option):
            words += [option, options[option]]
    left = [
        (f"#SBATCH {name}={value}" if value else f"#SBATCH {name}", _LEFT_OUT.get(name, _BY_HAND))
        for name, value in options.items()
        if name not in _COUNTED
    ]
    if processes % nodes:
        left.append((f"{processes} processes", f"are no multiple of {nodes} nodes, which `launch` fills evenly"))
    return words, left


def count_processes(prefix: Sequence[Word], options: dict[str, str]) -> Processes:
    """Return the processes of a command.

    Args:
        prefix: the words before the program: `srun`, `torchrun --nproc_per_node 8 -m`.
        options: of the #SBATCH lines, which srun follows.

    Raises:
        UserError: a number that is set elsewhere, or `gpu`.
    """
    names = [word.text.rpartition("/")[2] for word in prefix]
    asked, nodes, source = _tasks(options)

    # torchrun: processes of a node × nodes; where srun starts one torchrun a node, the nodes are the job's
    if local := next((name for name in names if name in _LOCAL), ""):
        per_node = _option(prefix, _PER_NODE)
        own_nodes = _option(prefix, _NODES)
        nodes = _whole(own_nodes, "--nnodes") if own_nodes else (nodes if "srun" in names else None)
        if per_node is None:
            return Processes(nodes or 1, f"{local} without --nproc_per_node")
        each = _whole(per_node, "--nproc_per_node")
        times = f" × {nodes} nodes" if nodes and nodes > 1 else ""
        return Processes(each * (nodes or 1), f"--nproc_per_node {each}{times}")

    # mpirun says it itself; srun's own options come before the job's
    if any(name in ("mpirun", "mpiexec", "horovodrun") for name in names):
        count = _option(prefix, _TOTAL)
        return Processes(_whole(count, "-np"), f"-np {count.text}") if count else Processes(asked, source)
    if "srun" in names:
        start = names.index("srun")
        own = sbatch_options([word.text for word in prefix[start + 1 :] if not word.unset])
        asked, _, source = _tasks({**options, **{key: value for key, value in own.items() if key in _COUNTED}})
        return Processes(asked, source)
    return Processes(1, NO_LAUNCHER)


def _option(words: Sequence[Word], names: Iterable[str]) -> Word | None:
    """Return the value of the first of these options: `--name value` or `--name=value`."""
    wanted = tuple(names)
    for place, word in enumerate(words):
        name, equals, value = word.text.partition("=")
        if name in wanted:
            if equals:
                return Word(value, word.unset)
            return words[place + 1] if place + 1 < len(words) else None
    return None


def _whole(word: Word, option: str) -> int:
    number = None if word.unset else _number(word.text.rpartition(":")[2])  # --nnodes=1:4: as many as it may have
    if number is None:
        raise UserError(f"{option} {word.text}: no number: give the number of processes by --processes N")
    return number


def _number(text: str | None) -> int | None:
    """Return a positive whole number; None where the text is none (`8-16` of --nodes, a variable)."""
    found = re.fullmatch(r"0*([1-9]\d{0,6})", text or "")
    return int(found[1]) if found else None
