"""The command line: `disttempnet COMMAND`. Heavy imports wait until a command needs them."""

from __future__ import annotations

import argparse
import os
import sys
import textwrap
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from disttempnet.cli.completion import add_completion_command
from disttempnet.cli.data import add_data_commands
from disttempnet.cli.embed import add_embed_command
from disttempnet.cli.environment import add_env_command
from disttempnet.cli.evaluate import add_evaluate_command
from disttempnet.cli.export import add_export_command
from disttempnet.cli.launch import add_launch_command
from disttempnet.cli.migrate import add_migrate_commands
from disttempnet.cli.push import add_push_command
from disttempnet.cli.search import add_search_commands
from disttempnet.errors import TERMINATED, Preempted, UserError, show_notices_plainly, unknown_name
from disttempnet.io.machine import memory_named, open_files, open_files_named
from disttempnet.io.paths import path_argument
from disttempnet.io.ranges import BATCH, Range, integers
from disttempnet.terminal import say, take_any_text

if TYPE_CHECKING:
    from disttempnet.config import Config

DESCRIPTION = "Train CLIP models with robust global contrastive losses and per-sample temperatures."
EXAMPLES = """examples:
  disttempnet demo                                        train CLIP and other objectives on emoji, compare, report
  disttempnet train demo name=mine train.epochs=20 loss.rho=3
  disttempnet train demo --resume auto                    resume after an interruption
  torchrun --nproc_per_node 2 -m disttempnet train demo
  disttempnet launch demo --nodes 4 --gpus 2 --dry-run    the same as a SLURM job
  disttempnet objectives                                  values of [loss] name
  disttempnet compare compare --jobs 2                    objectives x seeds, a table over seeds, a report
  disttempnet evaluate runs/demo
  disttempnet search runs/demo photos "a red apple"       the nearest images; classify: classes of your own
  disttempnet report runs/demo runs/demo-clip --out report.html
  disttempnet temperature runs/demo --gallery temperatures.html
"""

COMPARE = """The file defines the runs: a base config, seeds, and one table for each run.

  config = "demo.toml"                     base config of all runs
  out = "runs/compare"                     folder of run folders, RUN--seed-S
  baseline = "clip"                        the run that the others are compared with (default: the first)
  seeds = [1, 2, 3]                        all runs of the first seed come first
  [common]                                 config keys of every run:  train.epochs = 4
  [vary]                                   every run at each value:   data.global_batch = [32, 128, 512]
  [runs.clip]                              one table for each run; its loss replaces the base's completely
  loss = { name = "clip" }
  [tune]                                   chooses settings of each run, at each value of vary, before the seeds:
  metric = "validation/mean_recall"        TASK/METRIC to choose by; other tasks are not asked by the trials
  seed = 0                                 of the trials; widen = 2: values that may be added beyond an edge
  [tune.values]                            tried for every run:  optim.lr = [3e-4, 1e-3, 3e-3]
  [runs.clip.tune]                         tried for this run:   loss.temperature = [0.02, 0.05, 0.1]

All configs are checked before the first run starts. Finished runs are skipped. After Ctrl-C or a kill the same command
resumes every run. At the end it prints the table over seeds: mean (std), and the difference of each run to the
baseline, paired by seed, with its 95 % confidence interval. It writes OUT/report.html and OUT/results.jsonl (a line for
each run; `disttempnet report` reads it without the run folders). OUT/tuning.jsonl holds the trials and what was chosen.
With [vary], the baseline has the same varied values.

examples:
  disttempnet compare compare --list
  disttempnet compare compare --jobs 4
  disttempnet compare compare seeds=[1] train.epochs=2 out=runs/quick
"""

TRAIN = """Any config key can be given as section.key=value. A file with config = "BASE.toml" (a path relative to it, or
a shipped config) holds only the differences to BASE; a loss with a name replaces BASE's completely.
Paths may begin with ~. Strings need no quotes: name=2024-05-01 is a name, not a date.

Keys:
"""

REPORT = """The ending of --out selects the report:

  .html    run folders with different configs: a page about these runs in depth, the first one leading;
           several seeds of a config, a folder of run folders, or compact results: a page about groups of seeds
  .md .tex .csv    the table over seeds: mean (standard deviation), and the difference to the baseline, paired by
           seed, with its 95 % confidence interval, in bold where that excludes zero (csv: raw numbers)
  .svg     a figure for a page of your own (light and dark): one metric, its differences, and τ over batch sizes;
           or the differences of up to four metrics, such as head, middle and tail
  .jsonl   compact results, a line for each run: enough to make all tables again without the run folders

Differences need the same training data, the same evaluation, and two seeds that both runs have.

For folders that `evaluate --data-root` wrote (or an eval_results.jsonl): averages beside published ones, ImageNet &
variants, retrieval, every task, and the differences of all others to the baseline; runs that differ only in the seed
share a row. --metrics takes TASK/METRIC and averages/datacomp, imagenet, shifts, vtab, retrieval.

examples:
  disttempnet report runs/demo runs/demo-clip --out report.html
  disttempnet report runs/compare --out table.tex --metrics emoji-concepts/acc1 emoji-concepts/mean_recall
  disttempnet report docs/results/compare.jsonl --out table.md --baseline clip
  disttempnet report docs/results/compare-level.jsonl --out level.svg --metrics scenes/acc1
  disttempnet report runs/*/evaluation evaluation/ViT-B-32-openai --out evaluation.html
"""

