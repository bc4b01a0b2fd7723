"""Causal self-attention with the heads split over a tensor-parallel group.

Shapes: B batch, S sequence, H hidden, N query heads, K key/value heads, D head dim, T tensor-parallel degree.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from megalm.core.groups import Group
from megalm.core.linear import ColumnParallelLinear, RowParallelLinear
from megalm.core.position import RotaryPosition


class CausalSelfAttention(nn.Module):
    """Multi-head or grouped-query attention (Vaswani et al. 2017; Ainslie et al. 2023) on SDPA.

    Query, key and value come from one column-parallel product whose output is [all query heads | all key heads | all
    value heads]; a rank holds whole heads of each, N/T and K/T of them.
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        num_kv_heads: int,
        *,
        group: Group,
        std: float,
        projection_std: float,
        bias: bool,
        rotary: RotaryPosition | None,
    ) -> None:
        super().__init__()
        self.head_dim = hidden_size // num_heads
        self.grouped = num_kv_heads != num_heads
        self.rotary = rotary
        kv_size = num_kv_heads * self.head_dim
        self.qkv = ColumnParallelLinear(hidden_size, (hidden_size, kv_size, kv_size), group=group, std=std, bias=bias)
        self.projection = RowParallelLinear(hidden_size, hidden_size, group=group, std=projection_std, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """[B, S, H] ▶ [B, S, H]."""
        query, key, value = (
            part.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)  # [B, S, N/T·D] ▶ [B, N/T, S, D]
            for part in self.qkv(x).split(self.qkv.local_out_features, dim=-1)
        )
        if self.rotary is not None:
            query, key = self.rotary(query), self.rotary(key)
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=self.grouped)
        y: Tensor = self.projection(mixed.transpose(1, 2).flatten(2))  # [B, N/T, S, D] ▶ [B, S, H/T] ▶ [B, S, H]
        return y
