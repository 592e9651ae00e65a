"""Fills a page's template; all pages share style.css."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from disttempnet.evaluation.scores import metric_title, percent

STYLE = Path(__file__).with_name("style.css")


def fill(template: Path, **values: Any) -> str:
    """The page: values are escaped, and one that the template uses and does not get is an error."""
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"percent": percent, "metric": metric_title, "number": "{:,}".format, "tau": "{:.4g}".format}
    style = Markup(STYLE.read_text(encoding="utf-8").rstrip("\n"))
    return environment.from_string(template.read_text(encoding="utf-8")).render(style=style, **values)
