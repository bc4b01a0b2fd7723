"""A trained model, opened to be asked: in this process, or on ranks that this process starts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from megalm.errors import ConfigError
from megalm.generate.requests import (
    Asked,
    Completion,
    GenerateRequest,
    LanguageModel,
    OnCompletions,
    Progress,
    Score,
    ScoreRequest,
)
from megalm.runs.find import KnownModel

BATCH_SIZE = 16
"""Rows that a replica computes together, unless told otherwise."""

GENERATE, SCORE = "megalm.generate.on_rank:generate", "megalm.generate.on_rank:score"
"""What ranks call; they alone import torch."""

OnText = Callable[[int, int, str], object]
"""Told of the number of a request, that of one of its texts, and what this has grown by."""


class AskedModel(LanguageModel):
    """A decoder on some ranks.

    Args:
        found: where it is from.
        ranks: that hold it.
        batch_size: rows that a replica computes together.
    """

    def __init__(self, found: KnownModel, ranks: Any, *, batch_size: int = BATCH_SIZE) -> None:
        self.found, self.ranks, self.batch_size = found, ranks, batch_size
        self.config, self.tokenizer, self.checkpoint = found.config, found.tokenizer, str(found.checkpoint)

    def generate(
        self,
        requests: Sequence[GenerateRequest],
        *,
        on_done: OnCompletions | None = None,
        on_text: OnText | None = None,
    ) -> list[list[Completion]]:
        """See the base class; ``on_text`` is told of text as it grows, but not of beam search."""
        check_generate(self.found, requests)
        if not requests:
            return []

        def told(event: Any) -> None:
            kind, *rest = event
            if kind == "done" and on_done is not None:
                on_done(*rest)
            elif kind == "text" and on_text is not None:
                on_text(*rest)

        rows = sum(max(request.samples, request.beams) for request in requests)
        asked = Asked(tuple(requests), min(self.batch_size, rows), streams=on_text is not None)
        made: list[list[Completion]] = self.ranks.call(GENERATE, asked, told)
        return made

    def score(self, requests: Sequence[ScoreRequest], *, progress: Progress | None = None) -> list[Score]:
        """See the base class."""
        check_score(self.found, requests)
        if not requests:
            return []

        def told(event: Any) -> None:
            if progress is not None:
                progress(event[1])

        asked = Asked(tuple(requests), min(self.batch_size, len(requests)))
        found: list[Score] = self.ranks.call(SCORE, asked, told)
        return found

    def close(self) -> None:
        """Let go of the ranks."""
        self.ranks.close()


def check_generate(found: KnownModel, requests: Sequence[GenerateRequest], names: Sequence[str] = ()) -> None:
    """Refuse prompts that the model cannot continue as asked.

    Args:
        found: the model.
        requests: what is asked.
        names: what messages call each prompt; empty: ``prompt``, with its number where there are several.

    Raises:
        ConfigError: the model is an encoder, or a text would be longer than its sequences; one line for each.
        DataError: the model has no embedding of a token.
    """
    found.check_causal()
    longest = found.config.model.sequence_length
    problems = []
    for number, request in enumerate(requests):
        name = names[number] if names else _name("prompt", number, len(requests))
        _check_ids(found, request.tokens, name)
        length, room = len(request.tokens), longest - len(request.tokens)
        if not request.slides and length + request.max_new_tokens > longest:
            limit = f"model.sequence_length={longest}"
            wrong = f"{name}: {length} tokens and max_new_tokens={request.max_new_tokens} are more than {limit}"
            fewer = f"max_new_tokens={room} or less, or " if room > 0 else "a shorter prompt, or "
            problems.append(f"{wrong}; {fewer}a sliding window (--slide)")
    if problems:
        raise ConfigError(problems)


def check_score(found: KnownModel, requests: Sequence[ScoreRequest]) -> None:
    """Refuse continuations that have no probability; errors as for :func:`check_generate`."""
    found.check_causal()
    longest = found.config.model.sequence_length
    for number, request in enumerate(requests):
        name = _name("request", number, len(requests))
        if not request.context or not request.continuation:
            empty = "context" if not request.context else "continuation"
            raise ConfigError(f"{name}: its {empty} has no tokens; at least one")
        length = len(request.context) + len(request.continuation)
        if length > longest + 1:
            raise ConfigError(
                f"{name}: {length} tokens, and the model predicts at most {longest} (model.sequence_length) from one "
                "before them"
            )
        _check_ids(found, (*request.context, *request.continuation), name)


def _check_ids(found: KnownModel, tokens: Sequence[int], name: str) -> None:
    found.check_tokens(min(tokens), name)
    found.check_tokens(max(tokens), name)


def _name(what: str, number: int, count: int) -> str:
    return what if count == 1 else f"{what} {number + 1}"
