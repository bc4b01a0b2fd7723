"""What the commands share: options, overrides, and the run that a command is about."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Sequence

from megalm.config.arguments import user_path
from megalm.launch.guard import check_text

_OVERRIDES_HELP = (
    "GROUP=OPTION (experiment=quickstart, model=gpt3_125m, parallel=tp2) and FIELD=VALUE (train.steps=50, "
    "run.name=try1); every field, its default and its meaning: docs/config.md"
)


def parse(
    prog: str, description: str, arguments: Sequence[str], add_options: Callable[[argparse.ArgumentParser], None]
) -> argparse.Namespace:
    """A command's options, and its overrides as they were given."""
    parser = _parser(prog, description, add_options)
    return _parsed(parser, arguments)


def parse_config(
    prog: str, description: str, arguments: Sequence[str], add_options: Callable[[argparse.ArgumentParser], None]
) -> argparse.Namespace | None:
    """The same for a command that composes a config; None where an option asked to be shown it, and it was."""
    # What finds and shows configs is imported for these commands alone.
    from megalm.cli.config_options import add_config_options, check_hydra_options, config_arguments, shown

    parser = _parser(prog, description, add_options)
    add_config_options(parser)
    check_hydra_options(arguments)
    options = _parsed(parser, arguments)
    text = shown(options)
    if text is not None:
        print(text, end="")
        return None
    options.overrides = config_arguments(options)
    return options


def add_run(parser: argparse.ArgumentParser, name: str = "run") -> None:
    """The argument RUN."""
    help_text = "folder of a run, such as runs/quickstart, or its name in runs/"
    parser.add_argument(name, type=user_path, metavar="RUN", help=help_text)


def tell_unused(command: str, overrides: Sequence[str]) -> None:
    """Say on standard error which overrides a command does not read."""
    from megalm.config.unused import unused_overrides

    for line in unused_overrides(command, overrides):
        print(line, file=sys.stderr)


def _parser(
    prog: str, description: str, add_options: Callable[[argparse.ArgumentParser], None]
) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=prog, description=description, allow_abbrev=False)
    add_options(parser)
    parser.add_argument("overrides", nargs="*", metavar="OVERRIDE", help=_OVERRIDES_HELP)
    return parser


def _parsed(parser: argparse.ArgumentParser, arguments: Sequence[str]) -> argparse.Namespace:
    options = parser.parse_intermixed_args([_override_of(argument) for argument in arguments])
    given = [value for values in vars(options).values() for value in (values if isinstance(values, list) else [values])]
    check_text([value for value in given if isinstance(value, str)])
    return options


def _override_of(argument: str) -> str:
    """``--train.steps=3`` is no option to be refused with the usage of all, but a setting to be spelled right."""
    return f"+{argument.lstrip('-')}" if re.match(r"--?[a-z_]+\.[a-z_0-9]+(=|$)", argument) else argument
