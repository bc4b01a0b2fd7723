"""Plain mappings ▶ :class:`Config` and back, strictly: every unknown key, missing field and wrong type at once."""

from __future__ import annotations

import math
import types
from collections.abc import Callable, Mapping
from dataclasses import MISSING, Field, asdict, fields, is_dataclass
from types import MappingProxyType
from typing import Any, Union, get_args, get_origin, get_type_hints

from megalm.config.arguments import expand_home
from megalm.config.schema import Config
from megalm.config.violation import Violation, close_matches, spoken_list
from megalm.errors import ConfigError

MISSING_VALUE = "???"
"""How a field without a value is spelt in YAML."""

PATHS = frozenset(
    {
        "run.dir",
        "data.path",
        "data.cache_dir",
        "checkpoint.resume",
        "checkpoint.init_from",
        "checkpoint.finetune_from",
        "evaluate.tasks",
        "evaluate.data",
    }
)
"""Fields that name places of this machine: ``~`` at their beginning is the home folder."""

_MOST_BITS = 1024
"""Of an integer: as far as float64 goes, and short enough to be spelled in messages."""

_WORDS: dict[Any, str] = {
    int: "an integer",
    float: "a finite number",
    bool: "true or false",
    str: "text",
    tuple[int, ...]: "a list of integers",
    tuple[float, ...]: "a list of numbers",
    tuple[str, ...]: "text or a list of texts",
    type(None): "null",
}


def config_from_dict(mapping: Mapping[str, Any], places: Mapping[str, str] = MappingProxyType({})) -> Config:
    """The config that ``mapping`` (of nested mappings, as YAML yields) describes.

    An integer is accepted where a number is wanted, and ``1e3`` where an integer is; nothing else is converted.

    Args:
        mapping: section ▶ field ▶ value.
        places: of fields that a file sets, the file and line, with which messages about them begin.

    Raises:
        ConfigError: unknown keys, missing fields and wrong types, all of them, one per line.
    """
    problems: list[Violation] = []
    config = _parse_dataclass(Config, mapping, "", problems)
    if problems:
        raise ConfigError([_with_place(problem, places) for problem in problems])
    assert isinstance(config, Config)
    return config


def parse_problems(path: str, value: Any) -> tuple[Any, list[Violation]]:
    """One field's value converted to its type, and what is wrong with it."""
    problems: list[Violation] = []
    return _parse_field(field_paths()[path], value, path, problems), problems


def _with_place(problem: Violation, places: Mapping[str, str]) -> str:
    place = places.get(problem.field)
    return str(problem) if place is None else f"{place}: {problem}"


def config_to_dict(config: Config) -> dict[str, Any]:
    """Nested plain dictionaries and lists; ``config_from_dict`` of them is ``config`` again."""
    return {
        section: {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}
        for section, values in asdict(config).items()
    }


def default_dict(schema: type = Config) -> dict[str, Any]:
    """Every field of the schema with its default, :data:`MISSING_VALUE` where it has none."""
    return {
        name: default_dict(kind) if isinstance(kind, type) and is_dataclass(kind) else _default_of(schema, name)
        for name, kind in _field_types(schema).items()
    }


def field_paths() -> dict[str, Any]:
    """Dotted name of every field a user can set ▶ its type; sections themselves are not in it."""
    return {
        f"{section}.{name}": kind
        for section, section_type in _field_types(Config).items()
        for name, kind in _field_types(section_type).items()
    }


def section_names() -> tuple[str, ...]:
    """The sections of a config, in order."""
    return tuple(_field_types(Config))


def describe_type(kind: Any) -> str:
    """A field's type in words: ``an integer or null``."""
    return spoken_list(_WORDS[member] for member in members_of(kind))


def members_of(kind: Any) -> tuple[Any, ...]:
    """The types that a field takes: of ``int | None``, both."""
    return get_args(kind) if get_origin(kind) in (Union, types.UnionType) else (kind,)


def unknown_key(path: str, value: Any) -> Violation:
    """The violation of setting a field that does not exist, with the names that may have been meant."""
    section, _, name = path.rpartition(".")
    known = [full.partition(".")[2] for full in field_paths() if full.startswith(f"{section}.")]
    candidates = known if known else section_names()
    close = close_matches(name, candidates)
    elsewhere = [full for full in field_paths() if full.rpartition(".")[2] == name]
    if close:
        right = f"did you mean {spoken_list(f'{section}.{word}' if known else word for word in close)}?"
    elif elsewhere:
        right = f"did you mean {spoken_list(elsewhere)}?"
    else:
        right = f"the {'fields of ' + section if known else 'sections'} are {spoken_list(candidates, 'and')}"
    return Violation(path, value, "there is no such field", right)


