"""``megalm evaluate``."""

from __future__ import annotations

from collections.abc import Sequence

from megalm.cli.command import add_run, parse, tell_unused
from megalm.cli.table import COMMANDS
from megalm.errors import ExitCode
from megalm.runs.folder import run_folder_of


def main(arguments: Sequence[str], prog: str) -> int:
    """Run the command; ``prog`` is what it was called as. Returns its exit code."""
    options = parse(prog, COMMANDS["evaluate"].help, arguments, add_run)
    tell_unused("evaluate", options.overrides)
    from megalm.evaluate.perplexity import run_evaluate

    for name, value in run_evaluate(run_folder_of(options.run), options.overrides).items():
        print(f"{name:15} {value:,.6g}" if isinstance(value, float) else f"{name:15} {value}")
    return ExitCode.DONE
