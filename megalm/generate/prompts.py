"""Prompts as users give them ▶ requests, checked all at once. No torch."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megalm.config.violation import format_value
from megalm.data.prepare.corpora.streams import open_text
from megalm.data.tokenization.chat import TOOL_CALLS
from megalm.data.tokenization.tokenizer import Tokenizer
from megalm.errors import ConfigError, DataError, MegalmError
from megalm.generate.asked import check_generate
from megalm.generate.output import WRITTEN
from megalm.generate.requests import GenerateRequest, Sampling
from megalm.runs.find import KnownModel

DEFAULT_NEW_TOKENS = 120
"""Most new tokens where the user names no number, as far as the model has room for them."""

_MOST_PROBLEMS = 20


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How every prompt of a command is continued; see :class:`GenerateRequest`.

    Attributes:
        max_new_tokens: None: :data:`DEFAULT_NEW_TOKENS`, or what fits behind the prompt.
    """

    max_new_tokens: int | None = None
    sampling: Sampling = field(default_factory=Sampling)
    stop: tuple[str, ...] = ()
    samples: int = 1
    beams: int = 1
    length_penalty: float = 1.0
    alternatives: int | None = None
    slides: bool = False

    def request(self, tokens: Sequence[int], longest: int) -> GenerateRequest:
        """The request of a prompt, for a model whose sequences have at most ``longest`` tokens."""
        new = self.max_new_tokens
        if new is None:
            room = longest - len(tokens)
            new = DEFAULT_NEW_TOKENS if self.slides or room <= 0 else min(DEFAULT_NEW_TOKENS, room)
        return GenerateRequest(
            tokens=tuple(tokens),
            max_new_tokens=new,
            sampling=self.sampling,
            stop=self.stop,
            samples=self.samples,
            beams=self.beams,
            length_penalty=self.length_penalty,
            alternatives=self.alternatives,
            slides=self.slides,
        )


@dataclass(frozen=True)
class Prompt:
    """A prompt of a file.

    Attributes:
        name: how messages call it.
        fields: the object that it stands in.
        tokens: of it.
    """

    name: str
    fields: Mapping[str, Any]
    tokens: tuple[int, ...]


def text_prompt(tokenizer: Tokenizer, text: str) -> Prompt:
    """One prompt from the command line."""
    return Prompt("prompt", {"prompt": text}, tuple(tokenizer.encode_prompt(text)))


def read_prompts(path: Path, tokenizer: Tokenizer) -> list[Prompt]:
    """The prompts of a file of JSON Lines: ``{"prompt": "…"}`` or ``{"messages": [{"role": …, "content": …}, …]}``.

    Raises:
        DataError: the file cannot be read, or lines of it are wrong: one line for each of the first.
    """
    prompts, problems = [], []
    for name, line in _lines(path):
        try:
            prompts.append(_prompt(name, line, tokenizer))
        except MegalmError as error:
            problems.append(str(error))
    if problems:
        more = len(problems) - _MOST_PROBLEMS
        raise DataError("\n".join([*problems[:_MOST_PROBLEMS], *([f"{path}: and {more} more"] if more > 0 else [])]))
    if not prompts:
        raise DataError(f'{path}: holds no prompt; one object per line, {{"prompt": "…"}}')
    return prompts


def requests_of(found: KnownModel, prompts: Sequence[Prompt], settings: Settings) -> list[GenerateRequest]:
    """The requests of prompts, checked against the model.

    Raises:
        ConfigError, DataError: what is wrong with settings, or with a prompt, one line each.
    """
    longest = found.config.model.sequence_length
    requests = [settings.request(prompt.tokens, longest) for prompt in prompts]
    check_generate(found, requests, [prompt.name for prompt in prompts])
    return requests


def _lines(path: Path) -> Iterator[tuple[str, str]]:
    """Lines that are not blank, and what messages call them; the file may be compressed."""
    try:
        with open_text(path, None) as file:
            for number, line in enumerate(io.TextIOWrapper(file.content, encoding="utf-8"), 1):
                if line.strip():
                    yield f"{path}: line {number}", line
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8: {error.reason} at byte {error.start}; text in UTF-8") from None


def _prompt(name: str, line: str, tokenizer: Tokenizer) -> Prompt:
    try:
        fields = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{name}: no JSON: {error}") from None
    if not isinstance(fields, dict):
        raise DataError(f'{name}: {format_value(fields)}: no object; {{"prompt": "…"}}')
    if taken := sorted(WRITTEN & fields.keys()):
        raise DataError(f"{name}: field {taken[0]}: the output has one of this name; another name, or without it")
    if fields.get("prompt") is not None and fields.get("messages") is not None:
        raise DataError(f'{name}: has "prompt" and "messages"; one of the two')
    if "messages" in fields and fields.get("prompt") is None:
        messages = checked_messages(fields["messages"], name)
        try:
            return Prompt(name, fields, tuple(tokenizer.encode_conversation(messages)))
        except DataError as error:
            raise DataError(f"{name}: messages: {error}") from None
    if "prompt" not in fields:
        has = ", ".join(fields) or "nothing"
        raise DataError(f'{name}: has no field "prompt" (it has {has}); "prompt", or "messages"')
    text = fields["prompt"]
    if not isinstance(text, str):
        raise DataError(f"{name}: prompt={format_value(text)}: no text")
    try:
        return Prompt(name, fields, tuple(tokenizer.encode_prompt(text)))
    except DataError as error:
        raise DataError(f"{name}: prompt: {error}") from None


def checked_messages(value: Any, name: str) -> list[dict[str, str]]:
    """Messages of a conversation, as mappings of ``role`` and ``content``.

    Raises:
        DataError: they are none.
    """
    right = 'a list of {"role": "user", "content": "…"}'
    if not isinstance(value, list) or not value:
        raise DataError(f"{name}: messages={format_value(value)}: no messages; {right}")
    for number, message in enumerate(value, 1):
        texts = isinstance(message, dict) and all(isinstance(message.get(key), str) for key in ("role", "content"))
        if not texts:
            raise DataError(f"{name}: message {number}: no role and content in text; {right}")
        if calls := next((key for key in TOOL_CALLS if message.get(key)), None):
            raise DataError(f"{name}: message {number}: has {calls}, and text alone is read; the call as its content")
    return [{"role": message["role"], "content": message["content"]} for message in value]


def check_settings(settings: Settings) -> None:
    """Refuse settings that no prompt could be continued with.

    Raises:
        ConfigError: every one of them, one line each.
    """
    settings.request((0,), 1)
    if settings.beams > 1 and settings.sampling.temperature > 0:
        raise ConfigError(
            f"beams={settings.beams}: beam search draws nothing, and temperature={settings.sampling.temperature:g}; "
            "temperature=0, or beams=1"
        )
