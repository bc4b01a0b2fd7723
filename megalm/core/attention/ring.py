"""Ring attention (Liu et al. 2023): keys and values travel round the ranks, queries stay.

Shapes: B batch, N query heads, K key/value heads, G = N / K, s tokens of a rank, c = s/2 of a chunk, D head dim, C
ranks.

Each rank's queries meet every rank's keys in turn. Softmax over all of them is assembled from partial results by their
log-sum-exp (Milakov & Gimelshein 2018), in fp32. A partial result is a product of explicit scores, tile by tile, or, if
asked for, comes from a device's flash kernel, whose scores are never in memory (``flash.py``). While a rank computes
with one block of keys and values, the next is on its way. In backward the gradients of keys and values travel with
them, and are home after a full turn.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from megalm.core.attention import flash
from megalm.core.attention.attend import AttentionCore
from megalm.mesh.groups import Group

_QUERY_BLOCK = 1024
"""Queries whose scores exist at one time: [B, N, 1024, c] fp32 is the largest tensor."""


@dataclass(frozen=True)
class Chunks:
    """Which two of the 2C chunks of a sequence each rank holds: one from either end.

    Attributes:
        degree: C.
    """

    degree: int

    def of(self, member: int) -> tuple[int, int]:
        """Chunk numbers of one rank, ascending."""
        return member, 2 * self.degree - 1 - member


def ring_attention(
    core: AttentionCore,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    heads: Tensor,
    samples: Tensor | None,
    chunks: Chunks,
    group: Group,
) -> Tensor:
    """The core over whole sequences whose tokens lie on the ranks of ``group`` as ``chunks`` says.

    Args:
        core: masks and dropout of the layer.
        query: [B, N, s, D] of this rank's tokens.
        key: [B, K, s, D].
        value: [B, K, s, D].
        heads: [N], numbers of the query heads in the whole model.
        samples: [B], global numbers of the samples; None: no dropout.
        chunks: where chunks lie.
        group: the ranks, of degree C.

    Returns:
        [B, N, s, D] for this rank's queries.
    """
    ring = _Ring(core, heads, samples if core.drops(samples) else None, chunks, group)
    mixed: Tensor = _RingAttention.apply(query, key, value, ring)  # type: ignore[no-untyped-call]
    return mixed


class _RingAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, ring: _Ring) -> Tensor:
        mixed = torch.zeros(query.shape, dtype=_exact(query), device=query.device)
        lse = torch.full((*query.shape[:-1], 1), float("-inf"), dtype=mixed.dtype, device=query.device)
        block = torch.stack((key, value))
        for owner in ring.owners():
            ahead = _pass_on([block], ring.group) if owner != ring.last_owner else None
            for tile in ring.tiles(owner, query):
                _meet(ring, tile, query, block[0], block[1], mixed, lse)
            if ahead is not None:
                (block,) = ahead.wait()
        mixed = mixed.to(query.dtype)
        ctx.save_for_backward(query, key, value, mixed, lse)
        ctx.ring = ring
        return mixed

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        """As in Dao et al. 2022, with D = rowsum(dO∘O): dS = P∘(dO·Vᵀ − D), dQ = dS·K, dK = dSᵀ·Q, dV = Pᵀ·dO."""
        query, key, value, mixed, lse = ctx.saved_tensors
        ring: _Ring = ctx.ring
        delta = (gradient.to(lse.dtype) * mixed).sum(dim=-1, keepdim=True)
        d_query = torch.zeros_like(query, dtype=lse.dtype)
        block = torch.stack((key, value))
        travelling: _Pending | None = None  # the gradients of this rank's current block, from the rank before
        for owner in ring.owners():
            ahead = _pass_on([block], ring.group) if owner != ring.last_owner else None
            d_block = torch.zeros_like(block, dtype=lse.dtype)
            for tile in ring.tiles(owner, query):
                if tile.is_fused:
                    _flash_backward(tile, query, block, gradient, mixed, lse, d_query, d_block)
                    continue
                _meet_backward(
                    ring, tile, query, block[0], block[1], gradient, delta, lse, d_query, d_block[0], d_block[1]
                )
            if travelling is not None:
                d_block += travelling.wait()[0]
            travelling = _pass_on([d_block], ring.group)
            if ahead is not None:
                (block,) = ahead.wait()
        assert travelling is not None
        d_key, d_value = travelling.wait()[0]
        return d_query.to(query.dtype), d_key.to(key.dtype), d_value.to(value.dtype), None


@dataclass(frozen=True)
class _Tile:
    """A tile of the attention matrix: rows of this rank's tokens, rows of the travelling block, and their positions."""

    queries: slice
    keys: slice
    query_positions: Tensor
    key_positions: Tensor
    is_whole: bool
    """Whether no score of the tile is masked."""
    is_fused: bool
    """Whether the flash kernel computes it: it is whole, or causal from the same position on."""


