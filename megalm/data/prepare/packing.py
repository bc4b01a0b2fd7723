"""Best-fit packing: whole documents into sequences of one length, few of them cut (Ding et al. 2024). No torch.

A document that is longer than a sequence is cut into pieces. Neighbouring pieces share one token: the last of one is
the first of the next, where it is an input only, so that every token but a document's first is a label exactly once,
and is always predicted from its own document. What a sequence has left over is padding without loss.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

MAX_OPEN = 4096
"""Sequences that are filled at one time; the memory of packing is this many of them."""


@dataclass(frozen=True)
class Row:
    """A packed sequence.

    Attributes:
        tokens: as many as the sequence is long.
        mask: 1 where a token carries loss.
        names: where the documents or pieces in it are from, in order.
        lengths: tokens of each; padding counts to the last.
        documents: how many documents begin in it.
    """

    tokens: NDArray[np.uint32]
    mask: NDArray[np.uint8]
    names: tuple[str, ...]
    lengths: tuple[int, ...]
    documents: int


@dataclass
class _Open:
    """A sequence being filled."""

    space: int
    tokens: list[NDArray[np.uint32]] = field(default_factory=list)
    masks: list[NDArray[np.uint8]] = field(default_factory=list)
    names: list[str] = field(default_factory=list)
    documents: int = 0


class BestFitPacker:
    """Puts each document where it leaves the least space; rows come out when they are full, or fullest first.

    Args:
        length: tokens of a sequence.
        pad_id: fills what is left over.
    """

    def __init__(self, length: int, pad_id: int) -> None:
        if length < 2:
            raise ValueError(f"sequences of {length} tokens hold no label")
        self._length, self._pad_id = length, pad_id
        self._by_space: dict[int, deque[_Open]] = {}
        self._spaces: list[int] = []  # the keys of _by_space, ascending
        self._open = 0

    def add(self, tokens: NDArray[np.uint32], mask: NDArray[np.uint8] | None, name: str) -> Iterator[Row]:
        """Pack a document; yields the rows that are complete."""
        mask = np.ones(tokens.size, dtype=np.uint8) if mask is None else mask
        step = self._length - 1
        for start in range(0, max(tokens.size - 1, 1), step):
            piece = slice(start, start + self._length)
            learnt = mask[piece].copy()
            learnt[0] = 0
            yield from self._place(tokens[piece], learnt, name, documents=int(start == 0))

    def close(self) -> Iterator[Row]:
        """The rows that are still open, fullest first."""
        while self._open:
            yield self._finish(self._take(self._spaces[0]))

    def _place(self, tokens: NDArray[np.uint32], mask: NDArray[np.uint8], name: str, documents: int) -> Iterator[Row]:
        fitting = bisect_left(self._spaces, tokens.size)
        row = self._take(self._spaces[fitting]) if fitting < len(self._spaces) else _Open(self._length)
        row.tokens.append(tokens)
        row.masks.append(mask)
        row.names.append(name)
        row.documents += documents
        row.space -= tokens.size
        if row.space < 2:  # one token alone would hold no label
            yield self._finish(row)
            return
        self._put(row)
        if self._open > MAX_OPEN:
            yield self._finish(self._take(self._spaces[0]))

    def _put(self, row: _Open) -> None:
        if row.space not in self._by_space:
            self._by_space[row.space] = deque()
            insort(self._spaces, row.space)
        self._by_space[row.space].append(row)
        self._open += 1

    def _take(self, space: int) -> _Open:
        rows = self._by_space[space]
        row = rows.popleft()
        if not rows:
            del self._by_space[space]
            self._spaces.remove(space)
        self._open -= 1
        return row

    def _finish(self, row: _Open) -> Row:
        lengths = [part.size for part in row.tokens]
        lengths[-1] += row.space
        return Row(
            np.pad(np.concatenate(row.tokens), (0, row.space), constant_values=self._pad_id),
            np.pad(np.concatenate(row.masks), (0, row.space)),
            tuple(row.names),
            tuple(lengths),
            row.documents,
        )
