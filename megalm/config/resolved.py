"""A config as YAML for people: every value, and where it is from. No torch."""

from __future__ import annotations

import json
from typing import Any

import yaml

from megalm.config.compose import Composition
from megalm.config.layers import DEFAULT
from megalm.config.parse import config_to_dict
from megalm.config.schema import Config

_WIDEST_VALUE = 40
"""Columns up to which the places stand below each other."""


def config_yaml(config: Config) -> str:
    """The whole config as YAML, as ``RUN/config.yaml`` has it."""
    return yaml.safe_dump(config_to_dict(config), sort_keys=False, allow_unicode=True)


def resolved_yaml(composition: Composition) -> str:
    """The whole config as YAML; behind each value, as a comment, where it is from."""
    lines = []
    for section, fields in config_to_dict(composition.config).items():
        entries = {f"  {name}: {_on_one_line(value)}": f"{section}.{name}" for name, value in fields.items()}
        width = max(len(entry) for entry in entries if len(entry) <= _WIDEST_VALUE)
        lines.append(f"{section}:")
        lines += [f"{entry:{width}}  # {composition.places.get(path, DEFAULT)}" for entry, path in entries.items()]
    return "".join(f"{line}\n" for line in lines)


def _on_one_line(value: Any) -> str:
    if isinstance(value, str) and "\n" in value:
        return json.dumps(value, ensure_ascii=False)
    text = yaml.safe_dump(value, default_flow_style=True, allow_unicode=True, width=10**6)
    return text.removesuffix("...\n").strip()
