"""Pages of the reference, generated from the code: commands, config keys, objectives, the Python API.

`tools/build_site.py` writes them beside the pages of docs/; nothing of them is typed by hand.
"""

import argparse
import html
import os
import re
from collections.abc import Iterator
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin
from unittest.mock import patch

import disttempnet
from disttempnet.cli.main import build_parser
from disttempnet.config import Config, Section
from disttempnet.config.schema import SourceConfig
from disttempnet.io.ranges import Range
from disttempnet.losses import ARGUMENT_RANGES, OBJECTIVES

PLAIN = {"COLUMNS": "100", "NO_COLOR": "1"}  # environment in which argparse formats usage and help
WORDS = {str: "string", bool: "true or false", int: "integer", float: "number"}
MARKUP = str.maketrans({character: f"&#{ord(character)};" for character in "*_|[]{}~"})


def pages() -> dict[str, str]:
    """Return the generated pages: path below docs/ → Markdown."""
    return {
        "reference/commands.md": commands_page(),
        "reference/config.md": config_page(),
        "reference/objectives.md": objectives_page(),
        "reference/api.md": api_page(),
    }


def commands_page() -> str:
    """Return the page of every command: usage, arguments, and the text of `--help`."""
    with patch.dict(os.environ, PLAIN):
        parts = [
            "# Commands",
            "Every command has this text as `--help`. An error is one line and exit code 2.",
            *(part for parser, summary in _commands(build_parser()) for part in _command(parser, summary)),
        ]
    return "\n\n".join(parts) + "\n"


def _commands(parser: argparse.ArgumentParser) -> Iterator[tuple[argparse.ArgumentParser, str]]:
    """Yield each command that does something with its line of help, in the order of `--help`."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            summaries = {choice.dest: choice.help or "" for choice in action._choices_actions}
            for name, command in action.choices.items():
                if any(isinstance(inner, argparse._SubParsersAction) for inner in command._actions):
                    yield from _commands(command)
                else:
                    yield command, summaries[name]


def _command(parser: argparse.ArgumentParser, summary: str) -> Iterator[str]:
    yield f"## {parser.prog}"
    yield f"{_cell(_sentence(summary))}"
    yield _block(parser.format_usage().removeprefix("usage: "))
    formatter = parser._get_formatter()
    rows = [
        (_code(_written(action)), _cell(formatter._expand_help(action)))
        for action in parser._actions
        if not isinstance(action, argparse._HelpAction)
    ]
    yield _table(("argument", ""), rows)
    for text in (parser.description, parser.epilog):
        text = (text or "").removesuffix("\nKeys:\n").strip()  # the keys have a page of their own
        if text and text != summary:
            yield _block(text)


def _written(action: argparse.Action) -> str:
    """Return an argument as one writes it: `--jobs N`, `RUN …`."""
    value = action.metavar or ("|".join(map(str, action.choices)) if action.choices else action.dest)
    value = value if isinstance(value, str) else " ".join(value)
    if action.nargs == 0:
        value = ""
    elif action.nargs in ("+", "*"):
        value += " …"
    elif action.nargs == "?":
        value = f"[{value}]"
    return f"{', '.join(action.option_strings)} {value}".strip()


def config_page() -> str:
    """Return the page of every config key: type and range, default, meaning."""
    top = [
        (name, field)
        for name, field in Config.model_fields.items()
        if not _is_section(field.annotation) and name != "loss"
    ]
    parts = [
        "# Config keys",
        "The keys of a run's TOML file, and of overrides on a command line (`train.epochs=20`). Unknown keys and wrong "
        "types are refused. A key without a default is required; the shipped configs set all of those.",
        "## At the top",
        _keys("", top),
    ]
    for name, field in Config.model_fields.items():
        if name == "loss":
            parts += [
                "## [loss]",
                "`loss.name` is one of the [objectives](objectives.md); the other keys are its arguments. An "
                "override of `loss.name` drops the file's whole `[loss]`.",
            ]
        elif _is_section(field.annotation):
            section = field.annotation
            parts += [f"## [{name}]", section.__doc__ or "", _keys(f"{name}.", section.model_fields.items())]
            if name == "data":
                parts += [
                    "## A source of data.train",
                    "`data.train` may be a list of tables with these keys.",
                    _keys("", SourceConfig.model_fields.items()),
                ]
    return "\n\n".join(parts) + "\n"


def _is_section(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, Section)


def _keys(prefix: str, fields: Any) -> str:
    rows = [
        (
            _code(prefix + key),
            _cell(_type(field)),
            "required" if field.is_required() else _code(_toml(field.default)),
            _cell(field.description or ""),
        )
        for key, field in fields
    ]
    return f'<div class="keys" markdown>\n\n{_table(("key", "type", "default", ""), rows)}\n\n</div>'


def _type(field: Any) -> str:
    """Return the type of a config key in words, with its range."""
    ranges = [str(one) for one in field.metadata if isinstance(one, Range)]
    return " ".join([_kind(field.annotation), *ranges])


def _kind(annotation: Any) -> str:
    if get_origin(annotation) is Literal:
        return ", ".join(f"`{_toml(value)}`" for value in get_args(annotation))
    if get_origin(annotation) in (Union, UnionType):
        return " or ".join(_kind(one) for one in get_args(annotation))
    if get_origin(annotation) is tuple:
        one = get_args(annotation)[0]
        return "list of " + ("sources" if one is SourceConfig else "strings")
    if hasattr(annotation, "__metadata__"):
        return _kind(annotation.__origin__)
    return WORDS[annotation]


def _toml(value: Any) -> str:
    """Return a default as it stands in TOML."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        return f'"{value}"'
    if isinstance(value, tuple):
        return f"[{', '.join(map(_toml, value))}]"
    return str(value)


