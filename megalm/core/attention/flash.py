"""The flash kernel with its log-sum-exp (Dao et al. 2022), block by block: what ring attention is assembled from.

``F.scaled_dot_product_attention`` keeps the log-sum-exp to itself. torch's own operators give it, and their backward
takes that of all keys: then a block's probabilities are ``exp(score − lse)``, its part of the whole softmax.

Shapes: B batch, N query heads, K key/value heads, S queries, C keys (as many where the block is causal), D head dim.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from megalm.core.device_kind import device_kind

_LARGEST_HEAD = 256
"""Elements of a head that the kernel on GPUs takes, in steps of 8."""


class Gradients(NamedTuple):
    """Of a block's query, key and value, in their dtype."""

    query: Tensor
    key: Tensor
    value: Tensor


def takes(query: Tensor) -> bool:
    """Whether the kernel of a device computes attention of such queries, [B, N, S, D]."""
    if device_kind(query) == "cpu":
        return True
    is_half, size = query.dtype in (torch.bfloat16, torch.float16), query.shape[-1]
    return is_half and size % 8 == 0 and size <= _LARGEST_HEAD


def forward(query: Tensor, key: Tensor, value: Tensor, *, causal: bool) -> tuple[Tensor, Tensor]:
    """Attention of [B, N, S, D] over a block [B, K, C, D] ▶ [B, N, S, D], and the log-sum-exp [B, N, S, 1].

    The log-sum-exp is fp32 (fp64 for fp64 queries).
    """
    if device_kind(query) == "cpu":
        mixed, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(query, key, value, 0.0, causal)
    else:
        mixed, lse, *_ = torch.ops.aten._scaled_dot_product_flash_attention(query, key, value, 0.0, causal)
    return mixed, lse.unsqueeze(-1)


def backward(
    gradient: Tensor, query: Tensor, key: Tensor, value: Tensor, mixed: Tensor, lse: Tensor, *, causal: bool
) -> Gradients:
    """A block's part of the gradients.

    Args:
        gradient: of the whole attention's output, [B, N, S, D].
        query: [B, N, S, D].
        key: of the block, [B, K, C, D].
        value: of the block, [B, K, C, D].
        mixed: the whole attention's output, over all blocks, in the query's dtype.
        lse: the whole attention's log-sum-exp, [B, N, S, 1].
        causal: whether the block is.
    """
    lse = lse.squeeze(-1).contiguous()
    if device_kind(query) == "cpu":
        return Gradients(
            *torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
                gradient, query, key, value, mixed, lse, 0.0, causal
            )
        )
    # What the operator's forward gives where sequences are not packed, and the state of a dropout that there is not.
    packed, seed = None, torch.empty(2, dtype=torch.uint64, device=query.device)
    return Gradients(
        *torch.ops.aten._scaled_dot_product_flash_attention_backward(
            *(gradient, query, key, value, mixed, lse),
            *(packed, packed, query.shape[2], key.shape[2]),
            *(0.0, causal, seed, seed.new_empty(())),
        )
    )
