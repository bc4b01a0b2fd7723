"""The tokens of a split by their place, and the documents that they lie in. No torch.

A place is a number of tokens, counted over the split.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from itertools import groupby

import numpy as np
from numpy.typing import NDArray

from megalm.data.shards.documents import DocumentSpan, documents_of_shard
from megalm.data.shards.index import read_index
from megalm.data.shards.read import ChunkReader, Tokens
from megalm.data.shards.store import Store

_BLOCK_TOKENS = 2**18
"""Read at once: a few MiB of what is computed of them, which a processor's cache holds."""


class SplitTokens:
    """Checked access to the tokens of a split, best asked in order.

    Args:
        store: of the split.

    Raises:
        DataError: there is no such split.
    """

    def __init__(self, store: Store) -> None:
        self.store, self.index = store, read_index(store)
        self._chunks = ChunkReader(store, self.index)
        self._last: tuple[int, Tokens] = (-1, np.empty(0, np.uint16))

    def at(self, start: int, count: int) -> Tokens:
        """Some tokens, which must be there.

        Raises:
            DataError: the shard is corrupt or gone.
        """
        each = self.index.chunk_tokens
        number, within = divmod(start, each)
        parts = []
        while count > 0:
            part = self._chunk(number)[within : min(within + count, each)]
            parts.append(part)
            number, within, count = number + 1, 0, count - len(part)
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def blocks(self, overlap: int) -> Iterator[tuple[int, Tokens]]:
        """All tokens, in blocks that begin with the last ``overlap`` tokens of the one before.

        Yields:
            The place of the block's first token, and the block.

        Raises:
            DataError: a shard is corrupt or gone.
        """
        start, end = 0, self.index.tokens
        while start < end:
            first = max(start - overlap, 0)
            stop = min(start + _BLOCK_TOKENS, end)
            yield first, self.at(first, stop - first)
            start = stop

    def documents_at(self, places: Sequence[int]) -> list[DocumentSpan]:
        """The document of each place; places ascend. A shard's list is read once.

        Raises:
            DataError: a file that names documents is missing or damaged.
        """
        per_shard = self.index.chunk_tokens * self.index.chunks_per_shard
        found = []
        for number, group in groupby(places, key=lambda place: place // per_shard):
            documents = list(documents_of_shard(self.store, self.index, number))
            starts = [document.start for document in documents]
            for place in group:
                before = bisect_right(starts, place) - 1
                found.append(documents[before] if before >= 0 else self._last_before(number))
        return found

    def shard_name(self, place: int) -> str:
        """The tar file that a token lies in."""
        return self.index.shard(place // (self.index.chunk_tokens * self.index.chunks_per_shard)).name

    def _last_before(self, shard: int) -> DocumentSpan:
        """The document that goes on into a shard."""
        documents: list[DocumentSpan] = []
        while not documents:
            shard -= 1
            documents = list(documents_of_shard(self.store, self.index, shard))
        return documents[-1]

    def _chunk(self, number: int) -> Tokens:
        if self._last[0] != number:
            self._last = (number, self._chunks.chunk(number).tokens)
        return self._last[1]


def windows_of(tokens: Tokens, starts: NDArray[np.int64], length: int) -> NDArray[np.int64]:
    """[N, length]: the tokens from each start on."""
    view = np.lib.stride_tricks.sliding_window_view(tokens, length)
    return view[starts].astype(np.int64)
