"""`disttempnet migrate`: a training script → a config that the reader of configs accepts, and a report about it."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from disttempnet.config import Config
from disttempnet.errors import UserError
from disttempnet.migrate import first_code, open_clip
from disttempnet.migrate.flags import Values, read_flags
from disttempnet.migrate.launcher import NO_LAUNCHER, count_processes, launch_words, sbatch_options
from disttempnet.migrate.script import Command, Script, Word, read_script
from disttempnet.migrate.settings import RunSettings, report, toml

LARGEST_SCRIPT = 1_000_000  # characters
SHOWN_FLAGS = 60  # characters of a command in a list


@dataclass(frozen=True)
class TrainingCall:
    """A command that trains.

    Attributes:
        family: whose code it is.
        program: its file or module.
        prefix: the words before the program.
        flags: the words behind it.
        line: of the script.
        conditional: it stands in a loop or a condition.
    """

    family: str
    program: str
    prefix: tuple[Word, ...]
    flags: tuple[Word, ...]
    line: int
    conditional: bool


@dataclass(frozen=True)
class Migration:
    """Result of a migration: the config, and what to know beside it.

    Attributes:
        text: the TOML file.
        settings: its keys, and the report.
        call: the command that was read.
        launch: options of `disttempnet launch`; empty without #SBATCH lines.
        processes: of the run.
    """

    text: str
    settings: RunSettings
    call: TrainingCall
    launch: tuple[str, ...]
    processes: int

    @property
    def title(self) -> str:
        """The command that was read, in words."""
        count = f"{self.processes} process{'es' if self.processes > 1 else ''}"
        return f"line {self.call.line}: {self.call.program} of {self.call.family}, {count}"

    @property
    def report(self) -> dict[str, list[str]]:
        """Lines to read beside the keys, by title."""
        return report(self.settings)


def migrate(
    text: str,
    source: str,
    given: Mapping[str, str] | None = None,
    number: int = 0,
    processes: int = 0,
    out: str = "run.toml",
) -> Migration:
    """Translate a script.

    Args:
        text: of the script.
        source: its path, for messages and comments.
        given: variables that the script takes from elsewhere.
        number: which of its training commands, from 1; 0 = the only one.
        processes: of the run, where the script does not say it; 0 = as it says.
        out: the file that the config goes to, for the commands that are shown.

    Raises:
        UserError: no training command or several, a number that the script does not say, a value that no run may have.
    """
    try:
        script = read_script(text, given)
        call = _chosen(script, number, source)
        return _migrated(script, call, source, processes, out)
    except UserError as error:
        message = str(error)
        raise (error if message.startswith(source) else UserError(f"{source}: {message}")) from None


def read_text(path: Path) -> str:
    """Return the text of a script.

    Raises:
        UserError: it cannot be read, or is no text.
    """
    try:
        with path.open(encoding="utf-8-sig") as file:
            text = file.read(LARGEST_SCRIPT + 1)
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise UserError(f"{path}: not UTF-8 text: is it a script?") from None
    if len(text) > LARGEST_SCRIPT:
        raise UserError(f"{path}: over {LARGEST_SCRIPT:,} characters: no training script")
    return text


def training_calls(script: Script) -> list[TrainingCall]:
    """Return the commands of a script that call a training program."""
    return [call for command in script.commands if (call := _call(command))]


def _call(command: Command) -> TrainingCall | None:
    words = command.words
    for place, word in enumerate(words):
        flags = words[place + 1 :]
        family = ""
        if word.text.rpartition("/")[2] in first_code.PROGRAMS:
            family = "the first code"
        elif (place and words[place - 1].text == "-m" and word.text in open_clip.MODULES) or word.text.endswith(
            open_clip.FILES
        ):
            family = "FastCLIP" if open_clip.is_fastclip([one.text for one in flags]) else "open_clip"
        if family:
            return TrainingCall(family, word.text, words[:place], flags, command.line, command.conditional)
    return None


def _chosen(script: Script, number: int, source: str) -> TrainingCall:
    calls = training_calls(script)
    if not calls:
        _tell_of_evaluation(script, source)
        raise UserError(
            f"{source}: no training command: none calls {', '.join(first_code.PROGRAMS)}, -m open_clip_train.main, "
            "-m training.main or training/main.py"
        )
    if not number and len(calls) > 1:
        shown = [
            f"{place}: line {call.line}, {' '.join(one.text for one in call.flags)[:SHOWN_FLAGS]}…"
            for place, call in enumerate(calls, 1)
        ]
        raise UserError(f"{source}: {len(calls)} training commands; choose one by --call N ({'; '.join(shown)})")
    if number > len(calls):
        raise UserError(f"{source}: --call {number}: it has {len(calls)} training command{'s'[: len(calls) > 1]}")
    return calls[max(number, 1) - 1]


def _tell_of_evaluation(script: Script, source: str) -> None:
    """Raise UserError with the commands that do the same, where the first code's evaluate.py is called."""
    for command in script.commands:
        words = [word.text for word in command.words]
        if any(word.endswith("evaluate.py") for word in words) and "--use_model" in words[:-1]:
            model = words[words.index("--use_model") + 1].split()
            root = words[words.index("--data_dir") + 1] if "--data_dir" in words[:-1] else "DATACOMP"
            raise UserError(
                f"{source}: line {command.line} evaluates, it trains nothing. The same: disttempnet import "
                f"{model[-1] if model else 'CHECKPOINT.pth'} --out runs/imported; disttempnet evaluate runs/imported "
                f"--data-root {root}"
            )


