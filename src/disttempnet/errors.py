"""What a user can fix, or should know: the exception and the warning that the command line prints as single lines."""

import warnings
from collections.abc import Iterable
from difflib import get_close_matches
from typing import Any

from disttempnet.sanitize import one_line, redacted
from disttempnet.terminal import say


class UserError(Exception):
    """A mistake outside the program: its message names the file, key or shard and says what to do.

    The message is one line without credentials or control characters, wherever it is shown, sent or written.
    """

    def __init__(self, message: str) -> None:
        super().__init__(one_line(redacted(message)))


class UserNotice(UserWarning):
    """Something to know about one's run, which goes on."""


def notice(text: str) -> None:
    """Tell something about one's run, which goes on."""
    warnings.warn(text, UserNotice, stacklevel=3)


def show_notices_plainly() -> None:
    """From here on print each UserNotice as a line on standard error, without the place in the code that gave it; other
    warnings stay as they were."""
    others = warnings.showwarning

    def show(message: Warning | str, category: type[Warning], *place: Any, **more: Any) -> None:
        if issubclass(category, UserNotice):
            say(f"warning: {one_line(str(message))}", error=True)
        else:
            others(message, category, *place, **more)

    warnings.showwarning = show


class Preempted(Exception):
    """SIGUSR1 ended a run or an evaluation in good order, what is done is saved: whoever sent it starts it again."""

    code = 138  # exit code: 128 + SIGUSR1, as a shell says of a process that it ended


def unknown_name(kind: str, name: str, known: Iterable[str]) -> str:
    """The message for a name that does not exist: the nearest one, and what there is (of many, the near ones)."""
    known = sorted(known)
    near = get_close_matches(name, known, n=8, cutoff=0.5)
    hint = f" Did you mean '{near[0]}'?" if near else ""
    shown = known if len(known) <= 40 else near or known[:8]
    more = f" and {len(known) - len(shown)} more" if len(shown) < len(known) else ""
    return f"unknown {kind} '{name}'.{hint} Known: {', '.join(shown)}{more}"
