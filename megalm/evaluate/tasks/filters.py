"""From what a model wrote to what is scored. No torch."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

from megalm.evaluate.tasks.task import Filter

REGEX = "regex"

FILTERS: dict[str, Callable[[str], str]] = {
    "strip": str.strip,
    "first_line": lambda text: text.strip().partition("\n")[0].rstrip(),
    "lower": str.lower,
}
"""Filters without a setting. ``first_line`` is the first line that is not empty."""


def filtered(text: str, filters: Sequence[Filter]) -> str:
    """A text after all filters; after ``regex`` the first match, its first group if it has one, else nothing."""
    for each in filters:
        text = _matched(text, each.pattern) if each.name == REGEX else FILTERS[each.name](text)
    return text


def _matched(text: str, pattern: str) -> str:
    found = re.search(pattern, text)
    if found is None:
        return ""
    return (found.group(1) or "") if found.re.groups else found.group()
