"""The ``megalm`` command: a table of commands, each a module of this package that is imported when it is called.

torch is imported by the commands that compute, never by those that check. A run's folder and options are read before
Hydra's grammar meets the overrides: a prompt may hold anything.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from importlib import import_module

from megalm.cli.table import COMMANDS
from megalm.errors import ExitCode
from megalm.launch.console import run_on_console
from megalm.launch.guard import guarded
from megalm.launch.isolation import shield
from megalm.version import __version__


def main(argv: Sequence[str] | None = None, *, prog: str | None = None) -> int:
    """Run one command.

    Args:
        argv: its name and arguments; None: those of this process.
        prog: what its messages call it; None: ``megalm NAME``.

    Returns:
        The exit code: see :class:`megalm.errors.ExitCode`.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    works = bool(arguments) and arguments[0] in COMMANDS and COMMANDS[arguments[0]].works
    shield()
    return run_on_console(lambda: guarded(lambda: _dispatch(arguments, prog)), works=works)


def _dispatch(arguments: list[str], prog: str | None) -> int:
    parser = _main_parser()
    if not arguments:
        parser.print_help()
        return ExitCode.DONE
    name, *rest = arguments
    if name not in COMMANDS:
        parser.parse_args(arguments)  # --help, --version, or a command that does not exist
        return ExitCode.DONE
    code: int = import_module(f"megalm.cli.{name}").main(rest, prog or f"megalm {name}")
    return code


def _main_parser() -> argparse.ArgumentParser:
    lines = "\n".join(f"  {name:9} {command.help}" for name, command in COMMANDS.items())
    parser = argparse.ArgumentParser(
        prog="megalm",
        description="Pretrain GPT- and BERT-style language models in 3-D parallel, from a laptop to 1,024 GPUs.",
        epilog=f"commands:\n{lines}\n\n`megalm COMMAND --help` tells more.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        usage="megalm COMMAND ...",
    )
    parser.add_argument("--version", action="version", version=f"megalm {__version__}")
    parser.add_argument("command", choices=list(COMMANDS), metavar="COMMAND", help="one of the commands below")
    return parser
