"""Fields of a JSON file from elsewhere, such as ``config.json``: validated, and all mistakes reported at once."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megalm.config.violation import format_value, spoken_list
from megalm.errors import CheckpointError

_LARGEST = 2**31 - 1


class Fields:
    """A mapping read from a JSON file. Reading an invalid field records a problem and goes on.

    A field that is null counts as absent, but for :meth:`is_null`.

    Args:
        path: of the file, for messages.
        values: what it holds.
        place: where in the file the mapping is, for messages; empty: at its top.
        problems: where to note what is wrong; None: a list of this mapping's own.
    """

    def __init__(
        self, path: Path, values: Mapping[str, Any], *, place: str = "", problems: list[str] | None = None
    ) -> None:
        self.path = path
        self.values = {name: value for name, value in values.items() if value is not None}
        self._nulls = frozenset(values.keys() - self.values.keys())
        self.problems: list[str] = [] if problems is None else problems
        self._place = place

    def __contains__(self, name: str) -> bool:
        return name in self.values

    def is_null(self, name: str) -> bool:
        """Whether a field is there and null, which turns off what the library would otherwise take for given."""
        return name in self._nulls

    def problem(self, name: str, wrong: str) -> None:
        """Note what is wrong with a field and what would be right."""
        value = format_value(self.values[name]) if name in self.values else "(missing)"
        self.problems.append(f"{self.path}: {self._place}{name}={value}: {wrong}")

    def count(self, name: str, default: int | None = None, *, smallest: int = 1) -> int:
        """An integer in the range of what megalm counts; ``default`` where it is absent, None: it must be there."""
        value = self.values.get(name, default)
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if isinstance(value, int) and not isinstance(value, bool) and smallest <= value <= _LARGEST:
            return value
        self.problem(name, f"not an integer from {smallest} to {_LARGEST}")
        return smallest

    def number(self, name: str, default: float | None = None) -> float:
        """A finite number; ``default`` where it is absent, None: it must be there."""
        value = self.values.get(name, default)
        if isinstance(value, int | float) and not isinstance(value, bool) and _is_finite(value):
            return float(value)
        self.problem(name, "not a finite number")
        return 1.0

    def flag(self, name: str, default: bool) -> bool:
        """True or false."""
        value = self.values.get(name, default)
        if isinstance(value, bool):
            return value
        self.problem(name, "neither true nor false")
        return default

    def choice(self, name: str, choices: Mapping[str, str], default: str) -> str:
        """One of several known texts, as the value it stands for."""
        value = self.values.get(name, default)
        if isinstance(value, str) and value in choices:
            return choices[value]
        self.problem(name, f"not a choice that megalm has; {spoken_list(choices)}")
        return choices[default]

    def must_be(self, name: str, wanted: object, why: str) -> None:
        """Note a problem where a field is there and is not ``wanted``: what megalm does not have."""
        value = self.values.get(name, wanted)
        if type(value) is not type(wanted) or value != wanted:
            self.problem(name, f"{why}; only {format_value(wanted)} can be converted")

    def mapping(self, name: str) -> Fields | None:
        """A mapping inside this one, its problems noted here; None where it is absent."""
        value = self.values.get(name, {})
        if not isinstance(value, dict):
            self.problem(name, "not a mapping")
            return None
        if name not in self.values:
            return None
        return Fields(self.path, value, place=f"{self._place}{name}.", problems=self.problems)

    def check(self) -> None:
        """Raise :class:`CheckpointError` with every problem noted, if there is any."""
        if self.problems:
            raise CheckpointError("\n".join(self.problems))


def read_json(path: Path) -> dict[str, Any]:
    """A JSON file that holds a mapping.

    Raises:
        CheckpointError: it cannot be read, or holds something else.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: no JSON: {error}") from None
    if not isinstance(values, dict):
        raise CheckpointError(f"{path}: holds {type(values).__name__} where a mapping is due")
    return values


def _is_finite(value: float) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:  # an integer beyond the range of float64
        return False
