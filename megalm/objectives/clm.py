"""Causal language modelling: predict the next token (Radford et al. 2018). No torch.

Shapes: B rows, S sequence length.
"""

from __future__ import annotations

import numpy as np

from megalm.data.stream.batch import Batch, Ints, MakeBatch, Rows
from megalm.data.tokenization.tokenizer import Tokenizer
from megalm.objectives.tokens import TokenObjective


class CausalLM(TokenObjective):
    """The label of each token is the next one.

    Where the data have a loss mask (conversations, instructions), only the tokens that it names carry loss; ``sft`` is
    the same and insists on a mask.
    """

    def make_batch(self, tokenizer: Tokenizer, seed: int) -> MakeBatch:  # noqa: ARG002 - others need them
        """See :func:`next_tokens`."""
        return next_tokens


def next_tokens(rows: Rows, samples: Ints) -> Batch:
    """Tokens and labels, both views of the rows; padding, and what a mask leaves out, carries no loss."""
    length = rows.tokens.shape[1] - 1
    if rows.mask is None and int(rows.valid.min()) >= length:
        counts = np.ones((len(rows.tokens), length), dtype=np.float32)
    else:
        counts = (np.arange(length) < rows.valid[:, None]).astype(np.float32)
        if rows.mask is not None:
            counts *= rows.mask[:, 1:]
    return Batch(rows.tokens[:, :-1], rows.tokens[:, 1:], counts, samples)
