"""``megalm check``. No torch."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from megalm.cli.command import parse_config
from megalm.cli.table import COMMANDS
from megalm.errors import ExitCode


def main(arguments: Sequence[str], prog: str) -> int:
    """Run the command; ``prog`` is what it was called as. Returns its exit code."""
    options = parse_config(prog, COMMANDS["check"].help, arguments, _add_options)
    if options is None:
        return ExitCode.DONE
    from megalm.config.compose import composition
    from megalm.config.job import planned_world_size_of
    from megalm.config.resolved import resolved_yaml
    from megalm.evaluate.tasks.of_config import check_tasks
    from megalm.plan.preflight import check_config, check_data
    from megalm.plan.summary import note_lines, summary_lines
    from megalm.runs.source_model import source_model

    composed = composition(options.overrides, source_model)
    config = composed.config
    world_size = planned_world_size_of(config)
    check_config(config, world_size)
    if options.yaml:
        print(*composed.notes, sep="\n", end="\n" if composed.notes else "", file=sys.stderr)
        print(resolved_yaml(composed), end="")
        return ExitCode.DONE
    looked_at = [check_data(config), *([tasks] if (tasks := check_tasks(config)) is not None else [])]
    lines = [*summary_lines(config, world_size), *looked_at, *composed.notes, *note_lines(config, world_size)]
    print(*lines, "ok", sep="\n")
    return ExitCode.DONE


def _add_options(parser: argparse.ArgumentParser) -> None:
    help_text = "print the resolved config, with where each value is from: file and line, command line, default, a run"
    parser.add_argument("--yaml", action="store_true", help=help_text)
