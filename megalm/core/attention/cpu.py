"""Causal attention on CPU as blocks of explicit matrix products, which bf16 instructions run faster than SDPA.

Shapes: B batch, S sequence, N query heads, K key/value heads, G = N / K query heads per key head, D head dim, h key
heads of a block, Q queries of a block, C keys that it sees.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

_QUERY_BLOCK = 128
"""Queries per block. Of the products with a block's own keys half is computed only to be masked."""

_BLOCK_SCORES = 3 * 2**19
"""Approximate number of scores in memory at once: with fewer, the calls cost more than their arithmetic; with more,
they leave the caches."""


def causal_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """softmax(query·keyᵀ/√D over this and earlier positions)·value (Vaswani et al. 2017, equation 1).

    Neither scores nor probabilities outlive a block: the backward pass computes them again, as in Dao et al. 2022, and
    needs nothing of the forward pass but its inputs. Keys after a block's last query are never multiplied. Exponentials
    and their sums are fp32 in every dtype; scores and probabilities are rounded to that of the query.

    Args:
        query: [B, N, S, D].
        key: [B, K, S, D], with K a divisor of N.
        value: [B, K, S, D].

    Returns:
        [B, N, S, D].
    """
    mixed: Tensor = _CausalAttention.apply(query, key, value)  # type: ignore[no-untyped-call]
    return mixed


class _CausalAttention(torch.autograd.Function):
    """Heads of all samples are one batch axis; the G query heads of a key head are more rows of the same product."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        ctx.save_for_backward(query, key, value)
        attention = _Blocks.of(query, key)
        query, key, value = attention.grouped(query), key.flatten(0, 1), value.flatten(0, 1)
        mixed = torch.empty_like(query)
        for block in attention:
            seen = value[block.heads, : block.stop]
            _put_rows(mixed, block, torch.bmm(attention.probabilities(query, key, block), seen))
        return mixed.view(attention.shape)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor]:  # type: ignore[override]
        """With P the probabilities: dV = Pᵀ·dO, dP = dO·Vᵀ, dS = P∘(dP − rowsum(P∘dP)), dQ = dS·K, dK = dSᵀ·Q."""
        query, key, value = ctx.saved_tensors
        attention, kv_shape = _Blocks.of(query, key), key.shape
        query, gradient = attention.grouped(query), attention.grouped(gradient)
        key, value = key.flatten(0, 1), value.flatten(0, 1)
        d_query = torch.empty_like(query)
        # A key gathers gradients from many blocks, so its sums are kept in fp32.
        d_key = torch.zeros(key.shape, dtype=torch.promote_types(key.dtype, torch.float32), device=key.device)
        d_value = torch.zeros_like(d_key)
        for block in attention:
            seen = (block.heads, slice(block.stop))
            d_mixed = _rows(gradient, block)
            probabilities = attention.probabilities(query, key, block)
            d_value[seen] += torch.bmm(probabilities.mT, d_mixed)
            d_probabilities = torch.bmm(d_mixed, value[seen].mT)
            d_scores = torch._softmax_backward_data(d_probabilities, probabilities, -1, probabilities.dtype)
            _put_rows(d_query, block, torch.bmm(d_scores, key[seen]))
            d_key[seen] += torch.bmm(d_scores.mT, _rows(query, block))
        return (
            d_query.mul_(attention.scale).view(attention.shape),
            d_key.mul_(attention.scale).to(key.dtype).view(kv_shape),
            d_value.to(value.dtype).view(kv_shape),
        )


@dataclass(frozen=True)
class _Block:
    """Some queries of some heads; they see the keys before ``stop``.

    Attributes:
        heads: which of the B·K key heads.
        start: first query.
        stop: the one after the last query.
    """

    heads: slice
    start: int
    stop: int


@dataclass(frozen=True)
class _Blocks:
    """How one attention is cut into blocks.

    Attributes:
        shape: of the query, (B, N, S, D).
        kv_heads: K.
        future: [Q, Q], added to the scores of a block's queries with its own positions: −∞ after the query.
    """

    shape: tuple[int, int, int, int]
    kv_heads: int
    future: Tensor

    @classmethod
    def of(cls, query: Tensor, key: Tensor) -> _Blocks:
        """The blocks for a query [B, N, S, D] and a key [B, K, S, D]."""
        batch, heads, length, head_dim = query.shape
        size = min(_QUERY_BLOCK, length)
        future = torch.full((size, size), -math.inf, dtype=query.dtype, device=query.device).triu_(1)
        return cls((batch, heads, length, head_dim), key.shape[1], future)

    @property
    def scale(self) -> float:
        """1/√D."""
        return 1.0 / math.sqrt(self.shape[-1])

    def __iter__(self) -> Iterator[_Block]:
        batch, heads, length, _ = self.shape
        all_heads, size = batch * self.kv_heads, self.future.shape[0]
        for start in range(0, length, size):
            stop = min(start + size, length)
            per_head = heads // self.kv_heads * size * stop
            step = max(1, _BLOCK_SCORES // per_head)
            for head in range(0, all_heads, step):
                yield _Block(slice(head, min(head + step, all_heads)), start, stop)

    def grouped(self, x: Tensor) -> Tensor:
        """[B, N, S, D] ▶ [B·K, G, S, D], contiguous."""
        batch, heads, length, head_dim = self.shape
        return x.reshape(batch * self.kv_heads, heads // self.kv_heads, length, head_dim).contiguous()

    def probabilities(self, query: Tensor, key: Tensor, block: _Block) -> Tensor:
        """[h, G·Q, C]."""
        asking = _rows(query, block)
        ignored = asking.new_empty(1, 1, 1)
        scores = torch.baddbmm(ignored, asking, key[block.heads, : block.stop].mT, beta=0.0, alpha=self.scale)
        size = block.stop - block.start
        scores.unflatten(1, (-1, size))[..., block.start :].add_(self.future[:size, :size])
        return torch.softmax(scores, dim=-1)


def _rows(x: Tensor, block: _Block) -> Tensor:
    """A block's rows of [B·K, G, S, D] ▶ [h, G·Q, D]."""
    return x[block.heads, :, block.start : block.stop].flatten(1, 2)


def _put_rows(x: Tensor, block: _Block, values: Tensor) -> None:
    """Write [h, G·Q, D] to a block's rows of [B·K, G, S, D]."""
    x[block.heads, :, block.start : block.stop] = values.unflatten(1, (-1, block.stop - block.start))
