"""Templates of a task and what they make of an item. No torch.

They are Jinja's, in a sandbox, and strict: a name that neither the data nor the settings have is an error.
"""

from __future__ import annotations

import re
import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from jinja2 import StrictUndefined, Template, TemplateSyntaxError, UndefinedError
from jinja2.sandbox import ImmutableSandboxedEnvironment

from megalm.config.violation import format_value, spoken_list
from megalm.data.prepare.corpora.jsonl import lookup
from megalm.evaluate.tasks.data import Item
from megalm.evaluate.tasks.task import CLOZE, GENERATION, LETTER, MULTIPLE_CHOICE, NUMBER_FROM_1, TEXT, Task

WHOLE = "item"
"""The name by which a template has the whole record, for fields that are no names: ``item["Best Answer"]``."""

_IS_UNDEFINED = re.compile(r"^'(.+)' is undefined$")
_ENVIRONMENT = ImmutableSandboxedEnvironment(
    undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True
)


class Unusable(Exception):  # noqa: N818 - caught where the item's place is known
    """An item that a task cannot use; the message is what is wrong and what would be right."""


@dataclass(frozen=True)
class Question:
    """An item as a task puts it.

    Attributes:
        item: the record.
        prompt: what it asks.
        target: what an example ends with: the right text; of a question that has none, what says so.
        references: texts that are right; of a generation alone.
        choices: texts to choose from; of multiple choice alone.
        answer: number of the right one.
    """

    item: Item
    prompt: str
    target: str
    references: tuple[str, ...] = ()
    choices: tuple[str, ...] = ()
    answer: int = 0

    @property
    def identity(self) -> tuple[Any, ...]:
        """Equal of two questions that are the same."""
        return self.prompt, self.target, self.references, self.choices, self.answer


class Templates:
    """The templates of a task, compiled."""

    def __init__(self, task: Task) -> None:
        self._task = task

    def instruction(self) -> str:
        """What comes before everything.

        Raises:
            Unusable: it does not render.
        """
        return self._render(self._instruction, {}, "instruction")

    def question(self, item: Item) -> Question:
        """An item's prompt and what is right.

        Raises:
            Unusable: a field is missing or not what the templates need.
        """
        prompt = self._render(self._prompt, item.fields, "prompt")
        if not prompt.strip():
            raise Unusable("prompt: it is empty; a text of at least one token")
        if self._task.kind == MULTIPLE_CHOICE:
            choices = self._choices_of(item)
            answer = self._answer_of(item, choices)
            return Question(item, prompt, choices[answer], choices=choices, answer=answer)
        target = self._render(self._target, item.fields, "target")
        if self._task.kind == CLOZE and not target:
            raise Unusable("target: it is empty; a text whose likelihood is asked for")
        references = self._references_of(item, target) if self._task.kind == GENERATION else ()
        return Question(item, prompt, target, references=references)

    @cached_property
    def _prompt(self) -> Template:
        return compiled(self._task.prompt)

    @cached_property
    def _target(self) -> Template:
        return compiled(self._task.target or "")

    @cached_property
    def _instruction(self) -> Template:
        return compiled(self._task.instruction)

    @cached_property
    def _answer(self) -> Template:
        return compiled(self._task.answer or "")

    @cached_property
    def _choices(self) -> list[Template]:
        return [compiled(text) for text in self._task.choices or () if not isinstance(self._task.choices, str)]

    def _render(self, template: Template, fields: Mapping[str, Any], name: str) -> str:
        known = {**self._task.settings, WHOLE: fields, **fields}
        try:
            text = template.render(known)
        except UndefinedError as error:
            words = _IS_UNDEFINED.sub(r"there is no field \1", str(error.message))
            raise Unusable(f"{name}: {words}; {_has(fields)}") from None
        except Exception as error:  # a template is a program, and may fail as one
            words = " ".join(str(error).split())[:200].rstrip(".")
            raise Unusable(f"{name}: does not render ({type(error).__name__}: {words}); {_has(fields)}") from None
        return _checked(text, name)

    def _references_of(self, item: Item, target: str) -> tuple[str, ...]:
        if self._task.references is None:
            return (target,)
        found = lookup(dict(item.fields), self._task.references)
        if isinstance(found, str):
            found = [found]
        if not isinstance(found, list) or not all(isinstance(text, str) for text in found):
            raise Unusable(f"references: {_not_texts(self._task.references, found)}; {_has(item.fields)}")
        return tuple(_checked(text, "references") for text in found)

    def _choices_of(self, item: Item) -> tuple[str, ...]:
        if not isinstance(self._task.choices, str):
            choices = tuple(self._render(template, item.fields, "choices") for template in self._choices)
        else:
            found = lookup(dict(item.fields), self._task.choices)
            if not isinstance(found, list) or not all(isinstance(text, str) for text in found):
                raise Unusable(f"choices: {_not_texts(self._task.choices, found)}; {_has(item.fields)}")
            choices = tuple(_checked(text, "choices") for text in found)
        if len(choices) < 2:
            raise Unusable(f"choices: there are {len(choices)}; at least 2")
        if not all(choices):
            raise Unusable("choices: one is empty; texts whose likelihood is asked for")
        return choices

    def _answer_of(self, item: Item, choices: Sequence[str]) -> int:
        text = self._render(self._answer, item.fields, "answer").strip()
        named = self._task.answer_is
        first = {LETTER: "A", NUMBER_FROM_1: "1"}.get(named, "0")
        if named == TEXT:
            number = choices.index(text) if text in choices else -1
            right = spoken_list(map(format_value, choices))
        elif named == LETTER:
            number = string.ascii_uppercase.find(text.upper()) if len(text) == 1 else -1
            right = f"A to {string.ascii_uppercase[min(len(choices), 26) - 1]}"
        else:
            number = int(text) - int(first) if text.isascii() and text.isdigit() and len(text) < 9 else -1
            right = f"{first} to {len(choices) - 1 + int(first)}"
        if not 0 <= number < len(choices):
            raise Unusable(f"answer={format_value(text)}: names none of the {len(choices)} choices; {right}")
        return number


def compiled(source: str) -> Template:
    """A template.

    Raises:
        TemplateSyntaxError: it is none.
    """
    return _ENVIRONMENT.from_string(source)


def syntax_problem(source: str) -> str | None:
    """What is wrong with a template's syntax."""
    try:
        compiled(source)
    except TemplateSyntaxError as error:
        return f"no template: {str(error.message).rstrip('.')}" + (
            f" (its line {error.lineno})" if "\n" in source else ""
        )
    return None


def _checked(text: str, name: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise Unusable(f"{name}: holds half of a character (a lone surrogate); text that UTF-8 can hold") from None
    return text


def _has(fields: Mapping[str, Any]) -> str:
    return f"the record has {spoken_list(map(str, fields), 'and')}" if fields else "the record has no fields"


def _not_texts(field: str, found: Any) -> str:
    return f"there is no field {field}" if found is None else f"field {field} is no list of texts"
