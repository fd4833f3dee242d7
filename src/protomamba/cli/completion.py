"""`protomamba completion`: a script for the shell that completes commands, flags, their values and file names."""

from __future__ import annotations

import argparse
import importlib.util
from pathlib import Path

from protomamba.cli.flags import Parser
from protomamba.errors import UserError

SHELLS = ("bash", "zsh", "tcsh")


def configure(parser: Parser) -> None:
    about = (
        'shell; for bash: eval "$(protomamba completion bash)" in ~/.bashrc; for zsh: write the script to a file '
        "_protomamba in $fpath"
    )
    parser.add_argument("shell", choices=SHELLS, help=about)


def work(arguments: argparse.Namespace) -> int:
    """Print the script. UserError without shtab."""
    if importlib.util.find_spec("shtab") is None:
        raise UserError("completion: the package shtab is not installed: pip install 'protomamba[completion]'")
    import shtab

    print(shtab.complete(whole_parser(), arguments.shell))
    return 0


def whole_parser() -> argparse.ArgumentParser:
    """All commands in one parser: for completion only, since a command line builds just the one that it names."""
    from protomamba.cli.main import COMMANDS

    parser = argparse.ArgumentParser(prog="protomamba")
    parser.add_argument("--version", action="store_true", help="print the version")
    commands = parser.add_subparsers(parser_class=Parser)
    for name, (about, configure_command, _) in COMMANDS.items():
        if " " in name:  # `prepare events`: argparse has no command that takes files or another command
            continue
        command = commands.add_parser(name, help=about, description=about)
        command.add_argument("--debug", action="store_true", help="show the traceback of an error")
        configure_command(command)
        for action in command._actions:
            _complete_values(action)
    return parser


def _complete_values(action: argparse.Action) -> None:
    """File names where a path is wanted, and the names of a metavar like fp32|bf16."""
    import shtab

    names = str(action.metavar or "").split("|")
    if action.type is Path or action.metavar in ("PATH", "FILE", "DIR"):
        action.complete = shtab.FILE  # type: ignore[attr-defined]
    elif action.choices is None and action.nargs != 0 and len(names) > 1:
        action.choices = names
