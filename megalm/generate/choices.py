"""What is asked of a row of logits, and what is read from its result. No torch.

Shapes: C columns of what is reported of a row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from megalm.generate.requests import Sampling


@dataclass(frozen=True)
class Choice:
    """What is asked of one row of logits.

    Attributes:
        sampling: how a token is drawn.
        draws: whether one is; False: the likeliest are all that is wanted (beam search), after the penalty.
        count: how many of the likeliest tokens are reported, with their log-probabilities.
        uniform: the draw, in [0, 1).
        seen: tokens of the text so far, for the repetition penalty; empty: no penalty.
        reports: whether the log-probability of the drawn token is wanted.
    """

    sampling: Sampling
    draws: bool = True
    count: int = 0
    uniform: float = 0.0
    seen: Sequence[int] = field(default=())
    reports: bool = False

    @property
    def columns(self) -> int:
        """Columns of its row of the result."""
        return 2 * self.count + 2 * self.draws


def columns_of(choices: Sequence[Choice]) -> int:
    """C: of the row that has most."""
    return max((choice.columns for choice in choices), default=0)


def token_of(row: Sequence[float]) -> tuple[int, float]:
    """The drawn token of a row of the result, and its log-probability."""
    return int(row[0]), row[1]


def likeliest_of(row: Sequence[float], choice: Choice) -> list[tuple[int, float]]:
    """The likeliest tokens of a row of the result and their log-probabilities, likeliest first."""
    start = choice.columns - 2 * choice.count
    middle = start + choice.count
    return [(int(token), value) for token, value in zip(row[start:middle], row[middle:], strict=False)]