def objectives_page() -> str:
    """Return the page of every objective: formula, temperature, γ, state, source, arguments with default and range."""
    parts = [
        "# Objectives",
        "The rows of `OBJECTIVES`; `disttempnet objectives` prints the same. [The mathematics](../objectives.md) has "
        "the symbols, the estimator and the differences to published code. State is in float32, where every rank holds "
        "all of it.",
    ]
    for name, recipe in OBJECTIVES.items():
        source = re.sub(r"\b(\d{4}\.\d{5})\b", r"[\1](https://arxiv.org/abs/\1)", recipe.source)
        parts += [
            f"## {name}",
            f"**{_cell(recipe.title)}**, {source}" + (f". {_sentence(recipe.note)}" if recipe.note else ""),
            _block(recipe.formula),
            f"Temperature: {_cell(recipe.temperature)}. γ: {_cell(recipe.gamma)}. "
            f"State: {recipe.bytes_a_sample()} bytes a sample.",
        ]
        if recipe.arguments:
            rows = [
                (_code(key), _code(_toml(value)), _cell(str(ARGUMENT_RANGES.get(key, ""))))
                for key, value in recipe.arguments.items()
            ]
            parts.append(_table(("argument", "default", "range"), rows))
    return "\n\n".join(parts) + "\n"


def api_page() -> str:
    """Return the page of the public names of `disttempnet`, which mkdocstrings fills from their docstrings."""
    names = [name for name in disttempnet.__all__ if not name.startswith("_")]
    parts = [
        "# Python API",
        "The names that `import disttempnet` gives. [In your own loop](../objectives.md#in-your-own-loop) puts them "
        "together; `OBJECTIVES` maps the name of each [objective](objectives.md) to its row.",
        *(f"::: disttempnet.{name}" for name in sorted(names, key=str.lower)),
    ]
    return "\n\n".join(parts) + "\n"


def _table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    lines = [head, ("---",) * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _block(text: str) -> str:
    return f"```text\n{text.strip()}\n```"


def _code(text: str) -> str:
    return f"<code>{_escaped(text)}</code>"


def _cell(text: str) -> str:
    """Return plain text as a cell of Markdown: `code` stays code, all else is literal."""
    parts = re.split(r"`([^`]*)`", " ".join(text.split()))
    return "".join(_code(part) if i % 2 else _escaped(part) for i, part in enumerate(parts))


def _escaped(text: str) -> str:
    return html.escape(text, quote=False).translate(MARKUP)


def _sentence(text: str) -> str:
    return f"{text[:1].upper()}{text[1:]}" + ("" if text.endswith(".") else ".")
