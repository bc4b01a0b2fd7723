"""``megalm train``."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence

from megalm.cli.command import parse_config
from megalm.cli.table import COMMANDS
from megalm.errors import ConfigError, ExitCode


def main(arguments: Sequence[str], prog: str) -> int:
    """Run the command; ``prog`` is what it was called as. Returns its exit code."""
    options = parse_config(prog, COMMANDS["train"].help, arguments, _add_options)
    if options is None:
        return ExitCode.DONE
    from megalm.launch.run import run_job, run_on_own_ranks
    from megalm.training.job import TRAIN

    if not options.multirun:
        return run_job(TRAIN, options.overrides)
    from megalm.cli.sweep import run_sweep
    from megalm.launch import discover

    rank = discover(os.environ)
    if rank is not None:
        raise ConfigError(
            f"-m: {rank.launcher} has started ranks, which train one run; megalm train -m starts ranks of its own, "
            "for one run after another"
        )
    return run_sweep(options.overrides, lambda overrides: run_on_own_ranks(TRAIN, overrides))


def _add_options(parser: argparse.ArgumentParser) -> None:
    help_text = "train a run with each of the values in FIELD=A,B, one after another, each with a name of its own"
    parser.add_argument("--multirun", "-m", action="store_true", help=help_text)
