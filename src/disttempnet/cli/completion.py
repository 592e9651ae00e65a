"""The command `disttempnet completion`: completion of commands and flags in bash, zsh and tcsh."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from disttempnet.errors import UserError

COMPLETION = """Prints the script that completes commands and flags in your shell. It needs shtab: pip install shtab

examples:
  disttempnet completion bash > ~/.local/share/bash-completion/completions/disttempnet
  disttempnet completion zsh > ~/.zfunc/_disttempnet         with fpath+=~/.zfunc before compinit in ~/.zshrc
"""
SHELLS = ("bash", "zsh", "tcsh")


def add_completion_command(commands: Any, parser: argparse.ArgumentParser) -> None:
    """Add `completion` to the commands of the program that `parser` parses."""
    completion = commands.add_parser(
        "completion",
        help="completion for bash, zsh or tcsh",
        description=COMPLETION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    completion.add_argument("shell", nargs="?", choices=SHELLS, help="the shell")
    completion.set_defaults(run=lambda options: _completion(options, parser))


def _completion(options: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    if options.shell is None:
        raise UserError(
            f"completion for which shell? {', '.join(SHELLS[:-1])} or {SHELLS[-1]}, for example: "
            "disttempnet completion bash > ~/.local/share/bash-completion/completions/disttempnet "
            "(zsh: disttempnet completion --help)"
        )
    try:
        import shtab
    except ImportError:
        raise UserError("completion needs shtab: python -m pip install 'disttempnet[completion]'") from None
    # not through `say`, which hides what looks like a credential: this is code, and the program's own
    sys.stdout.write(shtab.complete(parser, shell=options.shell) + "\n")
    return 0
