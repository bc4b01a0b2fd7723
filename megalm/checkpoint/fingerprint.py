"""A hash of parameters that no layout changes: every rank hashes what it holds, and the sums are added.

Every element contributes a mixture of its bits, its place in the full tensor and the tensor's name; the hash of a
tensor is the sum of the contributions modulo 2⁶⁴. It shows that what was loaded is what was saved, wherever pieces
went; against bytes that someone changed there is the SHA-256 of each piece.

The mixture is the finaliser of SplitMix64 (Steele et al. 2014, "Fast splittable pseudorandom number generators"),
shortened by a round and with arithmetic shifts, the only ones that torch has.
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

from megalm.mesh.slices import Rows, ShardSpec

_CHUNK = 1 << 16
"""Elements mixed at once: what a core's cache holds in 64 bits."""

_GAMMA, _MULTIPLIER = -0x61C8864680B583EB, -0x40A7B892E31B1A47
"""SplitMix64's constants as signed integers."""

_MODULUS = 1 << 64


def fingerprint(name: str, shard: ShardSpec, flat_start: int, values: Tensor) -> int:
    """This run's share of the hash of the full tensor; shares of all runs add up to it, modulo 2⁶⁴.

    Args:
        name: of the tensor.
        shard: what the local tensor is of the full one.
        flat_start: where the run begins in the flattened local tensor.
        values: the run, one-dimensional fp32; on any device.
    """
    seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little", signed=True)
    bits = values.detach().view(torch.int32)
    return sum(_sum_of(rows, rows.of_local(bits), seed) for rows in shard.runs(flat_start, values.numel())) % _MODULUS


def _sum_of(rows: Rows, bits: Tensor, seed: int) -> int:
    """Places in one block and the next differ by a constant, so that only the first block's are computed."""
    height, width = max(1, _CHUNK // rows.width), min(rows.width, _CHUNK)
    steps = [torch.arange(count, device=bits.device) for count in (min(height, rows.rows), width)]
    first = steps[0].mul_(_wrapped(_GAMMA * rows.full_stride))[:, None] + steps[1].mul_(_GAMMA)
    mixed, shifted = torch.empty_like(first), torch.empty_like(first)
    total = 0
    for row in range(0, rows.rows, height):
        for column in range(0, rows.width, width):
            block = bits[row : row + height, column : column + width]
            place = (slice(block.shape[0]), slice(block.shape[1]))
            begins = rows.full_start + row * rows.full_stride + column
            x = mixed[place].copy_(block).add_(first[place]).add_(_wrapped(_GAMMA * begins + seed))
            total += _finished(x, shifted[place])
    return total


def _finished(x: Tensor, shifted: Tensor) -> int:
    """The sum of the finaliser's results; both tensors are used up."""
    x.bitwise_xor_(torch.bitwise_right_shift(x, 30, out=shifted))
    x.mul_(_MULTIPLIER)
    x.bitwise_xor_(torch.bitwise_right_shift(x, 27, out=shifted))
    return int(x.sum())


def _wrapped(number: int) -> int:
    """An integer as 64 bits with a sign hold it."""
    return (number + _MODULUS // 2) % _MODULUS - _MODULUS // 2
