"""Options by which commands find configs and show them, as Hydra's own commands have them. No torch."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from megalm.config.arguments import user_path
from megalm.config.command_line import CONFIG, CONFIG_DIR, read_settings
from megalm.config.compose import compose
from megalm.config.refused import refused_option
from megalm.config.resolved import config_yaml
from megalm.errors import ConfigError
from megalm.runs.source_model import source_model


def add_config_options(parser: argparse.ArgumentParser) -> None:
    """Options of every command that composes a config."""
    group = parser.add_argument_group("configs")
    group.add_argument(
        CONFIG_DIR,
        "-cd",
        action="append",
        default=[],
        type=user_path,
        metavar="DIR",
        help="folder with groups of your own (DIR/experiment/mine.yaml), searched before ./conf and megalm's",
    )
    group.add_argument(
        CONFIG,
        action="append",
        default=[],
        type=user_path,
        metavar="FILE",
        help="YAML file of settings (experiment: quickstart, train.steps: 50); what is typed wins",
    )
    group.add_argument("--cfg", "-c", metavar="job", help="print the composed config as YAML, and end")
    group.add_argument("--info", "-i", metavar="searchpath", help="print the folders that are searched, and end")


def check_hydra_options(arguments: Sequence[str]) -> None:
    """Refuse options of a Hydra application that megalm does not have.

    Raises:
        ConfigError: with a line for each.
    """
    if problems := [line for argument in arguments if (line := refused_option(argument)) is not None]:
        raise ConfigError(problems)


def config_arguments(options: argparse.Namespace) -> list[str]:
    """What ``compose`` takes: the options that find configs, then the overrides."""
    return [
        *(f"{CONFIG_DIR}={folder}" for folder in options.config_dir),
        *(f"{CONFIG}={file}" for file in options.config),
        *options.overrides,
    ]


def shown(options: argparse.Namespace) -> str | None:
    """What ``--cfg`` or ``--info`` prints; None: neither is given.

    Raises:
        ConfigError: they name something that is not there to show, or the config is wrong.
    """
    if options.cfg is not None:
        if options.cfg != "job":
            raise ConfigError(f"--cfg={options.cfg}: megalm uses no settings of Hydra's own; --cfg job")
        return config_yaml(compose(config_arguments(options), source_model))
    if options.info is not None:
        if options.info != "searchpath":
            right = "--info searchpath; megalm check --yaml tells where each value is from"
            raise ConfigError(f"--info={options.info}: not shown; {right}")
        return "\n".join(read_settings(config_arguments(options)).search_path.lines()) + "\n"
    return None
