"""What is learnt from a row of tokens. One objective is one class.

Shapes: B rows, S sequence length.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray


class CausalLM:
    """Next-token prediction: the label of a token is the one after it."""

    def __call__(
        self, rows: NDArray[np.integer[Any]], valid: NDArray[np.int64]
    ) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float32]]:
        """Split rows of tokens into inputs, labels and loss mask.

        Args:
            rows: [B, S + 1] token ids.
            valid: [B], labels of each row that are real; the rest is padding.

        Returns:
            tokens [B, S], labels [B, S], loss mask [B, S] (1 where the label counts).
        """
        tokens = np.ascontiguousarray(rows[:, :-1], dtype=np.int64)
        labels = np.ascontiguousarray(rows[:, 1:], dtype=np.int64)
        mask = (np.arange(tokens.shape[1]) < valid[:, None]).astype(np.float32)
        return tokens, labels, mask


OBJECTIVES = {"clm": CausalLM}
"""By the name that ``objective.name`` takes."""
