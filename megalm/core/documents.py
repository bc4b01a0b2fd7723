"""The documents of packed sequences: attention stays within each, and positions restart with each.

The attention mask is block-diagonal and never stored: on the CPU attention runs once per document, elsewhere flex
attention (Dong et al. 2024) skips the blocks between documents. Either way the cost is the sum of the squares of the
documents' lengths, not the square of the sequence's.

Shapes: B batch, S whole sequence, s a context-parallel rank's share, N query heads, K key/value heads, D head dim.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from megalm.core.attention.block_masks import block_mask, flex


@dataclass(frozen=True)
class Documents:
    """Documents of a micro-batch's rows.

    Attributes:
        numbers: [B, S] int32, the number of each token's document within its row.
        within: [B, s] int64, the position of each of this rank's tokens in its document.
        lengths: of each row's documents, in order; on the host. Empty where no kernel asks for them (CUDA's).
    """

    numbers: Tensor
    within: Tensor
    lengths: tuple[tuple[int, ...], ...]
    _block_masks: dict[tuple[bool, int], Any] = field(default_factory=dict, compare=False, repr=False)

    @classmethod
    def from_starts(cls, starts: Tensor) -> Documents:
        """Documents that begin at given tokens.

        Args:
            starts: whole rows, [B, S] bool, on the host; the first token of a row begins a document.
        """
        numbers, within = document_places(starts.numpy())
        return cls(torch.from_numpy(numbers), torch.from_numpy(within), document_lengths(numbers))

    def take(self, rows: slice) -> Documents:
        """Those of some rows."""
        return Documents(self.numbers[rows], self.within[rows], self.lengths[rows])

    def attend_each(
        self, attend: Callable[[Tensor, Tensor, Tensor], Tensor], query: Tensor, key: Tensor, value: Tensor
    ) -> Tensor:
        """Attention once per document: [B, N, S, D], [B, K, S, D] twice ▶ [B, N, S, D]."""
        rows = []
        for row, lengths in enumerate(self.lengths):
            parts = [t[row : row + 1].split(lengths, dim=2) for t in (query, key, value)]
            rows.append(torch.cat([attend(*document) for document in zip(*parts, strict=True)], dim=2))
        return torch.cat(rows)

    def attend_in_blocks(self, query: Tensor, key: Tensor, value: Tensor, *, causal: bool, window: int) -> Tensor:
        """One call of flex attention for all documents; shapes as :meth:`attend_each`."""
        mask = self._block_masks.get((causal, window))
        if mask is None:  # layers of the same window share it
            mask = self._block_masks[causal, window] = block_mask(
                self.numbers.shape[1],
                causal=causal,
                window=window,
                device=self.numbers.device,
                documents=self.numbers,
            )
        return flex(query, key, value, mask)


def document_places(starts: NDArray[np.bool_]) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
    """[B, S], the first of each row true ▶ :attr:`Documents.numbers` and, of whole rows, :attr:`Documents.within`."""
    positions = np.arange(starts.shape[1], dtype=np.int64)
    latest = np.maximum.accumulate(np.where(starts, positions, 0), axis=1)
    return starts.cumsum(axis=1, dtype=np.int32) - np.int32(1), positions - latest


def document_lengths(numbers: NDArray[np.int32]) -> tuple[tuple[int, ...], ...]:
    """:attr:`Documents.lengths` of :attr:`Documents.numbers`."""
    return tuple(tuple(np.bincount(row).tolist()) for row in numbers)
