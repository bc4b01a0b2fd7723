"""Block masks of flex attention (Dong et al. 2024), in closed form: which blocks of queries and keys meet at all.

Flex attention skips the blocks of which no query sees a key, and asks for single pairs where a block is seen in part.
torch's own ``create_block_mask`` finds that out from all S² pairs, of every micro-batch anew. Documents are numbered in
ascending order and windows are bands, so the numbers at the ends of a block decide: a few operations on [S/128, S/128]
elements, no wait for the device, and the same for any S of a shape.

Shapes: B batch (1: all rows are alike), S sequence, Q = ceil(S / 128) blocks.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from megalm.core.device_kind import device_kind

BLOCK = 128
"""Queries, and keys, of a block: flex attention's own choice."""

KEPT = 8
"""Masks of windows that are kept: one for each of a model's windows and lengths, which are few."""


class WindowMasks:
    """The block masks of windows, which depend on no data: made once per length, window and device.

    A model has one, for all of its layers.
    """

    def __init__(self) -> None:
        self._masks: OrderedDict[tuple[int, bool, int, str], Any] = OrderedDict()

    def of(self, length: int, *, causal: bool, window: int, device: torch.device) -> Any:
        """A ``BlockMask`` for [·, ·, S, ·]; it is the same object as long as it is kept."""
        key = (length, causal, window, str(device))
        if key not in self._masks:
            self._masks[key] = block_mask(length, causal=causal, window=window, device=device)
            while len(self._masks) > KEPT:
                self._masks.popitem(last=False)
        self._masks.move_to_end(key)
        return self._masks[key]


def block_mask(length: int, *, causal: bool, window: int, device: torch.device, documents: Tensor | None = None) -> Any:
    """The ``BlockMask`` of a layer.

    Args:
        length: S.
        causal: whether a query sees no later key.
        window: tokens that a query sees in a direction, itself included; 0: all.
        device: of the tokens.
        documents: [B, S], the number of each token's document, ascending by one; None: a row is one document.
    """
    from torch.nn.attention.flex_attention import BlockMask

    some, every = _blocks(length, causal, window, device, documents)
    partly_count, partly = _ordered(some & ~every)
    full_count, full = _ordered(every)
    return BlockMask.from_kv_blocks(
        partly_count,
        partly,
        full_count,
        full,
        BLOCK_SIZE=BLOCK,
        mask_mod=_pairs(causal, window, documents),
        seq_lengths=(length, length),
    )


def flex(query: Tensor, key: Tensor, value: Tensor, mask: Any) -> Tensor:
    """Flex attention with a ``BlockMask``: [B, N, S, D], [B, K, S, D] twice ▶ [B, N, S, D]."""
    mixed: Tensor = _flex_attention(device_kind(query))(
        query, key, value, block_mask=mask, enable_gqa=query.shape[1] != key.shape[1]
    )
    return mixed


def _flex_attention(kind: str) -> Callable[..., Any]:
    """Compiled on GPUs; on the CPU uncompiled and forward only, for tests. Inside a compiled block a part of it."""
    from torch.nn.attention.flex_attention import flex_attention

    plain: Callable[..., Any] = flex_attention
    return plain if kind == "cpu" or torch.compiler.is_compiling() else _compiled_flex_attention()


@lru_cache(maxsize=1)
def _compiled_flex_attention() -> Callable[..., Any]:
    """One function, which torch compiles once per shape."""
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False)


def _pairs(causal: bool, window: int, documents: Tensor | None) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
    """Whether single queries see single keys, as flex attention asks."""

    def sees(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:  # noqa: ARG001 - flex's signature
        seen = query >= (key if causal else 0)
        if window:
            seen = seen & ((query - key).abs() < window)
        return seen if documents is None else seen & (documents[batch, query] == documents[batch, key])

    return sees


def _blocks(
    length: int, causal: bool, window: int, device: torch.device, documents: Tensor | None
) -> tuple[Tensor, Tensor]:
    """[B, 1, Q, Q] bool each: blocks of which some pairs, and of which all pairs, see each other."""
    number = torch.arange(-(-length // BLOCK), device=device)
    first, last = number * BLOCK, (number * BLOCK + BLOCK - 1).clamp(max=length - 1)
    # Distances of a block's queries to its keys lie between low and high.
    low, high = first[:, None] - last[None, :], last[:, None] - first[None, :]
    some, every = torch.ones_like(low, dtype=torch.bool), torch.ones_like(low, dtype=torch.bool)
    # A last block that is shorter is seen in part: what is behind its end is not to be looked at.
    whole = last - first == BLOCK - 1
    every &= whole[:, None] & whole[None, :]
    if causal:
        some, every = some & (high >= 0), every & (low >= 0)
    if window:
        some, every = some & (low < window) & (high > -window), every & (high < window) & (low > -window)
    some, every = some[None, None], every[None, None]
    if documents is None:
        return some, every
    padded = F.pad(documents, (0, len(number) * BLOCK - length), value=-1).unflatten(1, (-1, BLOCK))
    earliest, latest = documents[:, first], padded.amax(dim=-1)  # [B, Q]
    query_low, query_high = earliest[:, None, :, None], latest[:, None, :, None]
    key_low, key_high = earliest[:, None, None, :], latest[:, None, None, :]
    some = some & (query_low <= key_high) & (key_low <= query_high)
    one = (query_low == query_high) & (key_low == key_high) & (query_low == key_low)
    return some, every & one


def _ordered(dense: Tensor) -> tuple[Tensor, Tensor]:
    """[B, 1, Q, Q] bool ▶ how many blocks of keys each block of queries has, [B, 1, Q], and their numbers first."""
    counts = dense.sum(dim=-1, dtype=torch.int32)
    numbers = torch.argsort(dense.int(), dim=-1, descending=True, stable=True).to(torch.int32)
    return counts, numbers
