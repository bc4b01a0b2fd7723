"""The attention core: softmax(query·keyᵀ/√D)·value, with the masks that a layer asks for.

Shapes: B batch, S sequence, N query heads, K key/value heads, G = N / K query heads per key/value head, D head dim.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from megalm.core.attention.block_masks import flex
from megalm.core.attention.cpu import causal_attention
from megalm.core.device_kind import device_kind
from megalm.core.documents import Documents
from megalm.core.dropout import attention_keep_mask, stream_key


class AttentionCore(nn.Module):
    """Scaled dot-product attention with causal, window and document masks, and dropout; it has no parameters.

    Args:
        causal: causal attention; False: bidirectional.
        window: attention window in tokens, the query's own included; 0: full attention.
        dropout: dropout probability of attention probabilities.
        seed: of the run.
        layer: number of the block in the whole model.
        fused: whether windows on GPUs, and ring attention, take kernels that hold no score in memory.
    """

    key: Tensor

    def __init__(
        self, *, causal: bool, window: int, dropout: float, seed: int, layer: int, fused: bool = False
    ) -> None:
        super().__init__()
        self.causal, self.window, self.fused = causal, window, fused
        self.dropout = dropout
        key = torch.tensor(stream_key(seed, layer, "attention_probabilities"), dtype=torch.int32)
        self.register_buffer("key", key, persistent=False)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        heads: Tensor,
        samples: Tensor | None,
        documents: Documents | None = None,
        block_mask: Any = None,
    ) -> Tensor:
        """Attention over whole sequences.

        Args:
            query: [B, N, S, D].
            key: [B, K, S, D].
            value: [B, K, S, D].
            heads: [N], the numbers of these query heads in the whole model.
            samples: [B], global numbers of the samples; None: no dropout.
            documents: a query sees its own document only; None: rows are one document each.
            block_mask: flex attention's, of this layer's window; None: a dense mask.

        Returns:
            [B, N, S, D].
        """
        if self.drops(samples):
            return self._explicit(query, key, value, heads, samples, documents)
        if documents is None:
            return self._whole(query, key, value) if block_mask is None else flex(query, key, value, block_mask)
        if device_kind(query) == "cpu":  # flex attention has no backward there
            return documents.attend_each(self._whole, query, key, value)
        return documents.attend_in_blocks(query, key, value, causal=self.causal, window=self.window)

    def _whole(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        grouped = query.shape[1] != key.shape[1]
        if self.window:
            positions = torch.arange(query.shape[2], device=query.device)
            mask = self.sees(positions, positions)
            return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, enable_gqa=grouped)
        if self.causal and device_kind(query) == "cpu" and query.dtype == torch.bfloat16 and query.requires_grad:
            return causal_attention(query, key, value)
        return F.scaled_dot_product_attention(query, key, value, is_causal=self.causal, enable_gqa=grouped)

    def drops(self, samples: Tensor | None) -> bool:
        """Whether dropout is active."""
        return self.dropout > 0.0 and self.training and samples is not None

    def sees(self, query_positions: Tensor, key_positions: Tensor) -> Tensor:
        """[Q] and [K] positions ▶ [Q, K] bool: which keys a query attends to."""
        distance = query_positions[:, None] - key_positions[None, :]
        seen = distance >= 0 if self.causal else torch.ones_like(distance, dtype=torch.bool)
        if self.window:
            seen &= distance.abs() < self.window
        return seen

    def keeps(self, samples: Tensor, heads: Tensor, query_positions: Tensor, key_positions: Tensor) -> Tensor:
        """[B, N, Q, K] factors of probabilities: 0 where dropped, else 1 / (1 − share dropped)."""
        mask = attention_keep_mask(self.dropout, self.key, samples, heads, query_positions, key_positions)
        return mask * (1.0 / (1.0 - self.dropout))

    def _explicit(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        heads: Tensor,
        samples: Tensor | None,
        documents: Documents | None,
    ) -> Tensor:
        """With every probability in memory, in fp32, since each is dropped by a mask of its own."""
        assert samples is not None
        groups = query.shape[1] // key.shape[1]
        key, value = (t.repeat_interleave(groups, dim=1) if groups > 1 else t for t in (key, value))
        positions = torch.arange(query.shape[2], device=query.device)
        scores = (query @ key.mT).float() / math.sqrt(query.shape[-1])
        seen = self.sees(positions, positions)
        if documents is not None:
            seen = seen & (documents.numbers[:, None, :, None] == documents.numbers[:, None, None, :])
        scores = scores.masked_fill(~seen, float("-inf"))
        probabilities = scores.softmax(dim=-1) * self.keeps(samples, heads, positions, positions)
        return probabilities.to(value.dtype) @ value
