"""YAML files that users write, read so that every value and every fault has a line. No torch."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from megalm.config.violation import format_value
from megalm.errors import ConfigError

_DEPTH = 3
"""Levels of keys whose lines are remembered: section, field, and one that should not be there."""

Keys = tuple[str, ...]
"""Where a value stands: ``("train", "steps")``."""


@dataclass(frozen=True)
class YamlFile:
    """The content of one file.

    Attributes:
        path: the file.
        values: its mapping, as YAML yields it.
        lines: line of each key, counted from 1.
    """

    path: Path
    values: dict[Any, Any]
    lines: dict[Keys, int]

    def place(self, *keys: str) -> str:
        """Where a key stands: ``conf/model/mine.yaml:4``."""
        while keys and keys not in self.lines:
            keys = keys[:-1]
        return f"{shown_path(self.path)}:{self.lines.get(keys, 1)}"


def shown_path(path: Path) -> str:
    """A path relative to the working folder where it lies below it, else the whole path."""
    relative = os.path.relpath(path)
    return str(path) if relative.startswith(os.pardir) else relative


def read_yaml(path: Path) -> YamlFile:
    """The mapping in a file; of an empty file, an empty mapping.

    Raises:
        ConfigError: ``FILE:LINE: what is wrong; what would be right``; of duplicate keys, all. Without the line if the
            file cannot be read.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise ConfigError(f"{shown_path(path)}:{line}: not UTF-8; save the file as UTF-8") from None
    except OSError as error:
        reason = error.strerror or error
        raise ConfigError(f"{shown_path(path)}: cannot be read ({reason}); give the path of a YAML file") from None
    try:
        loader = _Loader(text)
        try:
            node = loader.get_single_node()
            if node is None:
                return YamlFile(path, {}, {})
            if not isinstance(node, yaml.MappingNode):
                raise ConfigError(_not_a_mapping(path, node))
            lines: dict[Keys, int] = {}
            if duplicates := list(_duplicates(path, node, (), lines)):
                raise ConfigError(duplicates)
            values = loader.construct_document(node)
        finally:
            loader.dispose()
    except yaml.YAMLError as error:
        raise ConfigError(describe_fault(error, path)) from None
    return YamlFile(path, values, lines)


def describe_fault(error: yaml.YAMLError, path: Path) -> str:
    """A line about YAML that cannot be parsed."""
    mark = getattr(error, "problem_mark", None) or getattr(error, "context_mark", None)
    line = mark.line + 1 if mark is not None else 1
    problem = str(getattr(error, "problem", None) or "not YAML")
    return f"{shown_path(path)}:{line}: {_in_words(problem)}"


_FAULTS = (
    (r"'\\t' that cannot start|found a tab", "a tab in the indentation; indent with spaces"),
    (
        r"mapping values are not allowed",
        "this line is indented deeper than the one above, or has a second ': '; the same indentation as its "
        "neighbours, and quotes around text with ': '",
    ),
    (
        r"expected <block end>|expected '<document start>'|did not find expected key|could not find expected ':'",
        "the indentation or the colon does not fit the lines above; NAME: VALUE, indented like its neighbours",
    ),
    (r"expected ',' or '\]'", "a list is not closed; [A, B]"),
    (r"expected ',' or '\}'", "a mapping is not closed; {NAME: VALUE}"),
    (r"unexpected end of stream", "a quote is not closed; the same quote at the end of the text"),
    (
        r"cannot start any token",
        "a value begins with a character that YAML reserves (@ ` % and others); quotes around the value",
    ),
    (r"found undefined alias|unexpected alias", "an alias *NAME without its anchor &NAME; quotes if it is text"),
    (r"could not determine a constructor", "a tag (!NAME) that is not plain YAML; a number, text, list or mapping"),
)


def _in_words(problem: str) -> str:
    for pattern, words in _FAULTS:
        if re.search(pattern, problem):
            return words
    return f"not YAML: {problem}; lines of NAME: VALUE"


def _not_a_mapping(path: Path, node: yaml.Node) -> str:
    what = "a list" if isinstance(node, yaml.SequenceNode) else f"text ({format_value(node.value)})"
    return f"{shown_path(path)}:{node.start_mark.line + 1}: this is {what}; a mapping, lines of NAME: VALUE"


def _duplicates(path: Path, node: yaml.MappingNode, above: Keys, lines: dict[Keys, int]) -> Iterator[str]:
    """A line for each key that stands twice in one mapping; fills ``lines``."""
    for key_node, value_node in node.value:
        key, line = str(key_node.value), key_node.start_mark.line + 1
        keys = (*above, key)
        if keys in lines and key != "<<":
            dotted = ".".join(keys)
            yield f"{shown_path(path)}:{line}: {dotted} is given in line {lines[keys]} already; keep one of them"
        lines.setdefault(keys, line)
        if isinstance(value_node, yaml.MappingNode) and len(keys) < _DEPTH:
            yield from _duplicates(path, value_node, keys, lines)


class _Loader(yaml.SafeLoader):
    """Reads ``1e-3`` as a number, as YAML 1.2 and Hydra do; PyYAML alone takes it for text."""


_FLOAT = re.compile(
    r"""^(?:[-+]?(?:[0-9][0-9_]*)\.[0-9_]*(?:[eE][-+]?[0-9]+)?
    |[-+]?(?:[0-9][0-9_]*)(?:[eE][-+]?[0-9]+)
    |\.[0-9_]+(?:[eE][-+][0-9]+)?
    |[-+]?\.(?:inf|Inf|INF)
    |\.(?:nan|NaN|NAN))$""",
    re.VERBOSE,
)

_Loader.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+0123456789."))
