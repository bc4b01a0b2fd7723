"""The order of training samples as a pure function: sample number ▶ (corpus, epoch, sequence). No state, no torch.

Whatever reads samples (any number of ranks, any batch size, a run resumed at any moment) therefore reads the same ones.
Integer arithmetic only, since NumPy and torch do not promise stable random streams; a test freezes golden values.

An epoch is a permutation of all sequences in two levels, so that shuffling need not mean a disk seek per sequence:
*blocks* of neighbouring sequences are permuted over the whole dataset; then, within each *window* of blocks of a
*lane*, single sequences are permuted. Sample ``g`` belongs to lane ``g mod lanes``. With one lane, one block per window
and one sequence per block, the whole order is one permutation of single sequences.

The permutations are Feistel networks with cycle walking (Black & Rogaway 2002): each is a bijection of ``range(n)`` for
every ``n``, evaluated at single points. There is no table of the size of the data. All of it can be turned round, so
that "which samples read this sequence" costs no more than "which sequence is this sample".

Several corpora are *blended*: of every ``PERIOD`` samples of a lane, each corpus gives its quota, spread evenly. Each
corpus is read through its own epochs, so that one may repeat while another is not yet through.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

ROUNDS = 6
"""Feistel rounds; four already make a pseudo-random permutation of a good round function (Luby & Rackoff 1988)."""

_UInt = NDArray[np.uint64]
_Int = NDArray[np.int64]
_LEVEL_WINDOW, _LEVEL_TAIL, _LEVEL_BLOCK, _LEVEL_CORPUS = 1, 2, 3, 5
"""Independent keys for the permutations of an epoch, and for corpora."""
PERIOD = 2**16
"""Samples of a lane after which a blend repeats: the resolution of its weights."""


@dataclass(frozen=True)
class SampleOrder:
    """The order of one dataset.

    Attributes:
        num_sequences: sequences in the dataset.
        seed: decides the permutations.
        block_sequences: neighbouring sequences that stay together at the upper level.
        lanes: independent streams; a rank reads only its own when the number of ranks divides it.
        window_blocks: blocks that are mixed together within a lane.
    """

    num_sequences: int
    seed: int
    block_sequences: int = 1
    lanes: int = 1
    window_blocks: int = 1

    def __call__(self, samples: ArrayLike) -> tuple[_Int, _Int]:
        """(epoch, sequence) of each sample number."""
        epoch, position = np.divmod(_integers(samples), self.num_sequences)
        return epoch, self._sequence(epoch, position)

    def sample_of(self, epoch: ArrayLike, sequence: ArrayLike) -> _Int:
        """The sample number at which each sequence is read in an epoch: the inverse."""
        epoch, sequence = np.broadcast_arrays(_integers(epoch), _integers(sequence))
        layout = self._layout
        block, within = np.divmod(sequence, self.block_sequences)
        whole = block < layout.blocks
        place = unpermute(np.where(whole, block, 0), layout.blocks, derive_key(self.seed, epoch, _LEVEL_BLOCK))
        mixed = np.where(whole, place * self.block_sequences + within, sequence)

        inside = mixed < layout.full
        tail = unpermute(
            np.where(inside, 0, mixed - layout.full),
            self.num_sequences - layout.full,
            derive_key(self.seed, epoch, _LEVEL_TAIL),
        )
        block, within = np.divmod(np.where(inside, mixed, 0), self.block_sequences)
        stripe, lane = np.divmod(block, self.lanes)
        window_number, block_in_window = np.divmod(stripe, self.window_blocks)
        key = derive_key(self.seed, epoch, _LEVEL_WINDOW, window_number, lane)
        step = unpermute(block_in_window * self.block_sequences + within, layout.window, key)
        position = (window_number * layout.window + step) * self.lanes + lane
        return epoch * self.num_sequences + np.where(inside, position, layout.full + tail)

    def _sequence(self, epoch: _Int, position: _Int) -> _Int:
        layout = self._layout
        inside = position < layout.full
        window_number, rest = np.divmod(np.where(inside, position, 0), layout.window * self.lanes)
        step, lane = np.divmod(rest, self.lanes)
        shuffled = permute(step, layout.window, derive_key(self.seed, epoch, _LEVEL_WINDOW, window_number, lane))
        block = (window_number * self.window_blocks + shuffled // self.block_sequences) * self.lanes + lane
        mixed = block * self.block_sequences + shuffled % self.block_sequences
        # What does not fill a window of every lane is one more permutation at the end of the epoch.
        tail = permute(
            np.where(inside, 0, position - layout.full),
            self.num_sequences - layout.full,
            derive_key(self.seed, epoch, _LEVEL_TAIL),
        )
        mixed = np.where(inside, mixed, layout.full + tail)

        block, within = np.divmod(mixed, self.block_sequences)
        whole = block < layout.blocks
        place = permute(np.where(whole, block, 0), layout.blocks, derive_key(self.seed, epoch, _LEVEL_BLOCK))
        return np.where(whole, place * self.block_sequences + within, mixed)

    @property
    def _layout(self) -> _Layout:
        blocks = self.num_sequences // self.block_sequences
        window = self.block_sequences * self.window_blocks
        return _Layout(blocks, window, blocks // (self.lanes * self.window_blocks) * self.lanes * window)


@dataclass(frozen=True)
class _Layout:
    """How an epoch of a :class:`SampleOrder` divides: whole blocks, sequences of one lane's window, and sequences that
    lie in whole windows; the rest is the tail.
    """

    blocks: int
    window: int
    full: int


@dataclass(frozen=True)
class BlendedOrder:
    """The order of a run over one or more corpora.

    Attributes:
        orders: of each corpus; all have the same number of lanes.
        quotas: samples of each corpus per period of a lane; they add up to ``PERIOD``.
    """

    orders: tuple[SampleOrder, ...]
    quotas: tuple[int, ...]

    @classmethod
    def of(
        cls,
        sizes: Sequence[int],
        weights: Sequence[float] = (),
        *,
        seed: int,
        block_sequences: int = 1,
        lanes: int = 1,
        window_blocks: int = 1,
    ) -> BlendedOrder:
        """Corpora of ``sizes`` sequences, drawn in proportion to ``weights`` (empty: to their sizes).

        Raises:
            ValueError: a weight is so small that it rounds to no sample per period.
        """
        # The first corpus has the run's seed itself: a blend of one is that corpus's own order.
        seeds = [seed, *(int(derive_key(seed, _LEVEL_CORPUS, c)[0] >> np.uint64(1)) for c in range(1, len(sizes)))]
        orders = tuple(
            SampleOrder(size, own, block_sequences, lanes, window_blocks)
            for size, own in zip(sizes, seeds, strict=True)
        )
        return cls(orders, quotas_of(weights or sizes))

    def __call__(self, samples: ArrayLike) -> tuple[_Int, _Int, _Int]:
        """(corpus, epoch, sequence) of each sample number."""
        numbers = _integers(samples)
        if len(self.orders) == 1:
            return np.zeros_like(numbers), *self.orders[0](numbers)
        corpus, within = self._split(numbers)
        epoch, sequence = np.empty_like(numbers), np.empty_like(numbers)
        for number, order in enumerate(self.orders):
            own = corpus == number
            epoch[own], sequence[own] = order(within[own])
        return corpus, epoch, sequence

    def sample_of(self, corpus: int, epoch: ArrayLike, sequence: ArrayLike) -> _Int:
        """The sample number at which a corpus's sequence is read in an epoch: the inverse."""
        position = self.orders[corpus].sample_of(epoch, sequence)
        if len(self.orders) == 1:
            return position
        lanes = self.orders[corpus].lanes
        count, lane = np.divmod(position, lanes)
        start = self._lane_start(lane)
        period, rank = np.divmod(count + self._template.before[corpus, start], self.quotas[corpus])
        slot = self._template.slots[corpus][rank]
        return (period * PERIOD + slot - start) * lanes + lane

    def epochs_after(self, samples: int) -> list[Fraction]:
        """How often each corpus has been read after so many samples."""
        counts = samples_of_each(self.quotas, self.orders[0].lanes, samples)
        return [Fraction(count, order.num_sequences) for count, order in zip(counts, self.orders, strict=True)]

    def times_read(self, corpus: int, sequences: ArrayLike, samples: int) -> _Int:
        """How often the first ``samples`` samples read each of some sequences of a corpus.

        Epochs that are over are counted, and only in the last one or two is each sequence looked up.
        """
        numbers = _integers(sequences)
        lanes, size = self.orders[corpus].lanes, self.orders[corpus].num_sequences
        of_lanes = _samples_of_lanes(self.quotas, lanes, samples)[corpus]
        over, begun = int(of_lanes.min()) * lanes // size, -(-int(of_lanes.max()) * lanes // size)
        counts = np.full(numbers.shape, over, dtype=np.int64)
        for epoch in range(over, begun):
            counts += self.sample_of(corpus, epoch, numbers) < samples
        return counts

    def _split(self, samples: _Int) -> tuple[_Int, _Int]:
        """Sample numbers ▶ (corpus, number among that corpus's samples)."""
        lanes = self.orders[0].lanes
        count, lane = np.divmod(samples, lanes)
        start = self._lane_start(lane)
        period, slot = np.divmod(count + start, PERIOD)
        corpus = self._template.corpus[slot].astype(np.int64)
        rank = self._template.rank[slot] - self._template.before[corpus, start]
        return corpus, (period * np.array(self.quotas, dtype=np.int64)[corpus] + rank) * lanes + lane

    def _lane_start(self, lane: _Int) -> _Int:
        """The slot at which a lane begins its period, so that lanes do not all draw from one corpus at once."""
        return lane * PERIOD // self.orders[0].lanes

    @cached_property
    def _template(self) -> _Template:
        return _Template.of(self.quotas)


