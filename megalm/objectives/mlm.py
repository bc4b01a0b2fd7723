"""Masked language modelling: recover tokens that were hidden (Devlin et al. 2019). No torch.

Shapes: B rows, S sequence length, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megalm.data.stream.batch import Batch, Ints, MakeBatch, Rows
from megalm.data.stream.order import derive_key
from megalm.data.tokenization.tokenizer import Tokenizer
from megalm.errors import DataError
from megalm.objectives.tokens import TokenObjective

_MASKS = 11
"""Key of the hashes that masks are drawn from; the order of samples uses others."""
_MASKED, _REPLACED = 80, 90
"""Of 100 chosen tokens 80 are masked, the next 10 replaced, the rest left (Devlin et al. 2019, section 3.1)."""


class MaskedLM(TokenObjective):
    """Some tokens are chosen; the model sees a mask, another token or the token itself, and is asked for the token."""

    def make_batch(self, tokenizer: Tokenizer, seed: int) -> MakeBatch:
        """See :class:`Masking`.

        Raises:
            DataError: the tokenizer has no mask token.
        """
        if tokenizer.mask_id is None:
            raise DataError(
                "objective.name=mlm: the tokenizer has no [MASK] or <mask> token; prepare the data with one that has, "
                "such as megalm prepare --tokenizer-kind wordpiece trains"
            )
        is_special = np.zeros(tokenizer.vocab_size, dtype=bool)
        is_special[tokenizer.special_ids] = True
        return Masking(
            seed=seed,
            mask_id=tokenizer.mask_id,
            ordinary=np.flatnonzero(~is_special),
            is_special=is_special,
            continues_word=tokenizer.continues_word if self.settings.whole_words else None,
            probability=self.settings.mask_probability,
        )


@dataclass(frozen=True, eq=False)
class Masking:
    """Chooses and hides tokens.

    Which tokens are chosen, and what the model sees there, is a hash of (seed, sample, position). Samples of another
    epoch have other numbers, so masks are dynamic (Liu et al. 2019), and yet the same after a resume on any layout.
    Special tokens and padding are never chosen; in each row that has an ordinary token at least one is.

    Attributes:
        seed: of the run.
        mask_id: the mask token.
        ordinary: [V'], ids that may replace a token: all but the special ones.
        is_special: [V].
        continues_word: [V], whether a token belongs to the word before it; None: every token is chosen on its own.
        probability: share of tokens, or of words, that is chosen.
    """

    seed: int
    mask_id: int
    ordinary: Ints
    is_special: NDArray[np.bool_]
    continues_word: NDArray[np.bool_] | None
    probability: float

    def __call__(self, rows: Rows, samples: Ints) -> Batch:
        """Labels are the tokens themselves, not shifted."""
        labels = np.ascontiguousarray(rows.tokens[:, :-1])
        length = labels.shape[1]
        positions = np.arange(length, dtype=np.int64)
        # A row of n labels has n + 1 tokens, of which the first S are shown.
        eligible = (positions < rows.valid[:, None] + 1) & ~self.is_special[labels]
        if rows.mask is not None:
            eligible &= rows.mask[:, :-1] != 0
        unit = self._words(labels, positions)
        draws = _uniform(self.seed, samples[:, None], unit, 0)
        chosen = eligible & (draws < np.uint64(min(int(self.probability * 2**64), 2**64 - 1)))
        chosen |= self._at_least_one(chosen, eligible, draws)

        fate = _uniform(self.seed, samples[:, None], unit, 1) % np.uint64(100)
        replacement = _uniform(self.seed, samples[:, None], positions, 2) % np.uint64(self.ordinary.size)
        tokens = np.where(chosen & (fate < _MASKED), self.mask_id, labels)
        replaced = chosen & (fate >= _MASKED) & (fate < _REPLACED)
        tokens[replaced] = self.ordinary[replacement[replaced].astype(np.int64)]
        return Batch(tokens, labels, chosen.astype(np.float32), samples)

    def _words(self, labels: Ints, positions: Ints) -> Ints:
        """[B, S]: the position at which the word of each token begins; its own, if words do not matter."""
        starts = np.broadcast_to(positions, labels.shape)
        if self.continues_word is None:
            return starts
        begins = ~self.continues_word[labels]
        begins[:, 0] = True
        begins[:, 1:] |= self.is_special[labels[:, :-1]]
        return np.maximum.accumulate(np.where(begins, starts, 0), axis=1)

    @staticmethod
    def _at_least_one(
        chosen: NDArray[np.bool_], eligible: NDArray[np.bool_], draws: NDArray[np.uint64]
    ) -> NDArray[np.bool_]:
        """[B, S]: in rows where nothing was chosen, the token or word with the lowest draw."""
        empty = ~chosen.any(axis=1) & eligible.any(axis=1)
        lowest = np.where(eligible, draws, np.uint64(2**64 - 1)).min(axis=1)
        only: NDArray[np.bool_] = np.expand_dims(empty, 1) & eligible & (draws == lowest[:, None])
        return only


def _uniform(seed: int, samples: Ints, positions: Ints, stream: int) -> NDArray[np.uint64]:
    """[B, S] hashes, uniform over 64 bits."""
    keys: Any = derive_key(seed, _MASKS, stream, samples, positions)
    return keys