TEMPERATURE = """Without --shards, --images or --captions the data set is the run's training data.

The table has a row for each sample: id (in the training data of the run), key, caption, tau_image, tau_text,
log_u_image, log_u_text (tracked normalisers of training samples), and the chosen keys of its .json. Missing values are
empty. Data sets of any size are streamed; torchrun shares the work between GPUs. In a .csv, text that a spreadsheet
would run as a formula (it begins with = + - @) gets an apostrophe before it; in a .parquet it does not.

The page (--gallery) shows the lowest and highest τ with pictures, the distribution of τ, its relation to concept
frequency and caption ambiguity, clusters, and what the network has learned; for networks with prototypes (loss.network
icml24, dist; not mlp, the default of disttempnet-v1 and clip-network) also the prototypes among the features.

Objectives with a τ for each training sample (isogclr, fastclip-v2, clip-per-sample) have none for other samples.

examples:
  disttempnet temperature runs/demo --gallery temperatures.html --frequency-by subgroup
  disttempnet temperature runs/demo --shards '/cc3m/{00000..00331}.tar' --out cc3m.parquet
  disttempnet temperature runs/demo --images photos --out photos.csv --gallery photos.html
  disttempnet temperature runs/demo --captions captions.txt
"""

JOBS = integers(1, 1024)


