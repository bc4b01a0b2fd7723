"""References between fields (``${model.num_layers}``) and OmegaConf's other ``${...}``. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megalm.config.hydra_calls import know_resolvers
from megalm.config.parse import field_paths, members_of
from megalm.config.violation import Violation
from megalm.errors import ConfigError


def resolve_references(mapping: dict[str, Any], places: Mapping[str, str]) -> dict[str, Any]:
    """The mapping with the value of each reference in its place; a number becomes text where text is wanted.

    Args:
        mapping: section ▶ field ▶ value.
        places: dotted name ▶ where its value is from.

    Raises:
        ConfigError: every reference to what does not exist, or that cannot be read.
    """
    problems: list[str] = []
    resolved = {}
    for section, fields in mapping.items():
        if not isinstance(fields, dict):
            resolved[section] = fields
            continue
        resolved[section] = {
            name: _resolved(mapping, section, name, places, problems) if _refers(value) else value
            for name, value in fields.items()
        }
    if problems:
        raise ConfigError(problems)
    return resolved


def _refers(value: Any) -> bool:
    items = value if isinstance(value, list) else [value]
    return any(isinstance(item, str) and "${" in item for item in items)


def _resolved(mapping: dict[str, Any], section: str, name: str, places: Mapping[str, str], problems: list[str]) -> Any:
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    path, raw = f"{section}.{name}", mapping[section][name]
    know_resolvers()
    try:
        node = OmegaConf.create({key: dict(part) for key, part in mapping.items() if isinstance(part, dict)})
        value = OmegaConf.select(node, path)
        value = OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value
    except (OmegaConfBaseException, ValueError) as error:
        line = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        right = "${SECTION.FIELD}, such as ${model.num_layers}, or text without ${"
        problem = str(Violation(path, raw, line, right))
        place = places.get(path, "")
        problems.append(f"{place}: {problem}" if ":" in place else problem)
        return None
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return str(value) if is_number and path in field_paths() and str in members_of(field_paths()[path]) else value