def _parse_dataclass(schema: type, mapping: Any, path: str, problems: list[Violation]) -> Any:
    """An instance of ``schema``; None, and something in ``problems``, when that is not possible."""
    kinds = _field_types(schema)
    if not isinstance(mapping, Mapping):
        problems.append(
            Violation(path or "config", mapping, "not a mapping", f"a mapping with {spoken_list(kinds, 'and')}")
        )
        return None
    before = len(problems)
    for key in mapping:
        if key not in kinds:
            problems.append(unknown_key(_join(path, str(key)), mapping[key]))
    values = {
        name: _parse_field(kind, mapping.get(name, _absent(kind)), _join(path, name), problems)
        for name, kind in kinds.items()
        if name in mapping or _is_required(schema, name)
    }
    return schema(**values) if len(problems) == before else None


def _absent(kind: Any) -> Any:
    """What stands for a required value that is not given; a section then reports its own missing fields."""
    return {} if is_dataclass(kind) else MISSING_VALUE


def _parse_field(kind: Any, value: Any, full: str, problems: list[Violation]) -> Any:
    if is_dataclass(kind):
        assert isinstance(kind, type)
        return _parse_dataclass(kind, value, full, problems)
    if value == MISSING_VALUE:
        problems.append(Violation(full, MISSING_VALUE, "a value is required", describe_type(kind)))
        return None
    for member in members_of(kind):
        accepted, parsed = _CONVERTERS[member](value)
        if accepted:
            return _at_home(full, parsed, problems) if full in PATHS else parsed
    problems.append(Violation(full, value, f"this is {_describe_value(value)}", describe_type(kind)))
    return None


def _at_home(full: str, value: Any, problems: list[Violation]) -> Any:
    """A path, or several, with the home folder for ``~``: expanded once, here, and never again."""
    if isinstance(value, tuple):
        return tuple(_at_home(full, one, problems) for one in value)
    try:
        return expand_home(value) if isinstance(value, str) else value
    except ValueError as error:
        problems.append(Violation(full, value, "no such home folder", str(error)))
        return value


def _describe_value(value: Any) -> str:
    """What a value of the wrong type is, in words."""
    if isinstance(value, Mapping):
        return "a mapping"
    if isinstance(value, float):
        return "no integer" if math.isfinite(value) else "not finite"
    if isinstance(value, bool):
        return "true or false"
    if value == []:
        return "an empty list"
    if isinstance(value, int) and value.bit_length() > _MOST_BITS:
        return "beyond any range"
    return {int: "an integer", str: "text", list: "a list", type(None): "null"}.get(type(value), type(value).__name__)


def _int(value: Any) -> tuple[bool, Any]:
    if isinstance(value, float) and value.is_integer():
        return True, int(value)
    return isinstance(value, int) and not isinstance(value, bool) and value.bit_length() <= _MOST_BITS, value


def _float(value: Any) -> tuple[bool, Any]:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False, value
    try:
        return math.isfinite(value), float(value)
    except OverflowError:  # an integer beyond the range of float64
        return False, value


def _str(value: Any) -> tuple[bool, Any]:
    return isinstance(value, str), value


def _ints(value: Any) -> tuple[bool, Any]:
    accepted, parsed = _list_of(_int, value)
    return accepted and bool(parsed), parsed


def _strs(value: Any) -> tuple[bool, Any]:
    """One text alone is a list of one."""
    accepted, parsed = _list_of(_str, [value] if isinstance(value, str) else value)
    return accepted and bool(parsed), parsed


def _list_of(convert: Callable[[Any], tuple[bool, Any]], value: Any) -> tuple[bool, Any]:
    if not isinstance(value, list | tuple):
        return False, value
    parsed = [convert(item) for item in value]
    return all(accepted for accepted, _ in parsed), tuple(item for _, item in parsed)


_CONVERTERS: dict[Any, Callable[[Any], tuple[bool, Any]]] = {
    int: _int,
    float: _float,
    bool: lambda value: (isinstance(value, bool), value),
    str: _str,
    tuple[int, ...]: _ints,
    tuple[float, ...]: lambda value: _list_of(_float, value),
    tuple[str, ...]: _strs,
    type(None): lambda value: (value is None, value),
}


def _field_types(schema: Any) -> dict[str, Any]:
    hints = get_type_hints(schema)
    return {item.name: hints[item.name] for item in fields(schema)}


def _field(schema: Any, name: str) -> Field[Any]:
    return next(item for item in fields(schema) if item.name == name)


def _is_required(schema: type, name: str) -> bool:
    item = _field(schema, name)
    return item.default is MISSING and item.default_factory is MISSING


def _default_of(schema: type, name: str) -> Any:
    default = _field(schema, name).default
    if _is_required(schema, name):
        return MISSING_VALUE
    return list(default) if isinstance(default, tuple) else default


def _join(*parts: str) -> str:
    return ".".join(part for part in parts if part)
