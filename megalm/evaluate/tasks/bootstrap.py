"""Intervals and comparisons by resampling items (Efron & Tibshirani 1993; Koehn 2004). No torch.

A resample draws as many items as there are, with replacement. Draws are integers of PCG64, whose stream NumPy keeps
from version to version, so that the same seed gives the same interval.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from megalm.evaluate.tasks.metrics.base import Array, Metric

RESAMPLES = 1000
CONFIDENCE = 0.95
_MOST_DRAWS = 2**22
"""Drawn at once: 32 MiB."""


@dataclass(frozen=True)
class Interval:
    """A percentile interval.

    Attributes:
        low: 2.5 % of the resamples are below it.
        high: 2.5 % are above.
    """

    low: float
    high: float


@dataclass(frozen=True)
class Difference:
    """Two systems on the same items, by one metric.

    Attributes:
        first: value of the first.
        second: value of the second.
        interval: of first − second.
        first_better: share of resamples in which the first is better (Koehn 2004).
        second_better: share in which the second is; the two are equal in the rest.
        p_value: of both being equally good, two-sided; NaN where a perplexity is beyond the range of numbers.
    """

    first: float
    second: float
    interval: Interval
    first_better: float
    second_better: float
    p_value: float


def interval(metric: Metric[Any], statistics: Array, *, seed: int, resamples: int = RESAMPLES) -> Interval:
    """The interval of a metric over items whose statistics are [N, K]."""
    return _percentiles(_values(metric, statistics, seed, resamples))


def difference(
    metric: Metric[Any], first: Array, second: Array, *, seed: int, resamples: int = RESAMPLES
) -> Difference:
    """Compare two systems; both see the same resamples.

    The p-value is that of ``sacrebleu --paired-bs``: how often a difference, its mean over the resamples taken off, is
    at least as large as the one that was found.

    Args:
        metric: the metric.
        first: [N, K] of the first system.
        second: [N, K] of the second, item by item.
        seed: of the draws.
        resamples: how many.
    """
    values = _values(metric, first, seed, resamples), _values(metric, second, seed, resamples)
    with np.errstate(invalid="ignore"):
        differences = values[0] - values[1]
        centred = np.abs(differences - differences.mean())
    sign = 1 if metric.higher_is_better else -1
    found = metric.value(first), metric.value(second)
    # Sums in another order differ in the last bit, which must not make a difference of nothing a rare one.
    extreme = int((centred >= abs(found[0] - found[1]) * (1 - 1e-9)).sum())
    return Difference(
        first=found[0],
        second=found[1],
        interval=_percentiles(differences),
        first_better=float((sign * differences > 0).mean()),
        second_better=float((sign * differences < 0).mean()),
        p_value=(extreme + 1) / (resamples + 1) if np.isfinite(centred).all() else math.nan,
    )


def _values(metric: Metric[Any], statistics: Array, seed: int, resamples: int) -> Array:
    return np.concatenate([metric.values(counts @ statistics) for counts in _counts(len(statistics), seed, resamples)])


def _counts(items: int, seed: int, resamples: int) -> Iterator[Array]:
    """[R, N]: how often each resample has each item, some resamples at a time."""
    generator = np.random.PCG64(seed)
    at_once = max(1, _MOST_DRAWS // items)
    for start in range(0, resamples, at_once):
        rows = min(at_once, resamples - start)
        drawn = (generator.random_raw(rows * items) % np.uint64(items)).astype(np.int64).reshape(rows, items)
        drawn += np.arange(rows)[:, None] * items
        yield np.bincount(drawn.ravel(), minlength=rows * items).reshape(rows, items).astype(np.float64)


def _percentiles(values: Array) -> Interval:
    tail = 100 * (1 - CONFIDENCE) / 2
    # Infinite perplexities have no percentile between them.
    low, high = np.percentile(values, [tail, 100 - tail], method="nearest")
    return Interval(float(low), float(high))