class Parser(argparse.ArgumentParser):
    """An argparse parser whose errors are one line with the nearest known word."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message.removeprefix('argument ')} (see {self.prog} --help)")

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is not None and value not in action.choices:
            what = "command" if isinstance(action, argparse._SubParsersAction) else "/".join(action.option_strings)
            raise argparse.ArgumentError(None, unknown_name(what or action.dest, str(value), map(str, action.choices)))


def build_parser() -> Parser:
    """Return the parser of all commands, in the order of `disttempnet --help`."""
    parser = Parser(
        prog="disttempnet",
        description=DESCRIPTION,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="store_true", help="print the version and exit")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    _add_demo(commands)
    _add_train(commands)
    _add_objectives(commands)
    _add_compare(commands)
    add_evaluate_command(commands)
    add_embed_command(commands)
    add_export_command(commands)
    add_push_command(commands)
    add_search_commands(commands)
    _add_report(commands)
    _add_temperature(commands)
    add_data_commands(commands)
    add_launch_command(commands)
    add_migrate_commands(commands)
    add_env_command(commands)
    add_completion_command(commands, parser)
    return parser


def _add_demo(commands: Any) -> None:
    demo = commands.add_parser(
        "demo",
        help="train objectives and plain CLIP on the embedded data, compare, report",
        description="Trains heads on two small real towers at a batch of 16: plain CLIP and objectives of this "
        "package, five seeds each. Prints the table of paired differences and writes FOLDER/demo-heads/report.html. "
        "Without the weights of the towers, or with --scratch, trains DistTempNet-v1 and CLIP from scratch and writes "
        "FOLDER/demo-report.html. After an interruption the same command goes on.",
    )
    demo.add_argument("--out", type=path_argument, metavar="FOLDER", help="folder of run folders (default: runs)")
    demo.add_argument("--fresh", action="store_true", help="remove an earlier demo in that folder and start over")
    demo.add_argument("--scratch", action="store_true", help="train small towers from scratch")
    demo.add_argument("overrides", nargs="*", metavar="key=value", help="config keys for all runs, e.g. train.epochs=2")
    demo.set_defaults(run=_demo)


def _add_train(commands: Any) -> None:
    train = commands.add_parser(
        "train",
        help="train one run from a TOML config",
        epilog=TRAIN + config_reference(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    train.add_argument("config", help="a TOML file, or the name of a shipped config: demo")
    train.add_argument(
        "--resume",
        type=path_argument,
        default="never",
        metavar="auto|CHECKPOINT",
        help="auto: resume from the last checkpoint of the run, if there is one; or a checkpoint folder",
    )
    train.add_argument("overrides", nargs="*", metavar="key=value", help="config keys, e.g. optim.lr=1e-3")
    train.set_defaults(run=_train)


def _add_objectives(commands: Any) -> None:
    objectives = commands.add_parser(
        "objectives", help="values of [loss] name: formula, temperature, γ, state a sample, defaults, source"
    )
    objectives.add_argument("names", nargs="*", metavar="NAME", help="only these (default: all)")
    objectives.set_defaults(run=_objectives)


def _add_compare(commands: Any) -> None:
    compare = commands.add_parser(
        "compare",
        help="train objectives x seeds from a grid file, compare them over seeds",
        description=COMPARE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    compare.add_argument("grid", help="a TOML file, or the name of a shipped one: compare")
    compare.add_argument(
        "--jobs", type=JOBS.parse, default=1, metavar="N", help="runs at a time, each in its own process (default: 1)"
    )
    compare.add_argument("--list", action="store_true", help="print the grid and the state of each run; train nothing")
    compare.add_argument(
        "overrides", nargs="*", metavar="key=value", help="keys of the file, or config keys of every run"
    )
    compare.set_defaults(run=_compare)


def _add_report(commands: Any) -> None:
    report = commands.add_parser(
        "report",
        help="a page about runs, or tables over seeds: HTML, Markdown, LaTeX, CSV",
        description=REPORT,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    report.add_argument(
        "runs",
        nargs="+",
        type=path_argument,
        metavar="RUN",
        help="run folder, folder of run folders, compact .jsonl, or evaluation",
    )
    report.add_argument(
        "--out",
        type=path_argument,
        default="report.html",
        metavar="FILE",
        help=".html .md .tex .csv .svg .jsonl (default: report.html)",
    )
    report.add_argument("--metrics", nargs="+", default=(), metavar="TASK/METRIC", help="columns of the table")
    report.add_argument(
        "--baseline",
        default="",
        metavar="NAME",
        help="the run, without its seed, that others are compared with (default: the first)",
    )
    report.set_defaults(run=_report)


def _add_temperature(commands: Any) -> None:
    temperature = commands.add_parser(
        "temperature",
        help="τ of every sample of a data set as a table, and a page about them",
        description=TEMPERATURE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    temperature.add_argument(
        "target", type=path_argument, metavar="RUN", help="a run folder (its last checkpoint) or a checkpoint folder"
    )
    # the data set: at most one of these
    data = temperature.add_mutually_exclusive_group()
    data.add_argument(
        "--shards", type=path_argument, metavar="SPEC", help="pairs: shards or a listing, as in data.train"
    )
    data.add_argument(
        "--images", type=path_argument, metavar="DIR", help="images only: .jpg .jpeg .png .webp, at any depth"
    )
    data.add_argument("--captions", type=path_argument, metavar="FILE", help="captions only: one a line")
    # the outputs
    temperature.add_argument(
        "--out", type=path_argument, metavar="FILE", help="table, .csv or .parquet (default: RUN/temperatures.csv)"
    )
    temperature.add_argument(
        "--columns", nargs="*", default=["label"], metavar="KEY", help="keys of the samples' .json (default: label)"
    )
    temperature.add_argument("--gallery", type=path_argument, metavar="FILE.html", help="also write a page")
    temperature.add_argument(
        "--frequency-by",
        default="label",
        metavar="KEY",
        help="key of the .json to count by (default: label)",
    )
    temperature.add_argument(
        "--batch", type=BATCH.parse, default=256, metavar="N", help="images a forward pass (default: 256)"
    )
    temperature.set_defaults(run=_temperature, memory="lower --batch")


def config_reference() -> str:
    """Return every config key with its default and meaning, for `train --help`."""
    if "train" not in sys.argv:  # only this page needs the config models
        return ""
    from disttempnet.config import Config, Section

    lines = []
    for name, field in Config.model_fields.items():
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, Section):
            lines += [_key_line(f"{name}.{key}", inner) for key, inner in kind.model_fields.items()]
        elif name == "loss":
            lines.append(
                "  loss.name and the arguments of that objective, e.g. loss.rho; another name drops the file's [loss]\n"
                "  (`disttempnet objectives` lists them with their ranges)"
            )
        else:
            lines.append(_key_line(name, field))
    return "\n".join(lines)


def _key_line(key: str, field: Any) -> str:
    """Return a config key with its default, range and meaning."""
    facts = ["required" if field.is_required() else f"default {field.default!r}"]
    facts += [str(one) for one in field.metadata if isinstance(one, Range)]
    return f"  {key}  ({'; '.join(facts)})  {field.description or ''}".rstrip()


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command and return the exit code. A UserError is one line on standard error and code 2."""
    take_any_text()
    try:
        parser = build_parser()
        options = _parsed(parser, arguments)
        if options.version:
            from disttempnet import __version__

            say(f"disttempnet {__version__}")
            return 0
        if options.command is None:
            parser.print_help()
            return 2
        _refuse_repeated(getattr(options, "overrides", ()))
        memory = memory_named(getattr(options, "memory", "work on less at a time"))
        with warnings.catch_warnings(), memory, open_files_named():
            open_files()  # raises the limit
            show_notices_plainly()
            return options.run(options)
    except UserError as error:
        say(f"disttempnet: {error}", error=True)
        return 2
    except Preempted:
        return Preempted.code
    except KeyboardInterrupt:
        say("disttempnet: interrupted", error=True)
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


