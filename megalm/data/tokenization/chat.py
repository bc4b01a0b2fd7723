"""Conversations ▶ text, as a model's own chat template has it, and which of it the model is to say. No torch.

A template is a program in Jinja's language that comes with a tokenizer. It is run as Hugging Face's ``transformers``
runs it, in a sandbox: it sees the messages, the names of special tokens, and nothing else.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import pairwise
from typing import Any, NoReturn

from jinja2 import TemplateError, nodes
from jinja2.exceptions import TemplateSyntaxError
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from megalm.errors import DataError

TURN_START, TURN_END = "<|im_start|>", "<|im_end|>"
"""Special tokens around a turn of ChatML."""
CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>{{ '\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant{{ '\\n' }}{% endif %}"
)
"""OpenAI's Chat Markup Language, for tokenizers that have its marks and no template."""
ASSISTANT = "assistant"
"""The role whose turns are learnt."""
TOOL_CALLS = ("tool_calls", "function_call")
"""Fields in which some messages say what their content does not."""

Message = Mapping[str, str]
Span = tuple[int, int]
"""First character, and the one after the last."""

_OPEN, _CLOSE = "\ufdd0", "\ufdd1"
"""Noncharacters around what a template's ``generation`` blocks give."""
_TODAY = datetime(2024, 7, 26, tzinfo=UTC)
"""What templates are told when they ask for the date: data must not depend on the day of their preparation. It is the
one that Llama 3.2's template takes where it cannot ask."""
_PROBES: tuple[tuple[Message, ...], ...] = tuple(
    tuple({"role": role, "content": f"text{number}"} for number, role in enumerate(roles))
    for roles in (
        ("user",),
        ("user", ASSISTANT),
        ("system", "user", ASSISTANT),
        ("user", ASSISTANT, "user", ASSISTANT),
    )
)
"""Conversations that show which marks a template writes."""


class TemplateRefusal(Exception):  # noqa: N818 - an answer, not an error
    """A template does not take a conversation; the message is its reason."""


@dataclass(frozen=True)
class Rendered:
    """A conversation as text.

    Attributes:
        text: all of it.
        learnt: what the assistant says, its ends of turns included; in order, apart from each other.
    """

    text: str
    learnt: tuple[Span, ...]

    def segments(self) -> Iterator[tuple[str, bool]]:
        """The text in stretches, each with whether it is learnt."""
        place = 0
        for start, stop in self.learnt:
            for end, learnt in ((start, False), (stop, True)):
                if end > place:
                    yield self.text[place:end], learnt
                    place = end
        if place < len(self.text):
            yield self.text[place:], False


