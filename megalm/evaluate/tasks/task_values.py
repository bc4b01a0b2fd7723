"""Values of task files, checked one by one. No torch."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from megalm.config.support import LARGEST_INT, LARGEST_INT64
from megalm.config.violation import spoken_list
from megalm.evaluate.tasks.filters import FILTERS, REGEX
from megalm.evaluate.tasks.prompts import WHOLE, syntax_problem
from megalm.evaluate.tasks.task import ANSWERS, KINDS, MEMORISATION, TOO_LONG, Filter


class Wrong(Exception):  # noqa: N818 - caught below
    """What is wrong with a value, and what would be right."""

    def __init__(self, wrong: str, right: str) -> None:
        super().__init__(wrong)
        self.wrong, self.right = wrong, right


def text_value(value: Any) -> str:
    """Text."""
    if not isinstance(value, str):
        raise Wrong("not text", "text, in quotes if YAML takes it for something else")
    return value


def filled_text(value: Any) -> str:
    """Text that is more than spaces."""
    if not text_value(value).strip():
        raise Wrong("empty", "text")
    return text_value(value)


def _template(value: Any) -> str:
    problem = syntax_problem(text_value(value))
    if problem is not None:
        raise Wrong(problem, "text with {{ field }} in it, as Jinja has it")
    return text_value(value)


def _choice(*known: str) -> Callable[[Any], str]:
    def check(value: Any) -> str:
        if value not in known:
            raise Wrong("there is no such choice", spoken_list(known))
        return str(value)

    return check


def whole_number(low: int, high: int) -> Callable[[Any], int]:
    """An integer in a range, both ends included."""

    def check(value: Any) -> int:
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise Wrong("out of range" if type(value) is int else "not an integer", f"an integer, {low} to {high}")
        return value

    return check


def _flag(value: Any) -> bool:
    if not isinstance(value, bool):
        raise Wrong("not a flag", "true or false")
    return value


def _temperature(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < float("inf"):
        raise Wrong("not a temperature", "0 (the likeliest token) or above")
    return float(value)


def _stops(value: Any) -> tuple[str, ...]:
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list) or not all(isinstance(text, str) and text for text in texts):
        raise Wrong("not texts to stop at", 'a list of texts that are not empty, such as ["\\n"]; [] for none')
    return tuple(texts)


def _choices(value: Any) -> str | tuple[str, ...]:
    if isinstance(value, list) and len(value) > 1:
        return tuple(_template(text) for text in value)
    if isinstance(value, str) and value.strip():
        return value
    raise Wrong("not choices", "the name of a field that has a list of texts, or a list of two templates or more")


def _settings(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict) or not all(isinstance(key, str) and key.isidentifier() for key in value):
        raise Wrong("not settings", "lines of NAME: VALUE, whose names templates use")
    if WHOLE in value:
        raise Wrong(f"{WHOLE} is the name of the whole record", "another name")
    return value


def _filters(value: Any) -> tuple[Filter, ...]:
    if not isinstance(value, list):
        raise Wrong("not a list", f"a list of {spoken_list(FILTERS)}, or {REGEX}: PATTERN")
    return tuple(map(_filter, value))


def _filter(value: Any) -> Filter:
    if isinstance(value, str) and value in FILTERS:
        return Filter(value)
    if isinstance(value, dict) and list(value) == [REGEX] and isinstance(value[REGEX], str):
        try:
            re.compile(value[REGEX])
        except re.error as error:
            raise Wrong(f"no regular expression: {error}", "one that Python's re knows") from None
        return Filter(REGEX, value[REGEX])
    raise Wrong("there is no such filter", f"{spoken_list(FILTERS)}, or {REGEX}: PATTERN")


CHECKS: dict[str, Callable[[Any], Any]] = {
    "kind": _choice(*KINDS, MEMORISATION),
    "about": text_value,
    "data": filled_text,
    "hf_config": filled_text,
    "hf_split": filled_text,
    "prompt": _template,
    "target": _template,
    "references": filled_text,
    "choices": _choices,
    "answer": _template,
    "answer_is": _choice(*ANSWERS),
    "unconditional_prompt": filled_text,
    "instruction": _template,
    "separator": text_value,
    "example_separator": text_value,
    "settings": _settings,
    "examples": whole_number(0, LARGEST_INT),
    "examples_data": filled_text,
    "examples_split": filled_text,
    "examples_shared": _flag,
    "seed": whole_number(0, LARGEST_INT64),
    "limit": whole_number(1, LARGEST_INT),
    "too_long": _choice(*TOO_LONG),
    "max_new_tokens": whole_number(1, LARGEST_INT),
    "stop": _stops,
    "temperature": _temperature,
    "filters": _filters,
}
"""Field ▶ its value, checked; ``metrics`` depend on the kind."""
