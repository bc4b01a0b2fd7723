"""Arguments of a command ▶ what is set, and where configs are found. No torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from megalm.config.arguments import expand_home
from megalm.config.overrides import COMMAND_LINE, Reader, Setting, value_of_list
from megalm.config.parse import section_names
from megalm.config.refused import refused_option
from megalm.config.search_path import SearchPath
from megalm.config.yaml_file import YamlFile, read_yaml
from megalm.errors import ConfigError

CONFIG_DIR = "--config-dir"
CONFIG = "--config"

_SEARCHPATH = "hydra.searchpath"


@dataclass(frozen=True)
class Settings:
    """Everything that a user has set.

    Attributes:
        search_path: where configs are found.
        of_files: what ``--config`` files set, in order.
        typed: what was typed, in order.
        options: group ▶ the option that was asked for last, or None for none; what was typed wins.
    """

    search_path: SearchPath
    of_files: tuple[Setting, ...]
    typed: tuple[Setting, ...]
    options: Mapping[str, str | None]


def read_settings(arguments: Sequence[str]) -> Settings:
    """Read options and overrides.

    Args:
        arguments: ``--config-dir=DIR`` and ``--config=FILE``, any number of each, and overrides.

    Raises:
        ConfigError: everything that is wrong with them and with the ``--config`` files.
    """
    dirs, paths, overrides, problems = _split(arguments)
    files = []
    for path in paths:
        try:
            files.append(read_yaml(Path(path)))
        except ConfigError as error:
            problems += error.lines
    searchpath = [text for override in overrides if (text := _searchpath_of(override)) is not None]
    folders = [folder for text in searchpath for folder in value_of_list(text)]
    folders += [str(folder) for file in files for folder in _folders_in(file)]
    try:
        search_path = SearchPath.of(dirs, folders)
    except ConfigError as error:
        problems += error.lines
        search_path = SearchPath.of()
    reader = Reader(search_path.group_options())
    for file in files:
        _read_file(reader, file)
    for override in overrides:
        if _searchpath_of(override) is None:
            reader.read(override)
    problems += reader.problems
    of_files = tuple(item for item in reader.settings if item.place != COMMAND_LINE)
    typed = tuple(item for item in reader.settings if item.place == COMMAND_LINE)
    if problems:
        raise ConfigError([*problems, *reader.problems_of_values()])
    options = {item.key: item.value for item in (*of_files, *typed) if item.is_group}
    return Settings(search_path, of_files, typed, options)


def _split(arguments: Sequence[str]) -> tuple[list[str], list[str], list[str], list[str]]:
    """Folders, files, overrides, and what is wrong."""
    dirs: list[str] = []
    files: list[str] = []
    overrides: list[str] = []
    problems: list[str] = []
    for argument in arguments:
        name, _, value = argument.partition("=")
        if name in (CONFIG_DIR, CONFIG):
            try:
                (dirs if name == CONFIG_DIR else files).append(expand_home(value))
            except ValueError as error:
                problems.append(f"{name}={value}: {error}; a path")
        elif (refused := refused_option(argument)) is not None:
            problems.append(refused)
        else:
            overrides.append(argument)
    return dirs, files, overrides, problems


def _searchpath_of(override: str) -> str | None:
    key, separator, value = override.partition("=")
    return value if separator and key.strip() == _SEARCHPATH else None


def _folders_in(file: YamlFile) -> list[str]:
    value = file.values.get(_SEARCHPATH)
    return value if isinstance(value, list) else [] if value is None else [value]


def _read_file(reader: Reader, file: YamlFile) -> None:
    """The settings of a ``--config`` file: ``experiment: quickstart``, ``train.steps: 50``, or sections with fields."""
    for key, value in file.values.items():
        name = str(key)
        if name == _SEARCHPATH:
            continue
        if name == "defaults":
            wrong = "a file of settings has no defaults list"
            right = "name options as experiment: quickstart; a file in DIR/experiment/ can have one"
            reader.problems.append(f"{file.place(name)}: defaults: {wrong}; {right}")
        elif name in section_names() and isinstance(value, dict):
            for field, item in value.items():
                reader.take(f"{name}.{field}", item, file.place(name, str(field)))
        elif value is not None or name not in section_names() or reader.is_group(name):
            reader.take(name, value, file.place(name))
