"""References between fields (``${model.num_layers}``) and OmegaConf's other ``${...}``. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megalm.config.hydra_calls import know_resolvers
from megalm.config.parse import field_paths, members_of
from megalm.config.violation import Violation
from megalm.errors import ConfigError

_KNOWN_TO_OMEGACONF = (str, int, float, bool, list, dict, type(None))
"""A date, say, is none of these: YAML makes one of ``2026-01-01``."""


def resolve_references(mapping: dict[str, Any], places: Mapping[str, str]) -> dict[str, Any]:
    """The mapping with the value of each reference in its place; a number becomes text where text is wanted.

    Args:
        mapping: section ▶ field ▶ value.
        places: dotted name ▶ where its value is from.

    Raises:
        ConfigError: every reference to what does not exist, or that cannot be read.
    """
    sections = {name: part for name, part in mapping.items() if isinstance(part, dict)}
    found = [(section, name) for section, part in sections.items() for name, value in part.items() if _refers(value)]
    if not found:
        return mapping
    know_resolvers()
    broken = {(section, name): why for section, name in found if (why := _unreadable(sections[section][name]))}
    readable = {
        section: {
            name: value
            for name, value in part.items()
            if (section, name) not in broken and isinstance(value, _KNOWN_TO_OMEGACONF)
        }
        for section, part in sections.items()
    }
    problems, resolved = [], {section: dict(part) for section, part in sections.items()}
    for section, name in found:
        path, raw = f"{section}.{name}", sections[section][name]
        try:
            if (section, name) in broken:
                raise ValueError(broken[section, name])
            resolved[section][name] = _value_of(readable, path)
        except ValueError as error:
            right = "${SECTION.FIELD}, such as ${model.num_layers}, or text without ${"
            problem = str(Violation(path, raw, str(error), right))
            place = places.get(path, "")
            problems.append(f"{place}: {problem}" if ":" in place else problem)
    if problems:
        raise ConfigError(problems)
    return {**mapping, **resolved}


def _refers(value: Any) -> bool:
    items = value if isinstance(value, list) else [value]
    return any(isinstance(item, str) and "${" in item for item in items)


def _unreadable(value: Any) -> str:
    """Why a text with ``${`` in it is no reference; empty: it is one."""
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    try:
        OmegaConf.create({"value": value})
        OmegaConf.is_interpolation(OmegaConf.create({"value": value}), "value")
    except (OmegaConfBaseException, ValueError):
        return "not a reference that can be read"
    return ""


def _value_of(sections: dict[str, dict[str, Any]], path: str) -> Any:
    """A field's value, references followed.

    Raises:
        ValueError: one leads to nothing, or in a circle.
    """
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    try:
        value = OmegaConf.select(OmegaConf.create(sections), path)
        value = OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value
    except (OmegaConfBaseException, RecursionError) as error:
        line = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise ValueError("refers to itself" if isinstance(error, RecursionError) else line) from None
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return str(value) if is_number and path in field_paths() and str in members_of(field_paths()[path]) else value