def _migrated(script: Script, call: TrainingCall, source: str, given_processes: int, out: str) -> Migration:
    # Read the flags by the table of the family.
    tables = {
        "the first code": first_code.FIRST_CODE_FLAGS,
        "open_clip": open_clip.OPEN_CLIP_FLAGS,
        "FastCLIP": open_clip.FASTCLIP_FLAGS,
    }
    values = read_flags(call.flags, tables[call.family], script.why_unset)

    # Count the processes: as asked, by the launcher, by the job, by the first code's flag.
    options = sbatch_options(script.directives)
    count, said = given_processes, "--processes"
    if not count:
        found = count_processes(call.prefix, options)
        count, said = found.count or 0, found.source
        if call.family == "the first code" and (not count or said == NO_LAUNCHER):
            given = values.has("--world_size")
            count, said = values["--world_size"], values.as_written("--world_size") if given else "the code's default"
    if not count:
        raise UserError("how many processes train is said nowhere: give --processes N")

    # Translate, and add what is common to all families.
    if call.family == "the first code":
        settings = first_code.first_code_settings(call.program.rpartition("/")[2], values, count)
    else:
        settings = open_clip.open_clip_settings(values, count, Path(source).stem)
    _say_leftovers(settings, values, script, call)
    launch: list[str] = []
    if options:
        launch, left = launch_words(options, count)
        settings.dropped += left
        settings.commands.insert(0, shlex.join(["disttempnet", "launch", out, *launch]))
    elif count > 1:
        settings.commands.insert(0, f"torchrun --nproc_per_node {count} -m disttempnet train {shlex.quote(out)}")
    else:
        settings.commands.insert(0, f"disttempnet train {shlex.quote(out)}")

    # The config must be one that a run takes, keys and values, objective and all.
    config = settings.checked("the config of this script")
    _refuse_wrong_objective(config.loss.name, config.loss.arguments)
    _refuse_wrong_optimizer(config)
    heading = [
        f"Written by `disttempnet migrate {source}` from line {call.line}, {call.program} of {call.family}.",
        f"{count} process{'es' if count > 1 else ''} ({said}).",
    ]
    return Migration(toml(settings, heading), settings, call, tuple(launch), count)


def _say_leftovers(settings: RunSettings, values: Values, script: Script, call: TrainingCall) -> None:
    """Add what belongs to no family: unknown flags, repeated ones, the folder, the place of the command."""
    for words in values.unknown:
        if words[0].unset and not words[0].text.startswith("-"):
            settings.fill_in += [
                (word.text, f"its flags are not read: {values.explain(word)}") for word in words if word.unset
            ]
            words = tuple(word for word in words if not word.unset)
            if not words:
                continue
        settings.dropped.append((" ".join(word.text for word in words), f"{call.family} has no such flag: unknown"))
    for name in values.repeated:
        settings.differs.append(f"{name} is given several times: the last one counts, {values.as_written(name)}")
    if script.folder:
        settings.differs.append(f"the script changes to {script.folder}: relative paths begin there")
    for command in script.commands:
        if command.line > call.line and command.words[0].text.startswith("-"):
            text = " ".join(word.text for word in command.words)
            why = f"line {command.line} is no part of the command: the line above does not end with a backslash"
            settings.dropped.append((text, why))
    if call.conditional:
        settings.differs.append(f"the command of line {call.line} is in a loop or a condition: one of several runs")

    # Nothing is silent: a flag that no key, comment or command names is listed with what the table says of it.
    said = [*settings.origins.values(), *settings.differs, *settings.commands]
    said += [text for pair in (*settings.dropped, *settings.fill_in) for text in pair]
    for name, words in values.given.items():
        if not any(re.search(rf"(?<![\w-]){name}(?![\w-])", text) for text in said):
            flag = values.table[name]
            settings.dropped.append((values.as_written(name), flag.about or f"see {flag.becomes}"))
        without_effect = any(what.split(" ")[0] == name for what, _ in settings.dropped)
        for word in words:
            if word.unset and not without_effect and not any(name in what for what, _ in settings.fill_in):
                settings.fill_in.append((values.as_written(name), values.explain(word)))


def _refuse_wrong_objective(name: str, arguments: dict[str, Any]) -> None:
    from disttempnet.losses import build_loss  # imports torch, so it comes after all other checks

    try:
        build_loss(name, num_samples=1, embed_dim=8, **arguments)
    except ValueError as error:
        raise UserError(f"[loss] {error}") from None


def _refuse_wrong_optimizer(config: Config) -> None:
    import disttempnet.models  # noqa: F401  first: it lets torchvision load beside a CPU-only torch
    from disttempnet.training.optim import refuse_unusable  # imports torch

    refuse_unusable(config.optim, config.train.shard)
