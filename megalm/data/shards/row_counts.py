"""How many rows of a masked split have nothing to learn. No torch.

A row is what a run trains on as one sequence. Where prompts are longer than rows, some hold no token that carries loss.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

_SHORTEST = 64
_MOST_LENGTHS = 8


@dataclass
class RowCounts:
    """Rows, and those of them without a loss token, by sequence length.

    Attributes:
        lengths: sequence lengths, each of which divides the chunk.
        rows: of each length.
        empty: of each length.
    """

    lengths: tuple[int, ...]
    rows: dict[int, int] = field(default_factory=dict)
    empty: dict[int, int] = field(default_factory=dict)

    @classmethod
    def of(cls, chunk_tokens: int, packed_length: int) -> RowCounts:
        """For the one length of a packed split, or else for those that users take: the chunk, halved repeatedly."""
        if packed_length:
            return cls((packed_length,))
        lengths = [chunk_tokens]
        while len(lengths) < _MOST_LENGTHS and lengths[-1] % 2 == 0 and lengths[-1] // 2 >= _SHORTEST:
            lengths.append(lengths[-1] // 2)
        return cls(tuple(lengths))

    def add(self, labels: NDArray[np.integer[Any]]) -> None:
        """Count a chunk: 1 where a label carries loss; the last chunk without its padding."""
        for length in self.lengths:
            learnt = np.add.reduceat(labels, np.arange(0, labels.size, length), dtype=np.int64)
            self.rows[length] = self.rows.get(length, 0) + learnt.size
            self.empty[length] = self.empty.get(length, 0) + int((learnt == 0).sum())
