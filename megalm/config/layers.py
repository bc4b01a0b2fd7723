"""Layers of settings, merged field by field; of each value it is known where it is from. No torch.

A layer is one file, the schema's defaults, the model of another run, or what a user has set. Later layers win.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from megalm.config.overrides import Setting
from megalm.config.parse import section_names
from megalm.config.yaml_file import YamlFile
from megalm.errors import ConfigError

DEFAULT = "default"
"""The place of a value that nobody has set: the schema."""

FieldPath = tuple[str, ...]
"""(section, field); (section,) where a file has no mapping in the place of a section."""


@dataclass(frozen=True)
class Value:
    """A value and where it is from: ``conf/model/mine.yaml:4``, ``command line``, ``default``."""

    value: Any
    place: str


@dataclass(frozen=True)
class Layer:
    """Values of one source.

    Attributes:
        values: by section and field.
        option: of a file its name in the search path, such as ``model/gpt3_125m``.
        parent: the option whose defaults list names it; empty: the primary config, or none.
    """

    values: Mapping[FieldPath, Value]
    option: str = ""
    parent: str = ""


@dataclass
class Merged:
    """What layers come to, one after another."""

    values: dict[FieldPath, Value] = field(default_factory=dict)

    def add(self, layers: Iterable[Layer]) -> None:
        """Put layers on top."""
        for layer in layers:
            self.values.update(layer.values)

    def mapping(self) -> dict[str, Any]:
        """Section ▶ field ▶ value."""
        nested: dict[str, Any] = {}
        for path, value in self.values.items():
            if len(path) == 1:
                nested[path[0]] = value.value
        for path, value in self.values.items():
            section = nested.setdefault(path[0], {}) if len(path) > 1 else None
            if isinstance(section, dict):
                section[path[1]] = value.value
        return nested

    def places(self) -> dict[str, str]:
        """Dotted name ▶ where its value is from."""
        return {".".join(path): value.place for path, value in self.values.items()}


def layer_of_defaults(defaults: Mapping[str, Any]) -> Layer:
    """The schema's defaults."""
    return Layer(
        {
            (section, name): Value(value, DEFAULT)
            for section, fields in defaults.items()
            for name, value in fields.items()
        }
    )


def layer_of_file(file: YamlFile, package: str, *, option: str = "", parent: str = "") -> Layer:
    """The values of a file at their places in the whole config.

    Args:
        file: its content.
        package: dotted place of its content; empty: the whole config.
        option: its name in the search path.
        parent: the option whose defaults list names it.

    Raises:
        ConfigError: what it holds cannot be a config's: every line that is wrong.
    """
    above = tuple(package.split(".")) if package else ()
    if above and above[0] not in section_names():
        raise ConfigError(
            f'{file.place()}: there is no section {above[0]}, and the line "# @package _global_" is missing; make it '
            "the first line of a file that sets fields of several sections"
        )
    values: dict[FieldPath, Value] = {}
    problems = []
    for key, value in file.values.items():
        if key == "defaults" and isinstance(value, list):
            continue
        keys, place = (*above, *str(key).split(".")), file.place(str(key))
        if len(keys) == 2 and keys[0] == keys[1] and isinstance(value, Mapping):
            problems.append(
                f"{place}: {key} inside {key}; this file is the section {key}: write its fields at the left margin"
            )
        elif len(keys) == 1 and isinstance(value, Mapping):
            fields: dict[FieldPath, Value] = {
                (*keys, str(name)): Value(item, file.place(str(key), str(name))) for name, item in value.items()
            }
            values.update(fields)
        elif len(keys) > 1 or value is not None:  # a section without anything in it is none
            values[keys[:2]] = Value(_nested(keys[2:], value), place)
    if problems:
        raise ConfigError(problems)
    return Layer(values, option, parent)


def layer_of_settings(settings: Iterable[Setting]) -> Layer:
    """The fields among what a user has set."""
    return Layer({tuple(item.key.split(".")): Value(item.value, item.place) for item in settings if not item.is_group})


def family(layers: Iterable[Layer], option: str) -> list[Layer]:
    """The layer of an option, and those that its defaults list brings, in the order of merging."""
    names, found = {option}, []
    for layer in reversed(list(layers)):  # what a file names comes before the file, unless _self_ says otherwise
        if layer.option and (layer.option in names or layer.parent in names):
            names.add(layer.option)
            found.append(layer)
    return found[::-1]


def _nested(keys: tuple[str, ...], value: Any) -> Any:
    return value if not keys else {keys[0]: _nested(keys[1:], value)}
