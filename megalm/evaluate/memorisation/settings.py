"""A task of kind ``memorisation``, as its file describes it, read strictly. No torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

from megalm.config.support import LARGEST_INT, LARGEST_INT64
from megalm.config.violation import Violation, close_matches, spoken_list
from megalm.errors import ConfigError
from megalm.evaluate.tasks.task import MEMORISATION
from megalm.evaluate.tasks.task_file import BASE, TaskFields
from megalm.evaluate.tasks.task_values import Wrong, filled_text, text_value, whole_number


@dataclass(frozen=True, kw_only=True)
class Memorisation:
    """The settings of the task. The fields are those of the file; docs/evaluation.md has a table of them.

    Attributes:
        name: the file's, without its ending.
        places: field ▶ file and line where it is set, for messages.
        about: what it measures, in a line.
        prompt_tokens: lengths of the prompts, ascending; all of them end where the continuation begins.
        continuation_tokens: tokens that must follow.
        documents: only training documents whose names hold this text are asked for; None: all.
        limit: most passages of each group.
        worst: how many of the passages that were continued word for word are listed.
        seed: of the draw and of the intervals.
    """

    name: str
    places: Mapping[str, str]
    about: str = ""
    prompt_tokens: tuple[int, ...] = (8, 16, 32)
    continuation_tokens: int = 32
    documents: str | None = None
    limit: int = 200
    worst: int = 10
    seed: int = 1234

    @property
    def passage_tokens(self) -> int:
        """Of the longest prompt and the continuation."""
        return self.prompt_tokens[-1] + self.continuation_tokens

    def changed(self, *, limit: int | None, seed: int | None) -> Memorisation:
        """With what a command line gives; None: as the file says."""
        return replace(self, limit=self.limit if limit is None else limit, seed=self.seed if seed is None else seed)

    def check_length(self, sequence_length: int) -> None:
        """Refuse passages that are longer than the model's sequences, which none was read in.

        Raises:
            ConfigError: saying which lengths fit.
        """
        if self.passage_tokens <= sequence_length:
            return
        room = sequence_length - self.continuation_tokens
        wrong = (
            f"prompt and continuation_tokens={self.continuation_tokens} are {self.passage_tokens} tokens, more than "
            f"model.sequence_length={sequence_length}"
        )
        fewer = f"at most {room}" if room > 0 else f"fewer, and continuation_tokens below {sequence_length}"
        right = f"{fewer}: a task file of your own with base: {self.name}"
        value = list(self.prompt_tokens)
        raise ConfigError(f"{self._place('prompt_tokens')}: {Violation('prompt_tokens', value, wrong, right)}")

    def definition(self) -> dict[str, Any]:
        """All fields as plain values, for the record of a result."""
        values = {field.name: getattr(self, field.name) for field in fields(self) if field.name != "places"}
        return {"kind": MEMORISATION, **values, "prompt_tokens": list(self.prompt_tokens)}

    def _place(self, field: str) -> str:
        return self.places.get(field, self.places[""])


def _lengths(value: Any) -> tuple[int, ...]:
    values = [value] if isinstance(value, int) else value
    if not isinstance(values, list) or not values:
        raise Wrong("not lengths", "a list of numbers of tokens, such as [8, 16, 32]")
    return tuple(sorted({whole_number(1, LARGEST_INT)(each) for each in values}))


_CHECKS: dict[str, Callable[[Any], Any]] = {
    "kind": text_value,
    "about": text_value,
    "prompt_tokens": _lengths,
    "continuation_tokens": whole_number(1, LARGEST_INT),
    "documents": filled_text,
    "limit": whole_number(1, LARGEST_INT),
    "worst": whole_number(0, LARGEST_INT),
    "seed": whole_number(0, LARGEST_INT64),
}
FIELDS = tuple(_CHECKS)


def read_memorisation(found: TaskFields) -> Memorisation:
    """The task of a file whose ``kind`` is memorisation.

    Raises:
        ConfigError: everything that is wrong with it, one line each.
    """
    problems: list[str] = []
    parsed: dict[str, Any] = {}

    def note(field: Any, wrong: str, right: str) -> None:
        place = found.places.get(str(field), found.places[""])
        problems.append(f"{place}: {Violation(str(field), found.values[field], wrong, right)}")

    for field, value in found.values.items():
        if field not in _CHECKS:
            close = close_matches(str(field), (*FIELDS, BASE))
            right = f"did you mean {spoken_list(close)}?" if close else spoken_list((*FIELDS, BASE), "and")
            note(field, "a task of kind memorisation has no such field", right)
        elif value is not None or field != "documents":
            try:
                parsed[field] = _CHECKS[field](value)
            except Wrong as problem:
                note(field, problem.wrong, problem.right)
    if problems:
        raise ConfigError(problems)
    return Memorisation(
        name=found.name,
        places=dict(found.places),
        **{field: value for field, value in parsed.items() if field != "kind"},
    )