@dataclass(frozen=True)
class _Template:
    """Which corpus each slot of a period is drawn from; its size is ``PERIOD``, whatever the size of the data.

    Attributes:
        corpus: [PERIOD].
        rank: [PERIOD], the earlier slots of the same corpus.
        before: [corpora, PERIOD], the slots of each corpus before a slot.
        slots: of each corpus, [quota], ascending.
    """

    corpus: _Int
    rank: _Int
    before: _Int
    slots: tuple[_Int, ...]

    @classmethod
    def of(cls, quotas: Sequence[int]) -> _Template:
        """Spread evenly: sample k of a corpus with quota q wants to be at (2k + 1) / 2q of the period."""
        wanted = [((2 * np.arange(q, dtype=np.int64) + 1) << 40) // (2 * q) for q in quotas]
        owner = np.repeat(np.arange(len(quotas), dtype=np.int64), quotas)
        corpus = owner[np.argsort(np.concatenate(wanted), kind="stable")]
        chosen = corpus == np.arange(len(quotas), dtype=np.int64)[:, None]
        before = np.cumsum(chosen, axis=1, dtype=np.int64) - chosen
        rank = before[corpus, np.arange(PERIOD)]
        return cls(corpus, rank, before, tuple(np.flatnonzero(row) for row in chosen))


def samples_of_each(quotas: Sequence[int], lanes: int, samples: int) -> list[int]:
    """How many of the first ``samples`` samples of a blend are of each corpus; they add up to ``samples``.

    Args:
        quotas: samples of each corpus per period of a lane.
        lanes: of the order.
        samples: 0 or more.
    """
    if len(quotas) == 1:
        return [samples]
    return [int(count) for count in _samples_of_lanes(quotas, lanes, samples).sum(axis=1)]


def _samples_of_lanes(quotas: Sequence[int], lanes: int, samples: int) -> _Int:
    """[corpora, lanes]: how many of the first ``samples`` samples are of each corpus and lane."""
    lane = np.arange(lanes, dtype=np.int64)
    taken = (samples - lane + lanes - 1) // lanes
    if len(quotas) == 1:
        return taken[None]
    before = _Template.of(quotas).before
    start = lane * PERIOD // lanes
    period, slot = np.divmod(taken + start, PERIOD)
    own: _Int = period * np.array(quotas, dtype=np.int64)[:, None] + before[:, slot] - before[:, start]
    return own


def quotas_of(weights: Sequence[float]) -> tuple[int, ...]:
    """Weights ▶ samples per period, by largest remainder, in exact arithmetic.

    Raises:
        ValueError: a weight rounds to no sample.
    """
    exact = [Fraction(str(weight)) for weight in weights]  # the number as written, not its nearest binary fraction
    shares = [PERIOD * weight / sum(exact) for weight in exact]
    quotas = [int(share) for share in shares]
    by_remainder = sorted(range(len(shares)), key=lambda c: (quotas[c] - shares[c], c))
    for corpus in by_remainder[: PERIOD - sum(quotas)]:
        quotas[corpus] += 1
    for weight, quota in zip(weights, quotas, strict=True):
        if quota == 0:
            raise ValueError(
                f"weight {weight} of {sum(weights)} is less than one sample in {PERIOD}; "
                f"at least {float(sum(exact) / PERIOD):.3g}"
            )
    return tuple(quotas)


def _integers(values: ArrayLike) -> _Int:
    return np.atleast_1d(np.asarray(values, dtype=np.int64))


def permute(values: _Int, n: int, key: _UInt) -> _Int:
    """A keyed bijection of ``range(n)``, elementwise: ``values`` in ``range(n)``, one key each or one for all."""
    return _walk(values, n, key, inverse=False)


def unpermute(values: _Int, n: int, key: _UInt) -> _Int:
    """The inverse of :func:`permute`."""
    return _walk(values, n, key, inverse=True)


def _walk(values: _Int, n: int, key: _UInt, *, inverse: bool) -> _Int:
    """The network permutes the next power of four; walk along its cycle until back inside ``range(n)``."""
    if n <= 1:
        return np.zeros_like(values)
    half = np.uint64((int(n - 1).bit_length() + 1) // 2)
    mask = (np.uint64(1) << half) - np.uint64(1)
    result = values.astype(np.uint64)
    keys = np.broadcast_to(key, result.shape)
    walking = np.arange(result.size)
    while walking.size:
        left, right = result[walking] >> half, result[walking] & mask
        for number in reversed(range(ROUNDS)) if inverse else range(ROUNDS):
            round_key = _mix(keys[walking] + np.uint64(number))
            if inverse:
                left, right = right ^ (_mix(left + round_key) & mask), left
            else:
                left, right = right, left ^ (_mix(right + round_key) & mask)
        result[walking] = (left << half) | right
        walking = walking[result[walking] >= np.uint64(n)]
    return result.astype(np.int64)


def derive_key(*path: Any) -> _UInt:
    """Hash a path of integers or integer arrays to 64-bit keys."""
    key: _UInt = np.zeros(1, dtype=np.uint64)
    for part in path:
        words = np.atleast_1d(np.asarray(part, dtype=np.int64)).astype(np.uint64)
        with np.errstate(over="ignore"):
            key = _mix(key * np.uint64(0x9E3779B97F4A7C15) + words + np.uint64(0x632BE59BD9B4E019))
    return key


def _mix(x: _UInt) -> _UInt:
    """The finaliser of SplitMix64 (Steele et al. 2014), modulo 2⁶⁴."""
    with np.errstate(over="ignore"):
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
