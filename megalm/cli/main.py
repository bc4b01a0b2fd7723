"""The ``megalm`` command: a table of commands, each a module of this package that is imported when it is called.

torch is imported by the commands that compute, never by those that check. A run's folder and options are read before
Hydra's grammar meets the overrides: a prompt may hold anything.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module

from megalm.errors import ExitCode
from megalm.launch.console import run_on_console
from megalm.launch.guard import guarded
from megalm.launch.isolation import shield
from megalm.version import __version__


@dataclass(frozen=True)
class Command:
    """One line of the table; its code is ``main(arguments, prog)`` of ``megalm.cli.NAME``.

    Attributes:
        help: what it does, in one line.
        works: whether its result is on the disk, so that it goes on after its terminal or pipe is closed; the others
            only print, and end then.
    """

    help: str
    works: bool = False


COMMANDS = {
    "train": Command(
        "Train a run, or resume it; starts its own ranks unless torchrun, srun or mpirun has.", works=True
    ),
    "check": Command("Check a configuration for cluster.gpus GPUs, in a second, without starting anything."),
    "verify": Command(
        "Prove that a config's layout trains like one process: shrunk, on this machine's CPU, in a minute.", works=True
    ),
    "evaluate": Command("Loss and perplexity of a run over its whole validation split."),
    "generate": Command("Generate text from a prompt with a run's model."),
    "compare": Command("What two or more runs have reached, in a table and a picture, and what differs between them."),
    "tokenizer": Command("Train a tokenizer on a corpus, or take one that is there.", works=True),
    "prepare": Command("Prepare a corpus for training: documents to tokens to shards.", works=True),
    "data": Command("Show a dataset's text and documents, or which documents a step of a run saw."),
    "convert": Command("Convert a model between megalm's checkpoints and other formats.", works=True),
    "inspect": Command("Show what a checkpoint holds, prove it intact, or say what differs between two."),
}


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
