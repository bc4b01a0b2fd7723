"""Supervised fine-tuning: predict the tokens of completions, given their prompts (Ouyang et al. 2022). No torch."""

from __future__ import annotations

from megalm.data.stream.batch import Batch, Ints, MakeBatch, Rows
from megalm.data.tokenization.tokenizer import Tokenizer
from megalm.errors import DataError
from megalm.objectives.clm import CausalLM, next_tokens


class SupervisedFineTuning(CausalLM):
    """Next-token prediction on data with a loss mask, which leaves out prompts and padding."""

    def make_batch(self, tokenizer: Tokenizer, seed: int) -> MakeBatch:  # noqa: ARG002 - others need them
        """See :func:`completions`."""
        return completions


def completions(rows: Rows, samples: Ints) -> Batch:
    """As :func:`megalm.objectives.clm.next_tokens`.

    Raises:
        DataError: the data have no loss mask.
    """
    if rows.mask is None:
        raise DataError(
            "objective.name=sft: the data have no loss mask, so prompts would carry loss like completions; prepare "
            "them with --corpus sft, or train on all of their tokens with objective.name=clm"
        )
    return next_tokens(rows, samples)