class ChatTemplate:
    """A chat template, compiled.

    Args:
        source: in Jinja's language.
        tokens: names of special tokens as templates use them ▶ their contents, such as ``bos_token`` ▶ ``<s>``.
        added: contents of all tokens that are cut out of text before it is split into words.

    Raises:
        DataError: it is no template.
    """

    def __init__(self, source: str, tokens: Mapping[str, str], added: Sequence[str] = ()) -> None:
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationBlocks, "jinja2.ext.loopcontrols"]
        )
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _refuse
        environment.globals["strftime_now"] = _TODAY.strftime
        self.source = source
        self._tokens = dict(tokens)
        try:
            self._template = environment.from_string(source)
        except TemplateSyntaxError as error:
            raise DataError(f"chat template: line {error.lineno}: {error.message}") from None
        self._in_parts = self._takes_parts()
        shown = source + "".join(self._shown())
        # Some tokenizers have added runs of spaces and of line ends, which are text.
        self.marks = tuple(token for token in added if token.strip() and token in shown)
        """Added tokens that the template writes: the marks of its turns."""
        self.turn_end = self._find_turn_end()
        """The mark that ends an assistant's turn; None: the template has none."""

    def text(self, messages: Sequence[Message], *, add_generation_prompt: bool = False) -> str:
        """A conversation as text; with ``add_generation_prompt`` up to where the assistant begins to speak.

        Raises:
            TemplateRefusal: the template does not take it.
        """
        return re.sub(f"[{_OPEN}{_CLOSE}]", "", self._run(messages, add_generation_prompt))

    def render(self, messages: Sequence[Message]) -> Rendered:
        """A conversation as text, and what of it the assistant says.

        Raises:
            TemplateRefusal: the template does not take it, or does not show where the assistant speaks.
        """
        if any(mark in message["content"] for message in messages for mark in (*self.marks, _OPEN, _CLOSE)):
            raise TemplateRefusal("a message spells a mark of the chat template")
        marked = self._run(messages, add_generation_prompt=False)
        if _OPEN in marked:
            text, spans = _cut_out(marked)
        else:
            text, spans = marked, [self._span(marked, messages, n) for n in _answers(messages)]
        spans = [span for span in (self._without_space_after(text, span) for span in spans) if span[0] < span[1]]
        if any(one[1] > other[0] for one, other in pairwise(spans)):
            raise TemplateRefusal("the chat template does not write turns in order")
        return Rendered(text, tuple(spans))

    def _span(self, text: str, messages: Sequence[Message], number: int) -> Span:
        """Where in the text the assistant's message of this number is, its end of turn included.

        A template writes turn after turn, so that what it writes of the first messages begins the whole; one that
        writes earlier answers differently from the last one is shown two other answers in this place.
        """
        before = self.text(messages[:number], add_generation_prompt=True)
        until = self.text(messages[: number + 1])
        if until.startswith(before) and text.startswith(until):
            return len(before), len(until)
        one, other = (
            self.text([*messages[:number], {**messages[number], "content": word}, *messages[number + 1 :]])
            for word in ("Aa", "Bbb")
        )
        start = _common(one, other)
        left = _common(one[::-1], other[::-1])
        stop = len(text) - left
        if not (one[:start] == text[:start] and one[len(one) - left :] == text[stop:] and start <= stop):
            raise TemplateRefusal("the chat template does not show where the assistant speaks")
        ends = [stop + found.end() for mark in self.marks if (found := re.match(rf"\s*{re.escape(mark)}", text[stop:]))]
        return start, min(ends, default=stop)

    def _without_space_after(self, text: str, span: Span) -> Span:
        """The span up to the mark at its end: what comes between turns is nothing that the assistant says."""
        start, stop = span
        said = text[start:stop].rstrip()
        return (start, start + len(said)) if said.endswith(self.marks) else span

    def _find_turn_end(self) -> str | None:
        for probe in _PROBES[1:]:
            try:
                text, start = self.text(probe), len(self.text(probe[:-1], add_generation_prompt=True))
            except TemplateRefusal:
                continue
            after = text.find(probe[-1]["content"], min(start, len(text)))
            if after < 0:
                after = text.rfind(probe[-1]["content"])
            found = {text.find(mark, after): mark for mark in self.marks if after >= 0 and text.find(mark, after) >= 0}
            return found[min(found)] if found else None
        return None

    def _takes_parts(self) -> bool:
        """Whether it wants a message's content as a list of parts, as templates of models that see images do.

        Such a template goes through the characters of a text as if they were parts, and writes none of them.
        """
        for probe in _PROBES:
            for in_parts in (False, True):
                self._in_parts = in_parts
                try:
                    written = self.text(probe)
                except TemplateRefusal:
                    continue
                if all(message["content"] in written for message in probe):
                    return in_parts
        return False

    def _shown(self) -> Iterator[str]:
        """What the template makes of the probes that it takes."""
        for probe in _PROBES:
            for prompted in (False, True):
                try:
                    yield self.text(probe, add_generation_prompt=prompted)
                except TemplateRefusal:
                    continue

    def _given(self, message: Message) -> dict[str, object]:
        """A message as the template wants it."""
        return {**message, "content": [{"type": "text", "text": message["content"]}]} if self._in_parts else {**message}

    def _run(self, messages: Sequence[Message], add_generation_prompt: bool) -> str:
        try:
            return self._template.render(
                messages=[self._given(message) for message in messages],
                tools=None,
                documents=None,
                add_generation_prompt=add_generation_prompt,
                **self._tokens,
            )
        except TemplateError as error:
            raise TemplateRefusal(f"the chat template refuses it: {_one_line(error)}") from None
        except Exception as error:  # a template is a program, and may fail as one
            raise TemplateRefusal(f"the chat template fails: {type(error).__name__}: {_one_line(error)}") from None


class _GenerationBlocks(Extension):
    """``{% generation %}…{% endgeneration %}``, with which a template says itself what the assistant says."""

    tags = {"generation"}  # noqa: RUF012 - jinja2 declares it so

    def parse(self, parser: Parser) -> nodes.Node:
        """Put the noncharacters around what the block gives."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_marked"), [], [], body).set_lineno(line)

    def _marked(self, caller: Callable[[], str]) -> str:
        return f"{_OPEN}{caller()}{_CLOSE}"


def _cut_out(marked: str) -> tuple[str, list[Span]]:
    """A text without the noncharacters, and the stretches that were between them."""
    parts, spans, length = [], [], 0
    for number, part in enumerate(re.split(f"[{_OPEN}{_CLOSE}]", marked)):
        if number % 2:
            spans.append((length, length + len(part)))
        parts.append(part)
        length += len(part)
    return "".join(parts), spans


def _answers(messages: Sequence[Message]) -> list[int]:
    return [number for number, message in enumerate(messages) if message["role"] == ASSISTANT]


def _common(one: str, other: str) -> int:
    """How many characters two texts begin with alike."""
    pairs = zip(one, other, strict=False)
    return next((n for n, (a, b) in enumerate(pairs) if a != b), min(len(one), len(other)))


def _to_json(value: Any, indent: int | None = None, **options: Any) -> str:
    """As ``transformers`` has it: no escapes for HTML."""
    return json.dumps(value, indent=indent, **{"ensure_ascii": False, **options})


def _refuse(message: object) -> NoReturn:
    raise TemplateError(str(message))


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
