"""Intervals cover what they should, comparisons are fair, and BLEU is resampled as sacrebleu does it."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megalm.evaluate.tasks.bootstrap import _counts, difference, interval
from megalm.evaluate.tasks.metrics.base import Generated
from megalm.evaluate.tasks.metrics.likelihood import GreedyAccuracy, perplexity
from megalm.evaluate.tasks.metrics.registry import make_metrics
from megalm.evaluate.tasks.task import GENERATION, MetricChoice

MEAN, LOWER_IS_BETTER = GreedyAccuracy(), perplexity()


def statistics(values: object) -> np.ndarray:
    column = np.asarray(values, dtype=np.float64)
    return np.stack([column, np.ones_like(column)], axis=1)


def test_resamples_are_of_as_many_items_and_the_same_on_every_machine() -> None:
    (counts,) = _counts(5, seed=1234, resamples=4)
    assert counts.sum(axis=1).tolist() == [5, 5, 5, 5]
    # Frozen: NumPy promises the stream of PCG64.
    assert counts.tolist() == [[3, 0, 1, 1, 0], [2, 2, 1, 0, 0], [1, 1, 1, 0, 2], [1, 3, 0, 1, 0]]
    many = np.concatenate(list(_counts(2**18, seed=3, resamples=40)))
    assert many.shape == (40, 2**18), "some at a time, and all of them"


@pytest.mark.parametrize("share", [0.5, 0.2])
def test_the_interval_holds_the_truth_nineteen_times_of_twenty(share: float) -> None:
    random = np.random.default_rng(5)
    trials, held = 300, 0
    for trial in range(trials):
        found = interval(MEAN, statistics(random.random(150) < share), seed=trial, resamples=400)
        held += found.low <= share <= found.high
    assert 0.90 < held / trials < 0.985


def test_the_interval_agrees_with_the_normal_one_on_a_large_sample() -> None:
    values = np.random.default_rng(1).normal(3, 2, 4000)
    found = interval(MEAN, statistics(values), seed=0)
    error = 1.96 * values.std() / np.sqrt(4000)
    assert (found.low, found.high) == pytest.approx((values.mean() - error, values.mean() + error), abs=0.1 * error)


def test_one_item_and_infinite_perplexity_have_intervals() -> None:
    assert interval(MEAN, statistics([1.0]), seed=0).low == 1.0
    found = interval(LOWER_IS_BETTER, statistics([2000.0, 1.0, 1.0]), seed=0)
    assert found.low == pytest.approx(np.e)
    assert found.high == np.inf
    compared = difference(LOWER_IS_BETTER, statistics([2000.0, 1.0]), statistics([2000.0, 1.0]), seed=0)
    assert np.isnan(compared.p_value)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=2, max_size=30), st.integers(0, 2**63 - 1))
def test_the_comparison_is_symmetric(pairs: list[tuple[int, int]], seed: int) -> None:
    first, second = (statistics([pair[n] for pair in pairs]) for n in (0, 1))
    for metric in (MEAN, LOWER_IS_BETTER):
        ab = difference(metric, first, second, seed=seed, resamples=200)
        ba = difference(metric, second, first, seed=seed, resamples=200)
        assert (ab.first_better, ab.second_better) == (ba.second_better, ba.first_better)
        assert ab.p_value == ba.p_value
        assert ab.interval.low == pytest.approx(-ba.interval.high)
        assert 0 < ab.p_value <= 1


def test_equal_systems_do_not_differ_and_different_ones_do() -> None:
    values = np.random.default_rng(2).random(200)
    same = difference(MEAN, statistics(values), statistics(values), seed=1)
    assert (same.first_better, same.second_better, same.p_value) == (0.0, 0.0, 1.0)
    better = difference(MEAN, statistics(values + 0.1), statistics(values), seed=1)
    assert better.first_better == 1.0
    assert better.p_value == pytest.approx(1 / 1001)
    worse = difference(LOWER_IS_BETTER, statistics(values + 0.1), statistics(values), seed=1)
    assert worse.second_better == 1.0, "a higher perplexity is worse"


def test_the_p_value_is_that_of_sacrebleus_paired_test() -> None:
    significance = pytest.importorskip("sacrebleu.significance")
    random = np.random.default_rng(4)
    first, second = random.random(50), random.random(50) + 0.1
    (counts,) = _counts(50, seed=8, resamples=1000)
    differences = (counts @ first - counts @ second) / 50
    expected = significance._compute_p_value(
        np.abs(differences - differences.mean()), abs(first.mean() - second.mean())
    )
    assert difference(MEAN, statistics(first), statistics(second), seed=8).p_value == pytest.approx(expected)


def test_p_values_of_equal_systems_are_uniform() -> None:
    random = np.random.default_rng(9)
    found = [
        difference(
            MEAN, statistics(random.normal(size=100)), statistics(random.normal(size=100)), seed=n, resamples=200
        )
        for n in range(300)
    ]
    below = np.mean([each.p_value <= 0.1 for each in found])
    assert 0.05 < below < 0.16


def test_bleu_of_a_resample_is_that_of_the_resampled_corpus() -> None:
    """Not the mean of sentences' BLEU: sacrebleu on the lines of each resample gives the same numbers."""
    sacrebleu = pytest.importorskip("sacrebleu")
    texts = ["a man rides a horse now", "two dogs run in the park", "the cat sat on the mat", "she reads a long book"]
    right = ["a man rides a horse", "two dogs are in the park", "the cat sat on a mat today", "she reads a book"]
    (metric,) = make_metrics([MetricChoice("bleu")], GENERATION)
    found = metric.statistics([Generated(text, (reference,)) for text, reference in zip(texts, right, strict=True)])
    (counts,) = _counts(4, seed=7, resamples=20)
    values = metric.values(counts @ found)
    for row, value in zip(counts.astype(int), values, strict=True):
        lines = np.repeat(np.arange(4), row)
        corpus = sacrebleu.corpus_bleu([texts[n] for n in lines], [[right[n] for n in lines]])
        assert value == pytest.approx(corpus.score)
