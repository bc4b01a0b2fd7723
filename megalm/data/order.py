"""The order of training samples as a pure function: sample number ▶ (epoch, sequence). No state, no table, no torch.

Whatever reads samples (any number of ranks, any batch size, a run resumed at any moment) therefore reads the same ones.
Integer arithmetic only, since NumPy and torch do not promise stable random streams; a test freezes golden values.

An epoch is a permutation of all sequences in two levels, so that shuffling need not mean a disk seek per sequence:
*blocks* of neighbouring sequences are permuted over the whole dataset; then, within each *window* of blocks of a
*lane*, single sequences are permuted. Sample ``g`` belongs to lane ``g mod lanes``. With one lane, one block per window
and one sequence per block, the whole order is one permutation of single sequences.

The permutations are Feistel networks with cycle walking (Black & Rogaway 2002): each is a bijection of ``range(n)`` for
every ``n``, evaluated at single points.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

ROUNDS = 6
"""Feistel rounds; four already make a pseudo-random permutation of a good round function (Luby & Rackoff 1988)."""

_UInt = NDArray[np.uint64]
_Int = NDArray[np.int64]
_LEVEL_WINDOW, _LEVEL_TAIL, _LEVEL_BLOCK = 1, 2, 3
"""Independent keys for the permutations of an epoch."""


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
        epoch, position = np.divmod(np.atleast_1d(np.asarray(samples, dtype=np.int64)), self.num_sequences)
        return epoch, self._sequence(epoch, position)

    def samples_of(self, sequence: int, epoch: int) -> int:
        """The sample number at which ``sequence`` is read in ``epoch``; the inverse, found by walking one epoch."""
        positions = np.arange(self.num_sequences, dtype=np.int64)
        found = np.flatnonzero(self._sequence(np.full_like(positions, epoch), positions) == sequence)
        return epoch * self.num_sequences + int(found[0])

    def _sequence(self, epoch: _Int, position: _Int) -> _Int:
        size, lanes = self.block_sequences, self.lanes
        window = size * self.window_blocks  # sequences of one lane's window
        blocks = self.num_sequences // size
        full = blocks // (lanes * self.window_blocks) * lanes * window  # positions inside whole windows

        inside = position < full
        window_number, rest = np.divmod(np.where(inside, position, 0), window * lanes)
        step, lane = np.divmod(rest, lanes)
        shuffled = permute(step, window, derive_key(self.seed, epoch, _LEVEL_WINDOW, window_number, lane))
        block = (window_number * self.window_blocks + shuffled // size) * lanes + lane
        mixed = block * size + shuffled % size
        # What does not fill a window of every lane is one more permutation at the end of the epoch.
        tail = permute(
            np.where(inside, 0, position - full), self.num_sequences - full, derive_key(self.seed, epoch, _LEVEL_TAIL)
        )
        mixed = np.where(inside, mixed, full + tail)

        block, within = np.divmod(mixed, size)
        place = permute(np.minimum(block, max(blocks - 1, 0)), blocks, derive_key(self.seed, epoch, _LEVEL_BLOCK))
        return np.where(block < blocks, place * size + within, mixed)


def permute(values: _Int, n: int, key: _UInt) -> _Int:
    """A keyed bijection of ``range(n)``, elementwise: ``values`` in ``range(n)``, one key each or one for all."""
    if n <= 1:
        return np.zeros_like(values)
    half = np.uint64((int(n - 1).bit_length() + 1) // 2)
    mask = (np.uint64(1) << half) - np.uint64(1)
    result = values.astype(np.uint64)
    keys = np.broadcast_to(key, result.shape)
    walking = np.arange(result.size)
    while walking.size:  # the network permutes the next power of four; walk until back inside range(n)
        left, right = result[walking] >> half, result[walking] & mask
        for number in range(ROUNDS):
            left, right = right, left ^ (_mix(right + _mix(keys[walking] + np.uint64(number))) & mask)
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
