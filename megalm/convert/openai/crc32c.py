"""CRC-32C (Castagnoli), vectorised: what TensorFlow puts beside every block and every tensor."""

from __future__ import annotations

from functools import cache

import numpy as np
from numpy.typing import NDArray

Words = NDArray[np.uint32]

_POLYNOMIAL = 0x82F63B78
"""Its bits reversed."""

_LANES = 1 << 14
"""Words whose checksums are computed side by side."""


def crc32c(data: bytes | NDArray[np.uint8]) -> int:
    """CRC-32C (Castagnoli), at some hundred MB a second.

    A CRC is linear, so that parts can be computed on their own and added: the words of rows of ``_LANES`` words are
    taken column by column, each column's sum moved on by a row at a time; then columns are added pairwise. What of the
    data does not fill rows comes first, byte by byte.
    """
    values = np.frombuffer(data, np.uint8) if isinstance(data, bytes) else data
    lanes = _LANES if values.size >= 16 * _LANES else 16
    rest = values.size % (4 * lanes)
    state = 0xFFFFFFFF
    table = _byte_table()
    for byte in values[:rest].tolist():
        state = (state >> 8) ^ int(table[(state ^ byte) & 0xFF])
    rows = values[rest:].view("<u4").reshape(-1, lanes)
    if rows.size:
        state = _advance_one(state, rows.size * 4) ^ _sum_of_rows(rows, lanes)
    return state ^ 0xFFFFFFFF


def _sum_of_rows(rows: Words, lanes: int) -> int:
    """The state after all words, from state zero."""
    low, high = _tables(4 * lanes)
    columns = np.zeros(lanes, np.uint32)
    for row in rows:
        columns = (low[columns & 0xFFFF] ^ high[columns >> 16]) ^ row
    distance = 4
    while columns.size > 1:
        low, high = _tables(distance)
        left, right = columns[0::2], columns[1::2]
        columns = (low[left & 0xFFFF] ^ high[left >> 16]) ^ right
        distance *= 2
    # Each word is followed by its own four bytes.
    return _advance_one(int(columns[0]), 4)


def _advance_one(state: int, distance: int) -> int:
    """A state moved on by so many zero bytes."""
    return _apply(_advance(distance), state)


@cache
def _tables(distance: int) -> tuple[Words, Words]:
    """What the lower and the upper 16 bits of a state become after ``distance`` zero bytes."""
    columns = _advance(distance)
    return _combinations(columns[:16]), _combinations(columns[16:])


def _combinations(columns: tuple[int, ...]) -> Words:
    """Sums of all choices of columns, by the bits of the choice."""
    sums = np.zeros(1, np.uint32)
    for column in columns:
        sums = np.concatenate((sums, sums ^ np.uint32(column)))
    return sums


@cache
def _advance(distance: int) -> tuple[int, ...]:
    """What each bit of a state becomes after ``distance`` zero bytes: a matrix over GF(2), by columns."""
    if distance == 1:
        table = _byte_table()
        return tuple((1 << bit) >> 8 ^ int(table[(1 << bit) & 0xFF]) for bit in range(32))
    half = _advance(distance // 2)
    doubled = tuple(_apply(half, column) for column in half)
    return tuple(_apply(_advance(1), column) for column in doubled) if distance % 2 else doubled


def _apply(columns: tuple[int, ...], state: int) -> int:
    moved = 0
    for bit in range(32):
        if state >> bit & 1:
            moved ^= columns[bit]
    return moved


@cache
def _byte_table() -> Words:
    """What a byte adds to a state that is moved on by it."""
    table = np.arange(256, dtype=np.uint32)
    for _ in range(8):
        table = np.where(table & 1, table >> 1 ^ np.uint32(_POLYNOMIAL), table >> 1).astype(np.uint32)
    return table
