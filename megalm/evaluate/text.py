"""The perplexity of raw text, in windows of the model's longest sequence. No torch.

A window begins ``stride`` tokens after the one before it, and counts only tokens that none before it has counted, so
every token is counted once: with a stride below the window's length each has at least ``window − stride`` tokens before
it (but at a document's beginning), at ``window / stride`` times the cost. Documents begin as in training: behind the
token that begins one, or else behind the one that ends the document before it. The first token is predicted, too.
"""

from __future__ import annotations

import io
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megalm.config.violation import format_value
from megalm.data.prepare.corpora.streams import open_text
from megalm.data.tokenization.tokenizer import Tokenizer, check_text
from megalm.errors import ConfigError, DataError
from megalm.evaluate.units import TextSize
from megalm.generate.requests import LanguageModel, Progress, ScoreRequest
from megalm.objectives.tokens import perplexity

_JSON_LINES = (".jsonl", ".json", ".ndjson")


@dataclass(frozen=True)
class RawText:
    """Texts whose perplexity is asked for, and where they are from."""

    path: Path
    documents: tuple[str, ...]

    @classmethod
    def read(cls, path: Path) -> RawText:
        """A file of one text, or of JSON Lines with a field ``text``, each a document; it may be compressed.

        Raises:
            DataError: it cannot be read, or a line has no text: the first such line.
        """
        with open_text(path, None) as file:
            try:
                text = io.TextIOWrapper(file.content, encoding="utf-8").read()
            except UnicodeDecodeError as error:
                raise DataError(f"{path}: not UTF-8: {error.reason} at byte {error.start}; text in UTF-8") from None
            plain = Path(path.stem) if file.compressed else path
        documents = tuple(_texts(path, text)) if plain.suffix in _JSON_LINES else (text,)
        if not any(documents):
            raise DataError(f"{path}: holds no text")
        return cls(path, tuple(filter(None, documents)))


def _texts(path: Path, text: str) -> Iterator[str]:
    # Not splitlines(): its other line ends, such as U+2028, may stand in a JSON string.
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            fields = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{path}: line {number}: no JSON: {error}") from None
        found = fields.get("text") if isinstance(fields, dict) else None
        if not isinstance(found, str):
            raise DataError(f'{path}: line {number}: {format_value(fields)}: no field "text" with a text')
        try:
            check_text(found)
        except DataError as error:
            raise DataError(f"{path}: line {number}: text: {error}") from None
        yield found


def check_stride(stride: int | None, window: int) -> int:
    """The stride that holds: as long as the window where none is given.

    Raises:
        ConfigError: it is not between 1 and the window.
    """
    if stride is not None and not 1 <= stride <= window:
        raise ConfigError(f"--stride={stride}: from 1 to {window} tokens (model.sequence_length)")
    return window if stride is None else stride


def text_scores(
    model: LanguageModel, text: RawText, *, stride: int, progress: Progress | None = None
) -> dict[str, Any]:
    """Loss and perplexity of raw text.

    Args:
        model: that is asked.
        text: the documents.
        stride: tokens from one window to the next; see the module.
        progress: told of windows that are done.

    Returns:
        ``loss`` in nats per token, ``perplexity`` per token, ``word_perplexity``, ``bits_per_byte``, and ``tokens``,
        ``words``, ``bytes``, ``documents`` that these are of.
    """
    window = model.config.model.sequence_length
    requests = [request for each in text.documents for request in windows(model.tokenizer, each, window, stride)]
    scores = model.score(requests, progress=progress)
    nats = -math.fsum(score.total for score in scores)
    tokens = sum(len(request.continuation) for request in requests)
    size = sum(map(TextSize.of, text.documents), TextSize())
    loss = nats / tokens
    return {
        "loss": loss,
        "perplexity": perplexity(loss),
        **size.measures(nats),
        "tokens": tokens,
        "documents": len(text.documents),
    }


def windows(tokenizer: Tokenizer, text: str, window: int, stride: int) -> list[ScoreRequest]:
    """Every token of a document once, each behind as many tokens before it as its window has."""
    before: Sequence[int] = tokenizer.before_ids or (tokenizer.eos_id,)
    tokens = [*before, *tokenizer.encode(text)]
    requests, counted = [], len(before)
    begin = 0
    while counted < len(tokens):
        stop = min(begin + window + 1, len(tokens))  # the last token of a window is only predicted
        first = max(counted, begin + 1)
        requests.append(ScoreRequest(context=tuple(tokens[begin:first]), continuation=tuple(tokens[first:stop])))
        counted, begin = stop, begin + stride
    return requests