def _parsed(parser: Parser, arguments: Sequence[str] | None) -> argparse.Namespace:
    """Return the options. Overrides may also follow flags: `train demo.toml --resume auto train.epochs=2`."""
    options, rest = parser.parse_known_args(arguments)
    if any(word.startswith("-") or "=" not in word for word in rest) or (rest and not hasattr(options, "overrides")):
        command = f"disttempnet {options.command or ''}".rstrip()
        say(f"disttempnet: unknown arguments: {' '.join(rest)} (see {command} --help)", error=True)
        parser.exit(2)
    if rest:
        options.overrides += rest
    return options


def _refuse_repeated(overrides: Sequence[str]) -> None:
    """Raise UserError where a key is given twice, as a shell does with an unquoted {0..9}."""
    keys = [override.partition("=")[0].strip() for override in overrides]
    for key in keys:
        if keys.count(key) > 1:
            raise UserError(f"'{key}' is given {keys.count(key)} times; quote a pattern in braces: '{key}=…'")


def _train(options: argparse.Namespace) -> int:
    config = _config_to_train(options)
    from disttempnet.training.trainer import train

    return 0 if train(config, options.resume) else TERMINATED


def _config_to_train(options: argparse.Namespace) -> Config:
    """Return the config. A resumed run may keep values of an older version that are out of range today."""
    from disttempnet.config import load_config

    try:
        return load_config(options.config, options.overrides)
    except UserError:
        if options.resume == "never":
            raise
        config = load_config(options.config, options.overrides, bounds=False)
        if options.resume == "auto" and not (config.folder / "config.toml").is_file():
            raise
        return config


def _objectives(options: argparse.Namespace) -> int:
    from disttempnet.errors import unknown_name
    from disttempnet.losses import ARGUMENT_RANGES, OBJECTIVES

    for name in options.names or OBJECTIVES:
        if name not in OBJECTIVES:
            raise UserError(unknown_name("objective", name, OBJECTIVES))
        recipe = OBJECTIVES[name]
        defaults = "  ".join(f"{key}={value!r}" for key, value in recipe.arguments.items())
        say(f"{name}  ({recipe.title}; {recipe.source})")
        say(f"  minimises    {recipe.formula}")
        say(f"  temperature  {recipe.temperature};  γ {recipe.gamma};  state {recipe.bytes_a_sample()} bytes a sample")
        say(textwrap.fill(defaults, 110, initial_indent="  defaults     ", subsequent_indent=" " * 15))
        ranges = "; ".join(f"{key} {ARGUMENT_RANGES[key]}" for key in recipe.arguments if key in ARGUMENT_RANGES)
        say(textwrap.fill(ranges, 110, initial_indent="  ranges       ", subsequent_indent=" " * 15))
        if recipe.note:
            say(textwrap.fill(recipe.note, 110, initial_indent="  note         ", subsequent_indent=" " * 15))
        say()
    return 0


def _compare(options: argparse.Namespace) -> int:
    from disttempnet.compare import run_compare

    return run_compare(Path(options.grid), options.overrides, options.jobs, options.list)


def _report(options: argparse.Namespace) -> int:
    from disttempnet.report import write_report

    path = write_report([Path(run) for run in options.runs], Path(options.out), options.metrics, options.baseline)
    say(f"report: {path.resolve()}")
    return 0


def _temperature(options: argparse.Namespace) -> int:
    from disttempnet.distributed.launcher import launched
    from disttempnet.temperature.command import TemperatureSource, write_temperatures

    out = Path(options.out or Path(options.target, "temperatures.csv"))
    gallery = Path(options.gallery) if options.gallery else None
    if gallery is not None and gallery.suffix.lower() not in ("", ".htm", ".html"):
        raise UserError(f"--gallery {gallery}: the page is an .html file")
    rows = write_temperatures(
        options.target,
        TemperatureSource(options.shards or "", options.images or "", options.captions or ""),
        out,
        columns=options.columns,
        gallery=gallery,
        frequency_by=options.frequency_by,
        batch=options.batch,
    )
    launch = launched()
    if launch is None or launch.rank == 0:
        say(f"temperatures: {out.resolve()} ({rows:,} rows)")
        if gallery:
            say(f"page: {gallery.resolve()}")
    return 0


def _demo(options: argparse.Namespace) -> int:
    from disttempnet.demo import run_demo

    return run_demo(options.out, options.overrides, options.fresh, options.scratch)
