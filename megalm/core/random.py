"""Initial weights that do not depend on the layout.

The values of a full parameter are cut into blocks of ``BLOCK`` rows along the dim that tensor parallelism may shard. A
block's values are a function of (seed, parameter name, block number) alone, so a rank generates only the blocks that
overlap its slice, and every layout agrees bit for bit.
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor, nn

from megalm.core.sharding import Init, ShardSpec, declared_parameters

BLOCK = 64
"""Rows per block: small, so that a rank generates little that it does not keep."""


def initialise(module: nn.Module, seed: int) -> None:
    """Fill every declared parameter below ``module``, in place, whatever its dtype and device."""
    with torch.no_grad():
        for declared in declared_parameters(module):
            values = initial_values(declared.name, declared.shard, declared.declaration.init, seed)
            declared.parameter.copy_(values)


def initial_values(name: str, shard: ShardSpec, init: Init, seed: int) -> Tensor:
    """The fp32 local tensor of a parameter, ``shard.local_shape``; padding rows are zero."""
    if init.kind == "constant":
        local = torch.full(shard.local_shape, init.value)
        if shard.padding:
            assert shard.dim is not None
            local.narrow(shard.dim, shard.local_size, shard.padding).zero_()
        return local
    if init.kind != "normal":
        raise ValueError(f"init.kind={init.kind!r}: normal or constant")
    if shard.dim is None:
        return _rows(name, shard.full_shape, 0, 0, shard.full_shape[0], init.value, seed)
    local = torch.zeros(shard.local_shape)
    offset = 0
    for start, stop in shard.ranges:
        values = _rows(name, shard.full_shape, shard.dim, start, stop, init.value, seed)
        local.narrow(shard.dim, offset, stop - start).copy_(values)
        offset += stop - start
    return local


def _rows(name: str, full_shape: tuple[int, ...], dim: int, start: int, stop: int, std: float, seed: int) -> Tensor:
    """Rows ``start:stop`` along ``dim`` of the full parameter."""
    size = full_shape[dim]
    blocks = []
    for block in range(start // BLOCK, -(-stop // BLOCK)):
        first, last = block * BLOCK, min((block + 1) * BLOCK, size)
        shape = (*full_shape[:dim], last - first, *full_shape[dim + 1 :])
        generator = torch.Generator().manual_seed(_block_seed(seed, name, block))
        values = torch.empty(shape).normal_(0.0, std, generator=generator)
        blocks.append(values.narrow(dim, max(start, first) - first, min(stop, last) - max(start, first)))
    return torch.cat(blocks, dim)


def _block_seed(seed: int, name: str, block: int) -> int:
    """63 bits of a hash: neighbouring seeds, names and blocks give unrelated streams."""
    digest = hashlib.blake2b(f"{seed}/{name}/{block}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1