@dataclass(frozen=True)
class _Ring:
    core: AttentionCore
    heads: Tensor
    samples: Tensor | None
    chunks: Chunks
    group: Group

    def owners(self) -> Iterator[int]:
        """Whose block this rank holds, turn by turn: its own first, then the one that comes from the rank before."""
        for turn in range(self.group.size):
            yield (self.group.index - turn) % self.group.size

    @property
    def last_owner(self) -> int:
        return (self.group.index + 1) % self.group.size

    def fuses(self, query: Tensor) -> bool:
        """Whether the flash kernel may compute: it knows neither windows nor megalm's dropout masks."""
        return self.core.fused and not self.core.window and self.samples is None and flash.takes(query)

    def tiles(self, owner: int, query: Tensor) -> Iterator[_Tile]:
        """Where this rank's queries meet ``owner``'s keys; tiles that are all masked are left out."""
        size = query.shape[2] // 2
        device = self.heads.device
        fused = self.fuses(query)
        step = size if fused else _QUERY_BLOCK  # the kernel has blocks of its own
        for q, query_chunk in enumerate(self.chunks.of(self.group.index)):
            for first in range(0, size, step):
                rows = min(step, size - first)
                start = query_chunk * size + first
                for k, key_chunk in enumerate(self.chunks.of(owner)):
                    low, high = start - (key_chunk + 1) * size + 1, start + rows - 1 - key_chunk * size
                    if (self.core.causal and high < 0) or (self.core.window and low >= self.core.window):
                        continue  # distances of queries to keys lie between low and high
                    if self.core.window and not self.core.causal and -high >= self.core.window:
                        continue
                    unmasked = (not self.core.causal or low >= 0) and not self.core.window
                    yield _Tile(
                        slice(q * size + first, q * size + first + rows),
                        slice(k * size, (k + 1) * size),
                        torch.arange(start, start + rows, device=device),
                        torch.arange(key_chunk * size, (key_chunk + 1) * size, device=device),
                        unmasked,
                        fused,
                    )

    def keeps(self, tile: _Tile) -> Tensor | None:
        """[B, N, q, k] factors of dropout."""
        if self.samples is None:
            return None
        return self.core.keeps(self.samples, self.heads, tile.query_positions, tile.key_positions)


def _scores(ring: _Ring, tile: _Tile, query: Tensor, key: Tensor) -> Tensor:
    """[B, N, q, k] in fp32, minus infinity where masked."""
    scores = _matmul(query[:, :, tile.queries], key[:, :, tile.keys].mT).to(_exact(query)) / math.sqrt(query.shape[-1])
    if tile.is_whole:
        return scores
    return scores.masked_fill(~ring.core.sees(tile.query_positions, tile.key_positions), float("-inf"))


def _meet(ring: _Ring, tile: _Tile, query: Tensor, key: Tensor, value: Tensor, mixed: Tensor, lse: Tensor) -> None:
    """Add a tile to ``mixed`` and ``lse``, in place."""
    if tile.is_fused:
        _flash_meet(tile, query, key, value, mixed, lse)
        return
    scores = _scores(ring, tile, query, key)
    old = lse[:, :, tile.queries]
    new = torch.logaddexp(old, scores.logsumexp(dim=-1, keepdim=True))
    # Rows without any key so far: minus infinity less itself would be NaN.
    safe = new.masked_fill(new == float("-inf"), 0.0)
    probabilities = (scores - safe).exp_()
    kept = ring.keeps(tile)
    if kept is not None:
        probabilities = probabilities * kept
    addition = _matmul(probabilities.to(value.dtype), value[:, :, tile.keys])
    mixed[:, :, tile.queries] = mixed[:, :, tile.queries] * (old - safe).exp_() + addition
    lse[:, :, tile.queries] = new


