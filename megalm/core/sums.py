"""Sums over many elements that keep their digits.

A sum in fp32 that adds one element after another loses a digit for every ten times as many elements: ``vector_norm`` on
the CPU, which has 8 to 16 running sums, is 7e-5 too small at 3.5 million elements, 1 % at 10⁸ and 9 % at 5·10⁸. Here
fp32 adds up :data:`BLOCK` squares at a time, and fp64 the blocks.

Error: a running sum in fp32 takes at most BLOCK/8 = 32 squares, each of which rounds by 2⁻²⁴ at most, so the norm is
within 32·2⁻²⁴/2 = 1e-6 for any values, and within 1e-8 for random ones, however many there are.

CUDA runs the same code. Its ``vector_norm`` is a tree, whose error grows with the logarithm of the number of elements,
and a tree within a block is more exact than running sums; the sum over blocks is fp64 there, too. Nothing here waits
for the device.
"""

from __future__ import annotations

import torch
from torch import Tensor

BLOCK = 256
"""Squares that fp32 adds up."""

_PART = 2**24
"""Elements worked on at a time, which bounds what is held besides them: 1 MiB of partial sums, and 64 MiB for 16-bit
values, which are converted."""


def sum_of_squares(*pieces: Tensor) -> Tensor:
    """``Σ x²`` of tensors of any shape and floating dtype: a scalar in fp64, on their device.

    Pieces are summed as one tensor that is cut: a block goes on in the next piece, so that what lies between them in
    memory does not change how values are rounded. Values that are not finite make the sum so.
    """
    total = torch.zeros((), dtype=torch.float64, device=pieces[0].device)
    begun = pieces[0].new_empty(0)
    for piece in pieces:
        flat = piece.detach().reshape(-1)
        if begun.numel():
            missing = BLOCK - begun.numel()
            begun, flat = torch.cat((begun, flat[:missing])), flat[missing:]
            if begun.numel() < BLOCK:
                continue
            total += _of_blocks(begun.view(1, -1))
        whole = flat.numel() // BLOCK * BLOCK
        for part in flat[:whole].split(_PART):
            total += _of_blocks(part.view(-1, BLOCK))
        begun = flat[whole:]
    return total + _of_blocks(begun.view(1, -1)) if begun.numel() else total


def _of_blocks(blocks: Tensor) -> Tensor:
    """[n, BLOCK], or one shorter block ▶ the sum of their squares, fp64."""
    exact = blocks.to(torch.promote_types(blocks.dtype, torch.float32))
    total: Tensor = torch.linalg.vector_norm(exact, dim=1).double().square().sum()
    return total
