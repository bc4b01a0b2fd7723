"""The text of tokens as they come, and where a stop text ends it. No torch."""

from __future__ import annotations

from collections.abc import Sequence

from megalm.data.tokenization.tokenizer import Tokenizer

_CONTEXT = 8
"""Tokens before the new ones with which these are decoded: what a token spells depends on its neighbours, as where a
character's bytes are parted or a word's first space is left out, and never on tokens far away."""

_UNFINISHED = "\N{REPLACEMENT CHARACTER}"
"""What a tokenizer decodes bytes as that are no whole character yet."""


class GrowingText:
    """Text that follows a prompt, token by token.

    Args:
        tokenizer: of the model.
        prompt: tokens before the first new one.
        stop: texts that end it.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int], stop: Sequence[str] = ()) -> None:
        self._tokenizer = tokenizer
        self._stop = tuple(stop)
        self._tokens = list(prompt[-_CONTEXT:])
        self._start, self._read = 0, len(self._tokens)
        self._text = ""
        self._given = 0

    @property
    def text(self) -> str:
        """All of it, up to the last whole character."""
        return self._text

    def add(self, token: int) -> bool:
        """Take the next token; whether the text has come to a stop text."""
        self._tokens.append(token)
        before = self._tokenizer.decode(self._tokens[self._start : self._read])
        now = self._tokenizer.decode(self._tokens[self._start :])
        if len(now) <= len(before) or now.endswith(_UNFINISHED):
            return False
        grown = now[len(before) :]
        self._text += grown
        self._start, self._read = max(self._read - _CONTEXT, 0), len(self._tokens)
        return self.stop_at(len(self._text) - len(grown)) is not None

    def stop_at(self, new_from: int = 0) -> int | None:
        """Where the first stop text begins that ends after ``new_from``; None: there is none."""
        places = [self._text.find(stop, max(new_from - len(stop) + 1, 0)) for stop in self._stop]
        return min((place for place in places if place >= 0), default=None)

    def piece(self, *, ended: bool = False) -> str:
        """What can be shown since the last call: no part of what may yet become a stop text."""
        stop = self.stop_at()
        until = len(self._text) if stop is None else stop
        if not ended and stop is None:
            until -= max((_overlap(self._text, text) for text in self._stop), default=0)
        shown = self._text[self._given : until]
        self._given = max(self._given, until)
        return shown


def text_after(tokenizer: Tokenizer, prompt: Sequence[int], tokens: Sequence[int]) -> str:
    """The text of tokens that follow a prompt; bytes of one character may lie on both sides of the border."""
    return tokenizer.decode([*prompt, *tokens])[len(tokenizer.decode(prompt)) :]


def cut_at_stop(
    tokenizer: Tokenizer, prompt: Sequence[int], tokens: Sequence[int], stop: Sequence[str]
) -> tuple[list[int], str]:
    """The tokens before the first stop text, and the text before it.

    A token that spells the end of the text and the beginning of the stop text is not among them, but what it spells of
    the text is in the text.
    """
    text = text_after(tokenizer, prompt, tokens)
    places = [place for each in stop if (place := text.find(each)) >= 0]
    if not places:
        return list(tokens), text
    end = min(places)
    kept = len(tokens)
    while kept and len(text_after(tokenizer, prompt, tokens[:kept])) > end:
        kept -= 1
    return list(tokens[:kept]), text[:end]


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of ``text`` with which ``stop`` begins."""
    longest = min(len(text), len(stop) - 1)
    return next((size for size in range(longest, 0, -1) if text.endswith(stop[:size])), 0)
