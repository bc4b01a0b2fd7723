"""The documents of a split: their names, where their tokens lie, and their text. No torch."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from megalm.data.shards.index import Index
from megalm.data.shards.read import ChunkReader
from megalm.data.shards.store import Store
from megalm.errors import DataError


@dataclass(frozen=True)
class DocumentSpan:
    """A document, or the piece of one that was packed apart.

    Attributes:
        name: where it is from.
        start: its first token, counted over the split.
        tokens: how many it has.
    """

    name: str
    start: int
    tokens: int

    @property
    def end(self) -> int:
        """The token after its last."""
        return self.start + self.tokens


def documents_of_shard(store: Store, index: Index, number: int) -> Iterator[DocumentSpan]:
    """Documents that begin in a shard of a split.

    Raises:
        DataError: the file that names them is missing or damaged.
    """
    name = index.shard(number).documents_name
    data = store.read(name)
    try:
        for line in data.decode("utf-8").split("\n"):  # not splitlines: a name may hold U+2028
            if line:
                yield DocumentSpan(**json.loads(line))
    except (ValueError, TypeError) as error:
        raise DataError(f"{store.path_of(name)}: damaged ({error}); copy the file again") from None


def documents_of_split(store: Store, index: Index) -> Iterator[DocumentSpan]:
    """All documents of a split, in order; errors as for :func:`documents_of_shard`."""
    for number in range(index.num_shards):
        yield from documents_of_shard(store, index, number)


def tokens_of_document(chunks: ChunkReader, document: DocumentSpan, most: int) -> tuple[Sequence[int], Sequence[int]]:
    """The first tokens of a document, at most ``most``, and as many numbers: 1 where a token carries loss.

    Raises:
        DataError: the shard is corrupt or gone.
    """
    each, stop = chunks.index.chunk_tokens, min(document.end, document.start + most)
    tokens, masks = [np.empty(0, np.int64)], [np.empty(0, np.uint8)]
    for number in range(document.start // each, -(-stop // each)):
        first, last = max(document.start - number * each, 0), min(stop - number * each, each)
        chunk = chunks.chunk(number)
        tokens.append(chunk.tokens[first:last].astype(np.int64))
        masks.append(np.ones(last - first, np.uint8) if chunk.mask is None else chunk.mask[first:last])
    return np.concatenate(tokens).tolist(), np.concatenate(masks).tolist()
