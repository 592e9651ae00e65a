"""TOML files of runs as plain tables: base files, `section.key=value` overrides.

schema.py defines the keys.
"""

from __future__ import annotations

import copy
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from disttempnet.errors import UserError, notice
from disttempnet.io.paths import expand_home

CONFIG_FOLDER = Path(__file__).parents[1] / "configs"
LARGEST = 10_000_000  # characters of a config file
NOT_TOML = (ValueError, RecursionError)  # also a number of thousands of digits, brackets nested as deep


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def find_config(name: str | Path) -> Path:
    """Return the file that a command's argument names: a path, or a shipped config.

    A shipped config is named with or without .toml, or as in a checkout, `configs/NAME.toml`. Where no such file is,
    a notice says that the shipped one is taken.
    """
    path = _at_home(str(name))
    shipped = CONFIG_FOLDER / f"{path.name.removesuffix('.toml')}.toml"
    bare, in_checkout = str(name) == path.name, path.parent == Path("configs")
    if not (bare or in_checkout) or path.is_file() or not shipped.is_file():
        return path
    if in_checkout:
        notice(f"{path}: no such file here; taking the one that the package ships: {shipped}")
    return shipped


def read_run_table(path: str | Path) -> dict[str, Any]:
    """Return the plain table of a run's TOML file, laid over its base: the file that its key `config` names.

    The file wins over its base, key by key. `loss` is special, as its arguments belong to an objective: with a
    `loss.name` the base's whole `loss` is replaced.

    Args:
        path: a file, or the name of a shipped config.

    Raises:
        UserError: one line that names the file.
    """
    path, tables = find_config(path), list[dict[str, Any]]()
    seen: set[Path] = set()
    while True:
        if path.resolve() in seen:
            raise UserError(f"{path}: its base configs form a circle")
        seen.add(path.resolve())
        table = read_table(path)
        tables.append(table)
        base = table.pop("config", None)
        if base is None:
            break
        if not isinstance(base, str):
            raise UserError(f"{path}: config must name a file, got {base!r}")
        path = base_path(path, base)
    result = tables.pop()
    for table in reversed(tables):
        lay_over(result, table)
    return result


def _at_home(path: str) -> Path:
    try:
        return Path(expand_home(path))
    except ValueError as error:
        raise UserError(str(error)) from None


def base_path(path: Path, config: str) -> Path:
    """Return the file that `config` in another file names: relative to that file, or a shipped config.

    Raises:
        UserError: no such file.
    """
    config = str(_at_home(config))
    for folder in (path.parent, CONFIG_FOLDER):
        if (folder / config).is_file():
            return folder / config
    raise UserError(f"{path}: config: {path.parent / config}: no such file, and the package ships none of that name")


def lay_over(table: dict[str, Any], changes: dict[str, Any]) -> None:
    """Merge `changes` into a run's table in place, key by key; a `loss.name` in them replaces the whole `loss`."""
    loss = changes.get("loss")
    if isinstance(loss, dict) and "name" in loss:
        table.pop("loss", None)
    merge(table, changes)


def merge(table: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """Merge `changes` into `table` in place, key by key."""
    for key, value in changes.items():
        if isinstance(value, dict) and isinstance(table.get(key), dict):
            merge(table[key], value)
        else:
            table[key] = copy.deepcopy(value)
    return table


def read_table(path: str | Path) -> dict[str, Any]:
    """Return the plain table of a TOML file.

    Raises:
        UserError: one line that names the file.
    """
    path = Path(path)
    try:
        with path.open(encoding="utf-8-sig") as file:  # editors on Windows write a byte-order mark
            text = file.read(LARGEST + 1)
        if len(text) > LARGEST:
            raise UserError(f"{path}: over {LARGEST:,} characters: no config file")
        return tomllib.loads(text)
    except FileNotFoundError:
        shipped = ", ".join(sorted(p.stem for p in CONFIG_FOLDER.glob("*.toml")))
        raise UserError(f"{path}: no such config file (the package ships: {shipped}, in {CONFIG_FOLDER})") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text ({error.reason} at byte {error.start}): save it as UTF-8") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    except NOT_TOML as error:
        raise UserError(f"{path}: not valid TOML: {_first_line(error)}") from None


def apply_override(table: dict[str, Any], override: str, is_text: Callable[[str], bool]) -> None:
    """Set the key that `section.key=value` names in a plain table.

    Args:
        table: changed in place.
        override: its value is TOML; a bare word is a string.
        is_text: returns whether a key takes a string; then a number, a date or a boolean is a string as well.

    Raises:
        UserError: not of this form.
    """
    if not override.isascii() and any("\ud800" <= letter <= "\udfff" for letter in override):
        raise UserError(f"override {override!r} is not UTF-8 text")
    key, equals, text = override.partition("=")
    *sections, last = key.strip().split(".")
    if not equals or not all([*sections, last]):
        raise UserError(f"override '{override}' is not of the form section.key=value")
    try:
        read = tomllib.loads(f"value = {text}")
        value = read["value"] if len(read) == 1 else text  # a line break may begin another key
    except NOT_TOML:
        value = text
    if is_text(key.strip()) and not isinstance(value, (str, list, dict)):
        value = text.strip()
    for section in sections:
        table = table.setdefault(section, {})
        if not isinstance(table, dict):
            raise UserError(f"override '{override}': '{section}' is a value, not a section")
    table[last] = value
