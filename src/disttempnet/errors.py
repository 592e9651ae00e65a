"""Exceptions and warnings that the command line prints as single lines: what a user can fix, or should know."""

import warnings
from collections.abc import Iterable
from difflib import get_close_matches
from typing import Any

from disttempnet.sanitize import one_line, redacted
from disttempnet.terminal import say

TERMINATED = 143  # exit code of a command that a signal stopped: 128 + SIGTERM, as shells report it


class UserError(Exception):
    """A mistake outside the program. The message names the file, key or shard and says what to do.

    The message is always one line, without credentials and control characters.
    """

    def __init__(self, message: str) -> None:
        super().__init__(one_line(redacted(message)))


class UserNotice(UserWarning):
    """A warning about a run that continues."""


def notice(text: str) -> None:
    """Warn about a run that continues."""
    warnings.warn(text, UserNotice, stacklevel=3)


def show_notices_plainly() -> None:
    """Print each UserNotice as one line on standard error from now on, without its place in the code.

    Other warnings are printed as before.
    """
    others = warnings.showwarning

    def show(message: Warning | str, category: type[Warning], *place: Any, **more: Any) -> None:
        if issubclass(category, UserNotice):
            say(f"warning: {one_line(str(message))}", error=True)
        else:
            others(message, category, *place, **more)

    warnings.showwarning = show


class Preempted(Exception):
    """SIGUSR1 ended a run or an evaluation after a save; its sender (SLURM) starts it again."""

    code = 138  # exit code: 128 + SIGUSR1, as shells report it


def unknown_name(kind: str, name: str, known: Iterable[str]) -> str:
    """Return the message for an unknown name: the nearest known one, and the list of known ones (of many, the near)."""
    known = sorted(known)
    near = get_close_matches(name, known, n=8, cutoff=0.5)
    hint = f" Did you mean '{near[0]}'?" if near else ""
    shown = known if len(known) <= 40 else near or known[:8]
    more = f" and {len(known) - len(shown)} more" if len(shown) < len(known) else ""
    return f"unknown {kind} '{name}'.{hint} Known: {', '.join(shown)}{more}"
