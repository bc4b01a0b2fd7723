"""One thing wrong with a configuration, and the changes that would mend it."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

_PLAIN_TEXT = re.compile(r"[\w./@?~ +-]+")
_MOST_CHARACTERS = 60


@dataclass(frozen=True)
class Fix:
    """Values of one field, each of which is meant to mend a violation on its own; the likeliest comes first."""

    field: str
    values: tuple[Any, ...]

    def __str__(self) -> str:
        return f"{self.field}={spoken_list(map(format_value, self.values))}"


@dataclass(frozen=True)
class Violation:
    """What is wrong with the value of one field.

    Attributes:
        field: dotted name of the field to change, as an override spells it.
        value: what the field holds.
        wrong: what is wrong with the value.
        right: what would be right, in words; empty when ``fixes`` say it all.
        fixes: concrete values that would be right.
    """

    field: str
    value: Any
    wrong: str
    right: str = ""
    fixes: tuple[Fix, ...] = ()

    def __str__(self) -> str:
        remedy = ", or ".join([*([self.right] if self.right else []), *map(str, self.fixes)])
        return f"{self.field}={format_value(self.value)}: {self.wrong}; {remedy}"


def format_value(value: Any) -> str:
    """A value as an override spells it, on one line and of bounded length."""
    if isinstance(value, str) and _PLAIN_TEXT.fullmatch(value):
        text = value
    else:
        try:
            text = json.dumps(value, ensure_ascii=False)
        except (TypeError, ValueError):
            text = " ".join(repr(value).split())
    return text if len(text) <= _MOST_CHARACTERS else text[: _MOST_CHARACTERS - 3] + "..."


def spoken_list(words: Iterable[str], last: str = "or") -> str:
    """``a``, ``a or b``, ``a, b or c``."""
    *most, final = list(words) or [""]
    return f"{', '.join(most)} {last} {final}" if most else final


def close_matches(word: str, known: Iterable[str]) -> list[str]:
    """The known words that ``word`` may be a misspelling of, closest first."""
    cutoff = 0.6 if len(word) > 3 else 0.5  # one wrong letter weighs more in `tp`
    return difflib.get_close_matches(word, list(dict.fromkeys(known)), n=3, cutoff=cutoff)
