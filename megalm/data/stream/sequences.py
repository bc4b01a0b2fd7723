"""Sequences of one or more corpora as rows of arrays. No torch.

Shapes: B rows, E examples, S sequence length.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megalm.data.shards.index import Index, check_marks
from megalm.data.shards.read import TokenShards
from megalm.data.shards.store import Store
from megalm.data.stream.batch import Rows
from megalm.errors import DataError


@dataclass(frozen=True)
class Corpora:
    """One split of each dataset that a run reads, all with the same tokenizer and sequence length.

    Its items are *examples*: one sequence each, or as many consecutive ones as an objective needs together.

    Attributes:
        shards: of each dataset.
        sequences_per_example: consecutive stored sequences of an example; a rest at the end of a dataset is not read.
    """

    shards: tuple[TokenShards, ...]
    sequences_per_example: int = 1

    @classmethod
    def open(
        cls,
        splits: Sequence[Store],
        sequence_length: int,
        sequences_per_example: int = 1,
        known: Sequence[Index] | None = None,
    ) -> Corpora:
        """Open a split of each dataset.

        Args:
            splits: one of each dataset.
            sequence_length: S.
            sequences_per_example: consecutive sequences of an example.
            known: what another process has read of their indexes, for which nothing is opened before the first
                sequence is read; None: they are opened and looked at here.

        Raises:
            DataError: one is missing or incomplete, or their tokenizers differ.
        """
        indexes = [None] * len(splits) if known is None else known
        shards = tuple(TokenShards(split, sequence_length, index) for split, index in zip(splits, indexes, strict=True))
        first = shards[0]
        for other in shards[1:]:
            if other.index.tokenizer_sha256 != first.index.tokenizer_sha256:
                raise DataError(
                    f"data.path: {first.store.location} and {other.store.location} were made by different tokenizers; "
                    "prepare one of them again with the tokenizer.json of the other"
                )
            check_marks({each.store.location: each.index.marks for each in (first, other)})
        return cls(shards, sequences_per_example)

    @property
    def sequence_length(self) -> int:
        """S."""
        return self.shards[0].sequence_length

    @property
    def vocab_size(self) -> int:
        """Token ids are below this."""
        return self.shards[0].index.vocab_size

    @property
    def eos_id(self) -> int:
        """Ends every document."""
        return self.shards[0].index.eos_id

    @cached_property
    def masked(self) -> bool:
        """Whether some corpus has a loss mask."""
        return any(each.index.masked for each in self.shards)

    @cached_property
    def sizes(self) -> tuple[int, ...]:
        """Examples of each corpus."""
        return tuple(len(each) // self.sequences_per_example for each in self.shards)

    def rows_of(self, examples: NDArray[np.int64]) -> NDArray[np.int64]:
        """Numbers of the sequences of examples: [E] ▶ [E · sequences_per_example]."""
        within = np.arange(self.sequences_per_example, dtype=np.int64)
        return (examples[:, None] * self.sequences_per_example + within).reshape(-1)

    def read(self, corpus: NDArray[np.int64], examples: NDArray[np.int64]) -> Rows:
        """Read examples, each of a corpus: [E] and [E] ▶ E · sequences_per_example = B rows.

        Raises:
            DataError: a shard is corrupt or gone.
        """
        corpus, sequences = np.repeat(corpus, self.sequences_per_example), self.rows_of(examples)
        shape = (sequences.size, self.sequence_length + 1)
        tokens = np.empty(shape, dtype=np.int64)
        mask = np.empty(shape, dtype=np.uint8) if self.masked else None
        valid = np.empty(sequences.size, dtype=np.int64)
        for number, shards in enumerate(self.shards):
            rows: Any = slice(None) if len(self.shards) == 1 else np.flatnonzero(corpus == number)
            own = sequences[rows]
            valid[rows] = shards.valid(own)
            if isinstance(rows, slice):
                shards.read(own, tokens, mask)
                continue
            own_tokens = np.empty((own.size, shape[1]), dtype=np.int64)
            own_mask = None if mask is None else np.empty((own.size, shape[1]), dtype=np.uint8)
            shards.read(own, own_tokens, own_mask)
            tokens[rows] = own_tokens
            if mask is not None and own_mask is not None:
                mask[rows] = own_mask
        return Rows(tokens, mask, valid)

    def first(self, samples: int | None) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """(corpus, example) of the first examples in file order, of each corpus in proportion to its size.

        Args:
            samples: how many, over all corpora; None: all.
        """
        total = sum(self.sizes)
        wanted = total if samples is None else min(samples, total)
        ends = [-(-wanted * end // total) for end in np.cumsum(self.sizes).tolist()]
        counts = np.diff([0, *ends])
        corpus = np.repeat(np.arange(len(counts), dtype=np.int64), counts)
        return corpus, np.concatenate([np.arange(count, dtype=np.int64) for count in counts])
