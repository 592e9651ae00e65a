"""Settings of a migrated run: config keys with the flag that each came from, as commented TOML."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from disttempnet.config import Config, config_from_table
from disttempnet.sanitize import one_line

_SECTIONS = ("", "data", "model", "loss", "optim", "train", "eval", "reference")
VALUE_COLUMN = 32  # where comments begin, unless the value is longer
WIDTH = 118  # of a line with its comment


@dataclass
class RunSettings:
    """Keys that a training command becomes, and what has none.

    Attributes:
        table: dotted key → value.
        origins: dotted key → the flags that it came from, or why it has this value.
        dropped: (flag as written, why it has no counterpart).
        differs: facts about what is done differently here.
        fill_in: (key or flag, what has to be put in by hand).
        commands: commands that do what flags of the script did beside training.
    """

    table: dict[str, Any] = field(default_factory=dict)
    origins: dict[str, str] = field(default_factory=dict)
    dropped: list[tuple[str, str]] = field(default_factory=list)
    differs: list[str] = field(default_factory=list)
    fill_in: list[tuple[str, str]] = field(default_factory=list)
    commands: list[str] = field(default_factory=list)

    def set(self, key: str, value: Any, origin: str) -> None:
        """Set a config key, and say where its value comes from."""
        self.table[key], self.origins[key] = value, origin

    def nested(self) -> dict[str, Any]:
        """Return the settings as the plain table of a config."""
        result: dict[str, Any] = {}
        for key, value in self.table.items():
            section, _, last = key.rpartition(".")
            (result.setdefault(section, {}) if section else result)[last] = value
        return result

    def checked(self, source: str) -> Config:
        """Return the config of these settings.

        Raises:
            UserError: a value that no run may have; the message names the key, and its flag.
        """
        return config_from_table(self.nested(), source)


def toml(settings: RunSettings, heading: list[str]) -> str:
    """Return the settings as a TOML file with a comment for each key, and the rest of the report as comments."""
    lines = list(heading_lines(heading))
    for section in _SECTIONS:
        keys = [key for key in settings.table if key.rpartition(".")[0] == section]
        if keys and section:
            lines += ["", f"[{section}]"]
        lines += [_line(key.rpartition(".")[2], settings.table[key], settings.origins[key]) for key in keys]
    for title, entries in report(settings).items():
        lines += ["", f"# {title}", *(line for entry in entries for line in _wrapped(entry, "#   "))]
    return "\n".join(lines) + "\n"


def heading_lines(heading: list[str]) -> Iterator[str]:
    """Yield the lines of a comment at the top of a file."""
    for line in heading:
        yield from _wrapped(line, "# ")


def _wrapped(text: str, begin: str) -> list[str]:
    """Return a comment in lines of limited width; commands stay on one line, to be copied."""
    flat = one_line(text)
    if flat.startswith(("disttempnet ", "torchrun ")):
        return [begin + flat]
    return textwrap.wrap(
        flat,
        WIDTH,
        initial_indent=begin,
        subsequent_indent=f"{begin}  ",
        break_long_words=False,
        break_on_hyphens=False,
    )


def report(settings: RunSettings) -> dict[str, list[str]]:
    """Return the lines to read beside the keys, by title."""
    parts = {
        "To fill in": [f"{what}: {why}" for what, why in settings.fill_in],
        "Without a counterpart": [f"{what}: {why}" for what, why in settings.dropped],
        "Differs": settings.differs,
        "Commands": settings.commands,
    }
    return {title: entries for title, entries in parts.items() if entries}


def _line(key: str, value: Any, origin: str) -> str:
    setting = f"{key} = {toml_value(value)}"
    comment = one_line(origin)
    beside = f"{setting:<{VALUE_COLUMN - 1}} # {comment}"
    if comment and len(beside) > WIDTH:
        return "\n".join([*_wrapped(comment, "# "), setting])
    return beside if comment else setting


def toml_value(value: Any) -> str:
    """Return a value as TOML writes it, on one line."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int):
        return str(value)
    if isinstance(value, float):
        return repr(value)
    if isinstance(value, str):
        return _string(value)
    if isinstance(value, Mapping):
        return "{ " + ", ".join(f"{key} = {toml_value(one)}" for key, one in value.items()) + " }"
    return "[" + ", ".join(toml_value(one) for one in value) + "]"


def _string(text: str) -> str:
    escaped = text.replace("\\", "\\\\").replace('"', '\\"')
    return '"' + re.sub(r"[\x00-\x1f\x7f]", lambda found: f"\\u{ord(found[0]):04x}", escaped) + '"'
