"""Everything that is printed: lines and rich's displays, without credentials and without control characters of data."""

from __future__ import annotations

import io
import sys
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from disttempnet.sanitize import printable, redacted

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderableType
    from rich.segment import Segment
    from rich.text import Text


def take_any_text() -> None:
    """From here on standard output and error write what their encoding lacks as \\u03c4: an ASCII terminal, or a name
    of a file that is no UTF-8, ends no command."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def say(text: str = "", *, error: bool = False, end: str = "\n") -> None:
    """Print text on standard output, or standard error, at once."""
    print(printable(redacted(text)), file=sys.stderr if error else sys.stdout, end=end, flush=True)


def console(*, stderr: bool = False, quiet: bool = False) -> Console:
    """A console of rich that cleans what it shows, and neither marks numbers nor reads markup or emoji codes in it."""
    from rich.console import Console
    from rich.segment import Segment

    class Clean(Console):
        def render_str(self, text: str, **options: Any) -> Text:  # here, too: columns are as wide as what is shown
            return super().render_str(printable(redacted(text)), **options)

        def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
            for text, style, control in super().render(renderable, options):
                yield Segment(text if control else printable(redacted(text)), style, control)

    return Clean(stderr=stderr, quiet=quiet, highlight=False, markup=False, emoji=False)


__all__ = ["console", "say", "take_any_text"]
