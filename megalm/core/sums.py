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


def sum_of_squares(values: Tensor) -> Tensor:
    """``Σ x²`` of a tensor of any shape and floating dtype: a scalar in fp64, on the tensor's device.

    Values that are not finite make it so.
    """
    total = torch.zeros((), dtype=torch.float64, device=values.device)
    for part in values.detach().reshape(-1).split(_PART):
        exact = part.to(torch.promote_types(part.dtype, torch.float32))
        whole = exact.numel() // BLOCK * BLOCK
        for blocks in (exact[:whole].view(-1, BLOCK), exact[whole:].view(1, -1)):
            if blocks.numel():
                total += torch.linalg.vector_norm(blocks, dim=1).double().square().sum()
    return total
