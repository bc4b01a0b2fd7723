"""What an objective counts, and what a validation reports of it."""

from __future__ import annotations

import math

import numpy as np
import pytest

from megalm.config.schema import Objective as Settings
from megalm.data.stream.batch import Batch
from megalm.objectives.clm import CausalLM
from megalm.objectives.mlm import MaskedLM
from megalm.objectives.tokens import perplexity

LABELS = np.array([[3, 1, 3, 0], [3, 2, 0, 0]])
MASK = np.array([[1, 1, 1, 0], [1, 1, 0, 0]], dtype=np.float32)


@pytest.mark.parametrize("objective", [CausalLM(Settings()), MaskedLM(Settings(name="mlm"))])
def test_language_models_report_means_over_the_tokens_that_carry_loss(objective) -> None:
    counts = objective.counts(Batch(LABELS, LABELS, MASK, np.arange(2)), 6)
    assert counts.tolist() == [0, 1, 1, 3, 0, 0]
    assert counts.size == objective.num_counts(6)
    scores = objective.scores({"loss": 10.0, "accuracy": 4.0}, counts)
    assert list(scores) == ["val_loss", "val_perplexity", "val_accuracy", "val_commonest", "val_tokens"]
    assert list(scores.values()) == [2.0, pytest.approx(math.exp(2.0)), 0.8, 0.6, 5]


def test_means_of_nothing_are_none() -> None:
    scores = CausalLM(Settings()).scores({"loss": 0.0, "accuracy": 0.0}, np.zeros(6))
    assert list(scores.values()) == [None, None, None, None, 0]


def test_the_z_loss_is_a_term_where_it_has_a_weight() -> None:
    assert CausalLM(Settings()).terms == ("loss",)
    assert CausalLM(Settings(z_loss=1e-4)).terms == ("loss", "z_loss")


def test_perplexity() -> None:
    assert perplexity(math.log(4096)) == pytest.approx(4096)
    assert perplexity(1e6) == math.inf
    assert math.isnan(perplexity(math.nan))
