"""Accuracy and perplexity from log-likelihoods. No torch."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import ClassVar

import numpy as np

from megalm.evaluate.tasks.metrics.base import Array, ChoiceScore, Chosen, Completed, Mean, Metric


def _unconditional(score: ChoiceScore) -> float:
    assert score.unconditional is not None, "asked for wherever the metric is named"
    return score.log_probability - score.unconditional


RANKED_BY: dict[str, tuple[Callable[[ChoiceScore], float], str]] = {
    "accuracy": (lambda score: score.log_probability, "log P(choice | prompt)"),
    "accuracy_per_byte": (
        lambda score: score.log_probability / max(len(score.text.encode()), 1),
        "log P(choice | prompt) / UTF-8 bytes of the choice",
    ),
    "accuracy_per_character": (
        lambda score: score.log_probability / max(len(score.text), 1),
        "log P(choice | prompt) / characters of the choice",
    ),
    "accuracy_per_token": (
        lambda score: score.log_probability / score.tokens,
        "log P(choice | prompt) / tokens of the choice",
    ),
    "accuracy_unconditional": (_unconditional, "log P(choice | prompt) - log P(choice | unconditional prompt)"),
}
"""Name ▶ by what choices are ranked, and that in words. Per token and unconditional: Brown et al. 2020, section 2.4;
per character: ``acc_norm`` of lm-evaluation-harness."""


class ChoiceAccuracy(Mean[Chosen]):
    """Share of items whose right choice ranks first; of equals the first one counts."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._rank, self.signature = RANKED_BY[name]

    def of(self, answer: Chosen) -> float:
        """Of one item."""
        return float(self.chosen(answer) == answer.right)

    def chosen(self, answer: Chosen) -> int:
        """Number of the choice that ranks first."""
        ranks = [self._rank(score) for score in answer.scores]
        return ranks.index(max(ranks))


class GreedyAccuracy(Mean[Completed]):
    """Share of items whose target is what greedy decoding gives."""

    name = "accuracy"
    signature = "every token of the target is the likeliest"

    def of(self, answer: Completed) -> float:
        """Of one item."""
        return float(answer.greedy)


class LogLikelihood(Metric[Completed]):
    """A function of the mean negative log-likelihood of targets, per target, token or byte."""

    higher_is_better: ClassVar[bool] = False

    def __init__(
        self, name: str, signature: str, units: Callable[[Completed], float], value: Callable[[Array], Array]
    ) -> None:
        self.name, self.signature = name, signature
        self._units, self._value = units, value

    def statistics(self, answers: Sequence[Completed]) -> Array:
        """[N, 2]: nats, and units."""
        rows = [(-answer.log_probability, self._units(answer)) for answer in answers]
        return np.array(rows, dtype=np.float64).reshape(-1, 2)

    def values(self, sums: Array) -> Array:
        """Of sums of nats and of units; beyond the range of numbers: infinite."""
        with np.errstate(over="ignore", divide="ignore"):
            return self._value(sums[:, 0] / sums[:, 1])


def perplexity() -> LogLikelihood:
    """Exponential of the mean over targets, as of LAMBADA (Paperno et al. 2016; Radford et al. 2019)."""
    return LogLikelihood("perplexity", "exp(mean over targets of -log P(target))", lambda _: 1.0, np.exp)


def perplexity_per_token() -> LogLikelihood:
    """Exponential of the mean over the tokens of all targets."""
    signature = "exp(mean over tokens of -log P(token))"
    return LogLikelihood("perplexity_per_token", signature, lambda answer: float(answer.tokens), np.exp)


def bits_per_byte() -> LogLikelihood:
    """Bits over the bytes of all targets; tokenizers do not matter to it (Gao et al. 2020, section 3.1)."""
    return LogLikelihood(
        "bits_per_byte",
        "-log2 P(targets) / UTF-8 bytes of the targets",
        lambda answer: float(len(answer.text.encode())),
        lambda nats: nats / math.log(2),
    )
