"""Parts that the pages of reports share: templates, provenance, differences between configs, the file itself."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template

from disttempnet.config import flat
from disttempnet.evaluation.scores import metric_title, percent
from disttempnet.io.files import write_output
from disttempnet.sanitize import redacted

TEMPLATES = Path(__file__).with_name("templates")
UNKNOWN = "–"


def open_template(name: str) -> Template:
    """Return a template of `templates/`, with the filters that format numbers."""
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"percent": percent, "metric": metric_title, "number": "{:,}".format, "tau": "{:.4f}".format}
    return environment.get_template(name)


def signed(share: float, digits: int, plus: str = "+") -> str:
    """Return a difference of shares in percentage points with its sign; no sign for what rounds to zero."""
    value = round(100 * share, digits)
    sign = "−" if value < 0 else plus if value > 0 else ""
    return f"{sign}{abs(value):.{digits}f}"


def publish(out: Path, text: str) -> Path:
    """Write a file of a report, without credentials that runs of earlier versions may hold.

    Raises:
        UserError: it cannot be written; nothing is left behind.
    """
    write_output(out, redacted(text))
    return out


def differing_keys(configs: Sequence[dict[str, Any]], ignored: Collection[str]) -> list[tuple[str, list[str]]]:
    """Return the config keys whose values differ: (key, a value for each config).

    Args:
        configs: nested tables.
        ignored: dotted keys that are left out.
    """
    tables = [flat(config) for config in configs]
    keys = dict.fromkeys(key for table in tables for key in table if key not in ignored)
    rows = [(key, [str(table.get(key, UNKNOWN)) for table in tables]) for key in keys]
    return [(key, values) for key, values in rows if len(set(values)) > 1]


def provenance_rows(runs: Sequence[Mapping[str, Any]]) -> dict[str, list[str]]:
    """Return how runs were made, from their run.json: name → a value for each run."""

    def row(values: Sequence[object]) -> list[str]:
        return [UNKNOWN if value in (None, "") else str(value) for value in values]

    packages = dict.fromkeys(package for facts in runs for package in facts.get("versions", {}))
    return {
        "training samples": row([f"{facts['num_samples']:,}" if "num_samples" in facts else "" for facts in runs]),
        "data index (sha256)": row([facts.get("index_digest") for facts in runs]),
        "processes": row([facts.get("world_size") for facts in runs]),
        "device": row([facts.get("device") for facts in runs]),
        "git revision": row([facts.get("git") for facts in runs]),
        **{package: row([facts.get("versions", {}).get(package) for facts in runs]) for package in packages},
    }
