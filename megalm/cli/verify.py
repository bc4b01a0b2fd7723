"""``megalm verify``."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from megalm.cli.command import parse_config
from megalm.cli.table import COMMANDS
from megalm.config.arguments import user_path
from megalm.errors import ExitCode


def main(arguments: Sequence[str], prog: str) -> int:
    """Run the command; ``prog`` is what it was called as. Returns its exit code."""
    options = parse_config(prog, COMMANDS["verify"].help, arguments, _add_options)
    if options is None:
        return ExitCode.DONE
    from megalm.verify.run import run_verify

    return run_verify(options.overrides, options.json)


def _add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--json",
        type=user_path,
        metavar="FILE",
        help="where the layout certificate is written; default: layout_certificate.json in the run's folder",
    )
