"""The only output to the terminal: lines and displays of rich, without credentials and control characters."""

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
    """Let standard output and error escape characters that their encoding lacks (τ becomes \\u03c4).

    Otherwise an ASCII terminal, or a file name that is not UTF-8, would end a command.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def say(text: str = "", *, error: bool = False, end: str = "\n") -> None:
    """Print text on standard output, or on standard error, and flush."""
    print(printable(redacted(text)), file=sys.stderr if error else sys.stdout, end=end, flush=True)


def console(*, stderr: bool = False, quiet: bool = False) -> Console:
    """Return a rich console that cleans its text; highlighting, markup and emoji codes are off."""
    from rich.console import Console
    from rich.segment import Segment

    class Clean(Console):
        def render_str(self, text: str, **options: Any) -> Text:  # cleaned here too, for the widths of columns
            return super().render_str(printable(redacted(text)), **options)

        def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
            for text, style, control in super().render(renderable, options):
                yield Segment(text if control else printable(redacted(text)), style, control)

    return Clean(stderr=stderr, quiet=quiet, highlight=False, markup=False, emoji=False)


__all__ = ["console", "say", "take_any_text"]
