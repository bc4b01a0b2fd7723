"""What a replica trains on in one step, and how its rows are turned into that. No torch.

Shapes: B rows, S sequence length.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Rows:
    """Sequences as they are stored, before an objective makes a :class:`Batch` of them.

    Attributes:
        tokens: [B, S + 1] int64.
        mask: [B, S + 1], 1 where a token carries loss as a label; None: everywhere.
        valid: [B], labels of each row that are real; the rest is padding.
    """

    tokens: Ints
    mask: NDArray[np.uint8] | None
    valid: Ints


@dataclass(frozen=True)
class Batch:
    """What one replica sees in one step: row for row what an objective made of the rows that were read.

    Attributes:
        tokens: [B, S] int64, input ids.
        labels: [B, S] int64, target ids.
        loss_mask: fp32, 1 where a loss counts: [B, S] if tokens have losses, [B] if rows have, or groups of rows (then
            at the first row of each group). The loss is the mean over what counts in the global batch.
        samples: [B], global sample numbers of the rows; dropout masks depend on them.
        document_starts: [B, S] bool, where documents begin that attention is kept within; None: a row is one document.
        token_inputs: what else the objective's loss reads, by name, with a value per token: [B, S, ...].
        row_inputs: the same with a value per row: [B, ...].
    """

    tokens: Ints
    labels: Ints
    loss_mask: NDArray[np.float32]
    samples: Ints
    document_starts: NDArray[np.bool_] | None = None
    token_inputs: Mapping[str, NDArray[np.generic]] = field(default_factory=dict)
    row_inputs: Mapping[str, NDArray[np.generic]] = field(default_factory=dict)

    def take(self, rows: slice | Ints) -> Batch:
        """Some of the rows."""
        return Batch(
            self.tokens[rows],
            self.labels[rows],
            self.loss_mask[rows],
            self.samples[rows],
            None if self.document_starts is None else self.document_starts[rows],
            {name: values[rows] for name, values in self.token_inputs.items()},
            {name: values[rows] for name, values in self.row_inputs.items()},
        )


class MakeBatch(Protocol):
    """Rows ▶ a batch of as many rows: a pure function, since samples must be the same after any resume."""

    def __call__(self, rows: Rows, samples: Ints) -> Batch:
        """Make a batch of rows whose global sample numbers are ``samples``, [B]."""


def document_starts(tokens: Ints, eos_id: int) -> NDArray[np.bool_]:
    """Where documents begin: at the start of a row and after each ``eos_id``.

    Padding is a run of ``eos_id`` after the one that ends the last document; it counts as one more document.

    Args:
        tokens: [B, S].
        eos_id: the token that ends a document.

    Returns:
        [B, S].
    """
    ends = tokens == eos_id
    starts = np.zeros_like(ends)
    starts[:, 1:] = ends[:, :-1]
    starts[:, 2:] &= ~(ends[:, 2:] & ends[:, 1:-1] & ends[:, :-2])
    starts[:, 0] = True
    return starts
