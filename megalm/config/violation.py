"""One thing wrong with a configuration, and the changes that would resolve it."""

from __future__ import annotations

import datetime
import difflib
import json
import re
import reprlib
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import chain, islice
from typing import Any

_PLAIN_TEXT = re.compile(r"[\w./@?~ +-]+")
_MOST_CHARACTERS = 60
_MOST_ITEMS, _MOST_TEXT, _MOST_BITS = 100, 1000, 4096
_SPELLED = (bool, float, complex, type(None), datetime.date, datetime.time)
"""What is as short as it is spelled."""


@dataclass(frozen=True)
class Fix:
    """Values of one field, each meant to resolve the violation on its own; the likeliest comes first."""

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
    """A value as an override spells it, on one line and of bounded length, whatever a file made of it."""
    if isinstance(value, str) and _PLAIN_TEXT.fullmatch(value[: _MOST_CHARACTERS + 1]):
        text = value
    elif _is_small(value):
        try:
            text = json.dumps(value, ensure_ascii=False)
        except (TypeError, ValueError):
            text = _LIMITED.repr(value)
    else:
        text = _LIMITED.repr(value)
    return text if len(text) <= _MOST_CHARACTERS else text[: _MOST_CHARACTERS - 3] + "..."


def _is_small(value: Any) -> bool:
    """Whether a value can be spelled out: lists in lists of a small file can be endless, each in the next twice."""
    left, seen = [value], 0
    while left:
        item = left.pop()
        seen += 1
        if seen > _MOST_ITEMS or (isinstance(item, int) and item.bit_length() > _MOST_BITS):
            return False
        if isinstance(item, dict):
            left += islice(chain(item.keys(), item.values()), _MOST_ITEMS + 1)
        elif isinstance(item, list | tuple):
            left += item[: _MOST_ITEMS + 1]
        elif isinstance(item, str) and len(item) > _MOST_TEXT:
            return False
    return True


class _Limited(reprlib.Repr):
    """Spells the beginning of a value, and of what it does not know only the kind: another's ``repr`` can be endless.

    Integers that are too long to be spelled are said by their length.
    """

    def __init__(self) -> None:
        super().__init__()
        self.maxlevel, self.maxstring = 2, _MOST_CHARACTERS
        self.maxlist = self.maxtuple = self.maxset = self.maxdict = 4

    def repr_int(self, x: int, level: int) -> str:
        """See the base class."""
        return f"<int of {x.bit_length()} bits>" if x.bit_length() > _MOST_BITS else super().repr_int(x, level)

    def repr_str(self, x: str, level: int) -> str:  # noqa: ARG002 - the base class passes it
        """See the base class, which spells all of a text before it shortens it."""
        return json.dumps(x[:_MOST_CHARACTERS], ensure_ascii=False)

    def repr_instance(self, x: object, level: int) -> str:  # noqa: ARG002 - the base class passes it
        """See the base class."""
        return repr(x) if isinstance(x, _SPELLED) else f"<{type(x).__name__}>"


_LIMITED = _Limited()


def spoken_list(words: Iterable[str], last: str = "or") -> str:
    """``a``, ``a or b``, ``a, b or c``."""
    *most, final = list(words) or [""]
    return f"{', '.join(most)} {last} {final}" if most else final


def close_matches(word: str, known: Iterable[str]) -> list[str]:
    """The known words that ``word`` may be a misspelling of, closest first."""
    cutoff = 0.6 if len(word) > 3 else 0.5  # one wrong letter weighs more in `tp`
    return difflib.get_close_matches(word, list(dict.fromkeys(known)), n=3, cutoff=cutoff)
