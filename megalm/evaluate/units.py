"""A text's loss per token, per word and per byte. No torch.

Tokens differ from tokenizer to tokenizer, words and bytes do not: by these, models with different tokenizers compare.
Words are what white space parts; bytes are of UTF-8.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from megalm.data.stream.sequences import Corpora
from megalm.data.tokenization.tokenizer import Tokenizer
from megalm.objectives.tokens import perplexity


@dataclass(frozen=True)
class TextSize:
    """How much text some tokens spell."""

    words: int = 0
    bytes: int = 0

    @classmethod
    def of(cls, text: str) -> TextSize:
        """Of a text."""
        return cls(len(text.split()), len(text.encode()))

    def __add__(self, other: TextSize) -> TextSize:
        return TextSize(self.words + other.words, self.bytes + other.bytes)

    def measures(self, nats: float) -> dict[str, float | int | None]:
        """``word_perplexity`` and ``bits_per_byte`` of a text that costs so many nats in all, and its size."""
        return {
            "word_perplexity": perplexity(nats / self.words) if self.words else None,
            "bits_per_byte": nats / math.log(2) / self.bytes if self.bytes else None,
            "words": self.words,
            "bytes": self.bytes,
        }


_SEQUENCES = 256
"""Rows that are read at a time."""


def size_of_split(corpora: Corpora, tokenizer: Tokenizer) -> TextSize | None:
    """The text that a split's labels spell; None: a mask says that some of them carry no loss."""
    if corpora.masked:
        return None
    size = TextSize()
    for document in _documents(corpora):
        size += TextSize.of(tokenizer.decode(document))
    return size


def _documents(corpora: Corpora) -> Iterator[list[int]]:
    """Tokens of each document, without what ends it: rows overlap by one token, so their labels follow each other."""
    for number, shards in enumerate(corpora.shards):
        open_document: list[int] = []
        count = len(shards)
        for start in range(0, count, _SEQUENCES):
            sequences = np.arange(start, min(start + _SEQUENCES, count), dtype=np.int64)
            rows = corpora.read(np.full(sequences.size, number), sequences)
            for tokens, valid in zip(rows.tokens, rows.valid, strict=True):
                for token in tokens[1 : 1 + valid].tolist():
                    if token == corpora.eos_id:
                        yield open_document
                        open_document = []
                    else:
                        open_document.append(token)
        yield open_document
