"""A task: its data, its templates, its examples and its metrics, as ``conf/task/NAME.yaml`` describes it. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

GENERATION, MULTIPLE_CHOICE, CLOZE = "generation", "multiple_choice", "cloze"
KINDS = (GENERATION, MULTIPLE_CHOICE, CLOZE)
"""How the model is asked: to write a text, to choose among texts by their likelihood, or how likely one text is."""

MEMORISATION = "memorisation"
"""The kind of task whose items are the run's own training text: see :mod:`megalm.evaluate.memorisation.settings`."""

NUMBER, NUMBER_FROM_1, LETTER, TEXT = "number", "number_from_1", "letter", "text"
ANSWERS = (NUMBER, NUMBER_FROM_1, LETTER, TEXT)
"""How data name the right choice: 0 is the first; 1 is; A is; or by its text."""

REFUSE, CUT = "refuse", "cut"
TOO_LONG = (REFUSE, CUT)
"""What becomes of an item that does not fit the model's sequences even without examples."""


@dataclass(frozen=True)
class MetricChoice:
    """A metric that a task names.

    Attributes:
        name: of ``metrics.registry.METRICS``.
        options: that differ from the metric's defaults.
    """

    name: str
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Filter:
    """One step from what a model wrote to what is scored.

    Attributes:
        name: of ``filters.FILTERS``.
        pattern: of ``regex``.
    """

    name: str
    pattern: str = ""


@dataclass(frozen=True, kw_only=True)
class Task:
    """A task file, checked. The fields are those of the file; docs/evaluation.md has a table of them.

    Attributes:
        name: the file's, without its ending.
        places: field ▶ file and line where it is set, for messages.
        kind: how the model is asked: one of ``KINDS``.
        about: what it measures, in a line.
        data: JSON Lines, or ``hf:`` and a dataset's name or folder; None: given on the command line.
        hf_config: configuration of a Hugging Face dataset.
        hf_split: its split.
        prompt: template of what an item asks.
        target: template of the right text: the reference, and what an example ends with.
        references: field of the data that has all texts that are right; None: ``target`` alone.
        choices: field with the texts to choose from, or their templates.
        answer: template of what names the right choice.
        answer_is: what that is: one of ``ANSWERS``.
        unconditional_prompt: of ``accuracy_unconditional``: after which a choice is as likely as it is by itself.
        instruction: template, of the settings alone, of what comes before everything.
        separator: between a prompt and its answer.
        example_separator: after each example.
        settings: further names that templates know.
        examples: how many worked examples come before each item.
        examples_data: where they are from; None: the other items of ``data``.
        examples_split: split of a Hugging Face dataset they are from; None: ``hf_split``.
        examples_shared: whether all items have the same ones.
        seed: of the draw of examples, of sampled texts and of the bootstrap.
        limit: only the first so many items are asked; None: all.
        too_long: one of ``TOO_LONG``.
        max_new_tokens: most tokens of a text.
        stop: texts that end it.
        temperature: 0: the likeliest token at each place.
        filters: from what was written to what is scored, in order.
        metrics: the first is the headline.
    """

    name: str
    places: Mapping[str, str]
    kind: str
    about: str = ""
    data: str | None = None
    hf_config: str | None = None
    hf_split: str = "test"
    prompt: str
    target: str | None = None
    references: str | None = None
    choices: str | tuple[str, ...] | None = None
    answer: str | None = None
    answer_is: str = NUMBER
    unconditional_prompt: str | None = None
    instruction: str = ""
    separator: str = " "
    example_separator: str = "\n\n"
    settings: Mapping[str, Any] = field(default_factory=dict)
    examples: int = 0
    examples_data: str | None = None
    examples_split: str | None = None
    examples_shared: bool = False
    seed: int = 1234
    limit: int | None = None
    too_long: str = REFUSE
    max_new_tokens: int = 64
    stop: tuple[str, ...] = ("\n",)
    temperature: float = 0.0
    filters: tuple[Filter, ...] = (Filter("strip"),)
    metrics: tuple[MetricChoice, ...]

    def place(self, name: str) -> str:
        """Where a field is set, or the task's file."""
        return self.places.get(name, self.places[""])

    def definition(self) -> dict[str, Any]:
        """All fields as plain values, for the record of a result."""
        values = {name: value for name, value in vars(self).items() if name != "places"}
        return {name: _plain(value) for name, value in values.items()}


def _plain(value: Any) -> Any:
    if isinstance(value, MetricChoice):
        return {value.name: dict(value.options)} if value.options else value.name
    if isinstance(value, Filter):
        return {value.name: value.pattern} if value.pattern else value.name
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    return dict(value) if isinstance(value, Mapping) else value
