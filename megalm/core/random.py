"""Initial weights that do not depend on the layout.

The values of a full tensor are cut into blocks of ``BLOCK`` rows along the last dim that a layout may cut (dim 0 if
none does), for each index along other such dims, as for each expert. A block's values are a function of (seed, tensor
name, block number) alone, so a rank generates only the blocks that overlap its slice, and every layout agrees bit for
bit.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from itertools import product

import torch
from torch import Tensor

from megalm.core.parameters import DeclaredTensor, Init
from megalm.mesh.slices import Cut, ShardSpec

BLOCK = 64
"""Rows per block: small, so that a rank generates little that it does not keep."""


def initialise(tensors: Iterable[DeclaredTensor], seed: int) -> None:
    """Fill declared tensors, in place, whatever their dtype and device."""
    with torch.no_grad():
        for declared in tensors:
            declared.tensor.copy_(initial_values(declared.name, declared.shard, declared.init, seed))


def initial_values(name: str, shard: ShardSpec, init: Init, seed: int) -> Tensor:
    """The fp32 local tensor of a parameter, ``shard.local_shape``; padding rows are zero."""
    local = torch.zeros(shard.local_shape)
    if init.kind == "constant":
        for _, place in shard.blocks():
            local[place] = init.value
        return local
    if init.kind != "normal":
        raise ValueError(f"init.kind={init.kind!r}: normal or constant")
    *outer, rows = shard.cuts or (Cut(0, ((0, shard.full_shape[0]),)),)
    for index in product(*(range(cut.size) for cut in outer)):
        at = dict(zip((cut.dim for cut in outer), index, strict=True))
        path = [name, *(str(_full_index(cut, at[cut.dim])) for cut in outer)]
        shape = tuple(1 if dim in at else size for dim, size in enumerate(shard.full_shape))
        target = local[tuple(slice(at[dim], at[dim] + 1) if dim in at else slice(None) for dim in range(local.ndim))]
        for (start, stop), offset in rows.pairs():
            values = _rows("/".join(path), shape, rows.dim, start, stop, init.value, seed)
            target.narrow(rows.dim, offset, stop - start).copy_(values)
    return local


def _full_index(cut: Cut, local: int) -> int:
    """An index along a dim of the local tensor ▶ that of the full one."""
    return next(start + local - offset for (start, stop), offset in cut.pairs() if local < offset + stop - start)


def _rows(path: str, full_shape: tuple[int, ...], dim: int, start: int, stop: int, std: float, seed: int) -> Tensor:
    """Rows ``start:stop`` along ``dim`` of a full tensor."""
    size = full_shape[dim]
    blocks = [torch.empty((*full_shape[:dim], 0, *full_shape[dim + 1 :]))]
    for block in range(start // BLOCK, -(-stop // BLOCK)):
        first, last = block * BLOCK, min((block + 1) * BLOCK, size)
        shape = (*full_shape[:dim], last - first, *full_shape[dim + 1 :])
        generator = torch.Generator().manual_seed(_block_seed(f"{seed}/{path}/{block}"))
        values = torch.empty(shape).normal_(0.0, std, generator=generator)
        blocks.append(values.narrow(dim, max(start, first) - first, min(stop, last) - max(start, first)))
    return torch.cat(blocks, dim)


def _block_seed(path: str) -> int:
    """63 bits of a hash: neighbouring seeds, names and blocks give unrelated streams."""
    return int.from_bytes(hashlib.blake2b(path.encode(), digest_size=8).digest(), "little") >> 1
