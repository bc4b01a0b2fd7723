"""Conversations ▶ tokens: marks of a chat template are tokens where the template or a prompt writes them. No torch."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from typing import TYPE_CHECKING

from megalm.data.document import Document, Rejected, Segment
from megalm.data.tokenization.chat import ASSISTANT, CHATML, TURN_END, TURN_START, ChatTemplate, TemplateRefusal
from megalm.data.tokenization.roles import Roles
from megalm.data.tokenization.settings_files import ROLES
from megalm.errors import DataError

if TYPE_CHECKING:
    import tokenizers


class ChatTokens:
    """A tokenizer that finds the marks of a chat template in text, and no other special token.

    Args:
        tokenizer: with its special tokens marked as such; it is copied.
        template: the chat template.
    """

    def __init__(self, tokenizer: tokenizers.Tokenizer, template: ChatTemplate) -> None:
        self.template = template
        self.mark_ids = frozenset(
            number for mark in template.marks if (number := tokenizer.token_to_id(mark)) is not None
        )
        end = None if template.turn_end is None else tokenizer.token_to_id(template.turn_end)
        self.turn_end_id: int | None = end
        """The token that ends an assistant's turn; None: the template has none."""
        self._definition = str(tokenizer.to_str())

    @cached_property
    def tokenizer(self) -> tokenizers.Tokenizer:
        """The copy: the library finds tokens that are not special in any text."""
        import tokenizers

        parts = json.loads(self._definition)
        for token in parts["added_tokens"]:
            token["special"] = token["special"] and token["content"] not in self.template.marks
        copy = tokenizers.Tokenizer.from_str(json.dumps(parts))
        copy.encode_special_tokens = True
        return copy

    def render(self, document: Document) -> Document | Rejected:
        """A conversation as its template writes it, in stretches that are learnt and that are not."""
        messages = [{"role": segment.role or "", "content": str(segment.text)} for segment in document.segments]
        try:
            rendered = self.template.render(messages)
        except TemplateRefusal as reason:
            return Rejected(document.name, str(reason))
        if not rendered.learnt:
            return Rejected(document.name, f"the chat template writes nothing that the {ASSISTANT} says")
        segments = tuple(Segment(text, learnt=learnt) for text, learnt in rendered.segments())
        return replace(document, segments=segments, marked=True)


def chat_of(tokenizer: tokenizers.Tokenizer, roles: Roles) -> ChatTokens | None:
    """A tokenizer's own chat template; None: it has none.

    Raises:
        DataError: it is no template.
    """
    return None if roles.chat_template is None else _with_template(tokenizer, roles, roles.chat_template)


def chatml_of(tokenizer: tokenizers.Tokenizer, roles: Roles) -> ChatTokens:
    """ChatML, for a tokenizer that has its marks.

    Raises:
        DataError: it has not.
    """
    missing = [mark for mark in (TURN_START, TURN_END) if tokenizer.token_to_id(mark) is None]
    if missing:
        raise DataError(
            f"the tokenizer has no chat template and no token {missing[0]}, which marks turns of a conversation; "
            f"megalm tokenizer --special-token '{TURN_START}' '{TURN_END}' trains one that has them, and with "
            "--from TOKENIZER adds them to one that a model knows"
        )
    return _with_template(tokenizer, roles, CHATML)


def _with_template(tokenizer: tokenizers.Tokenizer, roles: Roles, template: str) -> ChatTokens:
    tokens = {f"{role}_token": token for role in ROLES if (token := roles.token(role)) is not None}
    added = [token.content for _, token in sorted(tokenizer.get_added_tokens_decoder().items())]
    return ChatTokens(tokenizer, ChatTemplate(template, tokens, added))


def learnt_tokens(segments: Sequence[Segment], offsets: Sequence[tuple[int, int]]) -> list[bool]:
    """Which tokens of a document's text carry loss: those that any character of a learnt segment is in.

    Args:
        segments: whose texts, end to end, the text is.
        offsets: of each token in it, ascending: first character, and the one after the last.
    """
    ends, place = [], 0
    for segment in segments:
        place += len(segment.text)
        ends.append(place)
    flags, number, last = [], 0, len(segments) - 1
    for start, stop in offsets:
        while number < last and ends[number] <= start:
            number += 1
        within = number
        learnt = segments[within].learnt
        while not learnt and within < last and ends[within] < stop:
            within += 1
            learnt = segments[within].learnt
        flags.append(learnt)
    return flags
