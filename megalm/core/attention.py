"""Causal self-attention with the heads split over a tensor-parallel group.

Shapes: B batch, S sequence, H hidden, N query heads, K key/value heads, D head dim, T tensor-parallel degree.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from megalm.config.schema import Model
from megalm.core.context_parallel import ContextParallel
from megalm.core.linear import ColumnParallelLinear, RowParallelLinear
from megalm.core.place import Place
from megalm.core.position import RotaryPosition
from megalm.core.tensor_parallel import TensorParallel


class CausalSelfAttention(nn.Module):
    """Multi-head or grouped-query attention (Vaswani et al. 2017; Ainslie et al. 2023) on SDPA.

    Query, key and value come from one column-parallel product whose output is [all query heads | all key heads | all
    value heads]; a rank holds whole heads of each, N/T and K/T of them.
    """

    def __init__(
        self,
        model: Model,
        layer: int,
        *,
        tp: TensorParallel,
        cp: ContextParallel,
        rotary: RotaryPosition | None,
        projection_std: float,
        seed: int,
        recompute_core: bool,
    ) -> None:
        super().__init__()
        self.head_dim = model.head_dim
        self.grouped = model.kv_heads != model.num_heads
        self.rotary = rotary
        hidden, kv_size = model.hidden_size, model.kv_heads * self.head_dim
        self.qkv = ColumnParallelLinear(
            hidden, (hidden, kv_size, kv_size), tp=tp, std=model.init_std, bias=model.has_qkv_bias
        )
        self.projection = RowParallelLinear(hidden, hidden, tp=tp, std=projection_std, bias=model.bias)

    def forward(self, x: Tensor, place: Place) -> Tensor:
        """[B, S, H] ▶ [B, S, H]."""
        query, key, value = (
            part.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)  # [B, S, N/T·D] ▶ [B, N/T, S, D]
            for part in self.qkv(x).split(self.qkv.local_out_features, dim=-1)
        )
        if self.rotary is not None:
            query, key = self.rotary(query, place.positions), self.rotary(key, place.positions)
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=self.grouped)
        y: Tensor = self.projection(mixed.transpose(1, 2).flatten(2))  # [B, N/T, S, D] ▶ [B, S, H/T] ▶ [B, S, H]
        return y