def _flash_meet(tile: _Tile, query: Tensor, key: Tensor, value: Tensor, mixed: Tensor, lse: Tensor) -> None:
    rows, columns = tile.queries, tile.keys
    own, own_lse = flash.forward(query[:, :, rows], key[:, :, columns], value[:, :, columns], causal=not tile.is_whole)
    old = lse[:, :, rows]
    new = torch.logaddexp(old, own_lse)  # finite: the kernel leaves no query without a key
    mixed[:, :, rows] = mixed[:, :, rows] * (old - new).exp_() + own * (own_lse - new).exp_()
    lse[:, :, rows] = new


def _flash_backward(
    tile: _Tile,
    query: Tensor,
    block: Tensor,
    gradient: Tensor,
    mixed: Tensor,
    lse: Tensor,
    d_query: Tensor,
    d_block: Tensor,
) -> None:
    """Add a tile's part to the gradients of queries and of the block [2, B, K, s, D], in place."""
    rows, columns = tile.queries, tile.keys
    key, value = block[:, :, :, columns]
    found = flash.backward(
        gradient[:, :, rows],
        query[:, :, rows],
        key,
        value,
        mixed[:, :, rows],
        lse[:, :, rows],
        causal=not tile.is_whole,
    )
    d_query[:, :, rows] += found.query
    d_block[0, :, :, columns] += found.key
    d_block[1, :, :, columns] += found.value


def _meet_backward(
    ring: _Ring,
    tile: _Tile,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    gradient: Tensor,
    delta: Tensor,
    lse: Tensor,
    d_query: Tensor,
    d_key: Tensor,
    d_value: Tensor,
) -> None:
    """Add a tile's part to the three gradients, in place."""
    rows, columns, dtype = tile.queries, tile.keys, query.dtype
    probabilities = (_scores(ring, tile, query, key) - lse[:, :, rows]).exp_()
    kept = ring.keeps(tile)
    dropped = probabilities if kept is None else probabilities * kept
    d_value[:, :, columns] += _sum_groups(dropped.to(dtype).mT @ gradient[:, :, rows], value.shape[1])
    d_probabilities = _matmul(gradient[:, :, rows], value[:, :, columns].mT).to(lse.dtype)
    if kept is not None:
        d_probabilities = d_probabilities * kept
    d_scores = probabilities * (d_probabilities - delta[:, :, rows]) / math.sqrt(query.shape[-1])
    d_scores = d_scores.to(dtype)
    d_query[:, :, rows] += _matmul(d_scores, key[:, :, columns])
    d_key[:, :, columns] += _sum_groups(d_scores.mT @ query[:, :, rows], key.shape[1])


def _matmul(x: Tensor, by_key_head: Tensor) -> Tensor:
    """[B, N, q, ·] with [B, K, ·, ·]: the G query heads of a key head are more rows of the same product."""
    grouped = x.unflatten(1, (by_key_head.shape[1], -1)).flatten(2, 3)  # [B, K, G·q, ·]
    product: Tensor = (grouped @ by_key_head).unflatten(2, (-1, x.shape[2]))
    return product.flatten(1, 2)


def _sum_groups(x: Tensor, key_heads: int) -> Tensor:
    """[B, N, k, D] ▶ [B, K, k, D]: a key head's gradient is the sum over its query heads."""
    grouped: Tensor = x.unflatten(1, (key_heads, -1))
    return grouped.sum(dim=2)


def _exact(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


class _Pending:
    """Tensors being received from the previous rank."""

    def __init__(self, tensors: list[Tensor], works: list[dist.Work], sent: list[Tensor]) -> None:
        self._tensors, self._works = tensors, works
        self._sent = sent  # alive until they have left

    def wait(self) -> list[Tensor]:
        for work in self._works:
            work.wait()
        return self._tensors


def _pass_on(tensors: list[Tensor], group: Group) -> _Pending:
    """Send to the rank after, receive from the rank before: one grouped, non-blocking call, as NCCL needs it."""
    after, before = (group.index + 1) % group.size, (group.index - 1) % group.size
    arriving = [torch.empty_like(t) for t in tensors]
    operations = [dist.P2POp(dist.isend, t, group.ranks[after], group.handle) for t in tensors]
    operations += [dist.P2POp(dist.irecv, t, group.ranks[before], group.handle) for t in arriving]
    return _Pending(arriving, dist.batch_isend_irecv(operations), tensors)
