"""What a metric is: statistics of each item, and a number that follows from their sum over items. No torch.

A mean's statistics are a value and a one. Those of BLEU are its counts of n-grams, so that a resample of the items has
its own BLEU, which is not the mean of theirs.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

from megalm.config.violation import format_value, spoken_list

Array = NDArray[np.float64]
Answer = TypeVar("Answer")


@dataclass(frozen=True)
class Generated:
    """What a model wrote.

    Attributes:
        text: after filters.
        references: every text that would be right; none: the question has no answer.
    """

    text: str
    references: tuple[str, ...]


@dataclass(frozen=True)
class ChoiceScore:
    """How likely one choice is.

    Attributes:
        log_probability: of the choice after the prompt, in nats.
        tokens: of the continuation that this is of.
        text: the choice.
        unconditional: the same after the unconditional prompt; None: not asked.
    """

    log_probability: float
    tokens: int
    text: str
    unconditional: float | None = None


@dataclass(frozen=True)
class Chosen:
    """The likelihoods of all choices.

    Attributes:
        scores: of each.
        right: number of the right one.
    """

    scores: tuple[ChoiceScore, ...]
    right: int


@dataclass(frozen=True)
class Completed:
    """How likely the right text is.

    Attributes:
        log_probability: in nats.
        tokens: of it.
        text: the target.
        greedy: whether every token of it is the likeliest.
    """

    log_probability: float
    tokens: int
    text: str
    greedy: bool


class Metric(ABC, Generic[Answer]):
    """One metric with its options.

    Attributes:
        name: in task files and results.
        higher_is_better: whether more of it is better.
        signature: what defines it beside its name, for who compares numbers; may be empty, and is whole only after
            :meth:`statistics`.
    """

    name: str
    higher_is_better: ClassVar[bool] = True
    signature: str = ""

    @abstractmethod
    def statistics(self, answers: Sequence[Answer]) -> Array:
        """[N, K]: of each item."""

    @abstractmethod
    def values(self, sums: Array) -> Array:
        """[R, K] sums of items' statistics ▶ [R] values of the metric."""

    def value(self, statistics: Array) -> float:
        """Of the items whose statistics [N, K] are given."""
        return float(self.values(statistics.sum(axis=0, keepdims=True))[0])


class Mean(Metric[Answer]):
    """A metric that is a mean over items."""

    @abstractmethod
    def of(self, answer: Answer) -> float:
        """Of one item."""

    def statistics(self, answers: Sequence[Answer]) -> Array:
        """[N, 2]: the value, and 1."""
        return np.array([(self.of(answer), 1.0) for answer in answers], dtype=np.float64).reshape(-1, 2)

    def values(self, sums: Array) -> Array:
        """Means."""
        return sums[:, 0] / sums[:, 1]


Check = Callable[[Any], str | None]
"""Value of an option ▶ what would be right; None: it is."""


@dataclass(frozen=True)
class MetricKind:
    """A metric that task files can name.

    Attributes:
        kind: of the tasks that it scores.
        make: the metric with some options.
        options: name ▶ check of its value.
        library: distribution ▶ module that it needs beside megalm's own; None: none.
    """

    kind: str
    make: Callable[[Mapping[str, Any]], Metric[Any]]
    options: Mapping[str, Check]
    library: str | None = None


def one_of(*values: Any) -> Check:
    """Check that a value is among some."""

    def check(value: Any) -> str | None:
        known = any(value == each and type(value) is type(each) for each in values)
        return None if known else spoken_list(map(format_value, values))

    return check
