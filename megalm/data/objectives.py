"""What is learnt from rows of tokens. One objective is one class; none keeps a state. No torch.

Shapes: B rows, S sequence length, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from megalm.config.schema import Objective
from megalm.data.stream.order import derive_key
from megalm.data.tokenization.tokenizer import Tokenizer
from megalm.errors import DataError

_Int = NDArray[np.int64]
_MASKS = 11
"""Key of the hashes that masks are drawn from, apart from those of the order."""
_MASKED, _REPLACED = 80, 90
"""Of 100 chosen tokens 80 are masked, the next 10 replaced, the rest left (Devlin et al. 2019, section 3.1)."""


@dataclass(frozen=True)
class Example:
    """What a model is shown and asked.

    Attributes:
        tokens: [B, S], input ids.
        labels: [B, S], target ids.
        loss_mask: [B, S] fp32, 1 where the label counts.
    """

    tokens: _Int
    labels: _Int
    loss_mask: NDArray[np.float32]


class DataObjective(Protocol):
    """Rows of tokens ▶ what is learnt of them: a pure function, since samples must be the same after any resume."""

    def __call__(self, rows: _Int, mask: NDArray[np.uint8] | None, valid: _Int, samples: _Int) -> Example:
        """Make examples.

        Args:
            rows: [B, S + 1] token ids.
            mask: [B, S + 1], 1 where a token carries loss as a label; None: everywhere.
            valid: [B], labels of each row that are real; the rest is padding.
            samples: [B], global numbers of the rows.
        """


@dataclass(frozen=True)
class CausalLM:
    """Next-token prediction: the label of a token is the one after it.

    With a mask this is supervised fine-tuning: completions carry loss, prompts do not.
    """

    def __call__(self, rows: _Int, mask: NDArray[np.uint8] | None, valid: _Int, samples: _Int) -> Example:  # noqa: ARG002
        """Tokens and labels are views of the same rows."""
        length = rows.shape[1] - 1
        if mask is None and int(valid.min()) >= length:
            counts = np.ones((len(rows), length), dtype=np.float32)
        else:
            counts = (np.arange(length) < valid[:, None]).astype(np.float32)
            if mask is not None:
                counts *= mask[:, 1:]
        return Example(rows[:, :-1], rows[:, 1:], counts)


@dataclass(frozen=True, eq=False)
class MaskedLM:
    """Recover masked tokens (Devlin et al. 2019).

    Which tokens are masked, and by what, is a hash of (seed, sample, position): another epoch is another sample, so
    masks are dynamic (Liu et al. 2019) and yet the same after a resume on any layout. Special tokens and padding are
    never chosen; a row with an ordinary token has at least one that is.

    Attributes:
        seed: of the run.
        mask_id: the token that stands for a masked one.
        ordinary: [V'], ids that may replace a token: all but the special ones.
        is_special: [V].
        continues_word: [V], whether a token belongs to the word before it; None: every token is masked on its own.
        probability: share of tokens, or of words, that is chosen.
    """

    seed: int
    mask_id: int
    ordinary: _Int
    is_special: NDArray[np.bool_]
    continues_word: NDArray[np.bool_] | None
    probability: float

    def __call__(self, rows: _Int, mask: NDArray[np.uint8] | None, valid: _Int, samples: _Int) -> Example:
        """Labels are the tokens themselves, not shifted."""
        labels = np.ascontiguousarray(rows[:, :-1])
        length = labels.shape[1]
        positions = np.arange(length, dtype=np.int64)
        # A row of n labels has n + 1 tokens, of which the first S are shown.
        eligible = (positions < valid[:, None] + 1) & ~self.is_special[labels]
        if mask is not None:
            eligible &= mask[:, :-1] != 0
        unit = self._words(labels, positions)
        draws = _uniform(self.seed, samples[:, None], unit, 0)
        chosen = eligible & (draws < np.uint64(min(int(self.probability * 2**64), 2**64 - 1)))
        chosen |= self._at_least_one(chosen, eligible, draws)

        fate = _uniform(self.seed, samples[:, None], unit, 1) % np.uint64(100)
        replacement = _uniform(self.seed, samples[:, None], positions, 2) % np.uint64(self.ordinary.size)
        tokens = np.where(chosen & (fate < _MASKED), self.mask_id, labels)
        replaced = chosen & (fate >= _MASKED) & (fate < _REPLACED)
        tokens[replaced] = self.ordinary[replacement[replaced].astype(np.int64)]
        return Example(tokens, labels, chosen.astype(np.float32))

    def _words(self, labels: _Int, positions: _Int) -> _Int:
        """[B, S]: the position at which the word of each token begins; its own, where words do not matter."""
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
        """In rows where nothing was chosen, the token or word with the lowest draw."""
        empty = ~chosen.any(axis=1) & eligible.any(axis=1)
        lowest = np.where(eligible, draws, np.uint64(2**64 - 1)).min(axis=1)
        only: NDArray[np.bool_] = np.expand_dims(empty, 1) & eligible & (draws == lowest[:, None])
        return only


def make_objective(objective: Objective, seed: int, tokenizer: Tokenizer) -> DataObjective:
    """The objective that a config names.

    Raises:
        DataError: tokens are to be masked, and the tokenizer has no token for that.
    """
    if objective.name == "clm":
        return CausalLM()
    if tokenizer.mask_id is None:
        raise DataError(
            "objective.name=mlm: the tokenizer has no [MASK] or <mask> token; prepare the data with one that has, such "
            "as tools/prepare_data.py --tokenizer-kind wordpiece trains"
        )
    is_special = np.zeros(tokenizer.vocab_size, dtype=bool)
    is_special[tokenizer.special_ids] = True
    return MaskedLM(
        seed=seed,
        mask_id=tokenizer.mask_id,
        ordinary=np.flatnonzero(~is_special),
        is_special=is_special,
        continues_word=tokenizer.continues_word if objective.whole_words else None,
        probability=objective.mask_probability,
    )


def _uniform(seed: int, samples: _Int, positions: _Int, stream: int) -> NDArray[np.uint64]:
    """[B, S] hashes, uniform over 64 bits."""
    keys: Any = derive_key(seed, _MASKS, stream, samples, positions)
    return keys
