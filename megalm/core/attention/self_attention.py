"""Self-attention with the heads split over a tensor-parallel group.

Shapes: B batch, S sequence (this rank's share under context parallelism), H hidden, N query heads, K key/value heads, D
head dim (N·D need not be H), T tensor-parallel degree.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from megalm.config.schema import Model
from megalm.core.attention.attend import AttentionCore
from megalm.core.attention.context_parallel import ContextParallel
from megalm.core.collectives import gather_for_matmul
from megalm.core.linear import ColumnParallelLinear, RowParallelLinear
from megalm.core.norm import RMSNorm
from megalm.core.place import Place
from megalm.core.position import RotaryPosition
from megalm.core.tensor_parallel import TensorParallel


class SelfAttention(nn.Module):
    """Multi-head, grouped-query or multi-query attention (Vaswani et al. 2017; Ainslie et al. 2023; Shazeer 2019).

    Query, key and value come from one column-parallel product whose output is [all query heads | all key heads | all
    value heads]; a rank holds whole heads of each, N/T and K/T of them.

    With fewer key/value heads than ranks (K < T), T/K ranks share a head. Its weights are not copied to them: each rank
    computes an equal part of the heads' elements, and the ranks gather what is small, the keys and values [B, S, K·D].
    So no weight has copies that would have to be kept alike, counted once or saved once.

    Args:
        model: architecture.
        layer: number of the block in the whole model.
        tensor_parallel: how weights and activations are split over tensor-parallel ranks.
        context_parallel: how the sequence is split over context-parallel ranks.
        rotary: rotary positions; None where positions are learned.
        projection_std: standard deviation of the output projection's initial weights.
        seed: of dropout masks.
        recompute_core: whether backward computes the core again instead of keeping what it needs ("selective"
            recomputation, Korthikanti et al. 2022).
        fused: see :class:`megalm.core.attention.attend.AttentionCore`.
    """

    heads: Tensor

    def __init__(
        self,
        model: Model,
        layer: int,
        *,
        tensor_parallel: TensorParallel,
        context_parallel: ContextParallel,
        rotary: RotaryPosition | None,
        projection_std: float,
        seed: int,
        recompute_core: bool,
        fused: bool = False,
    ) -> None:
        super().__init__()
        self.layer = layer
        self.tensor_parallel, self.context_parallel = tensor_parallel, context_parallel
        self.head_dim = model.head_size
        self.shared_kv_head: int | None = None
        if model.kv_heads < tensor_parallel.group.size:
            self.shared_kv_head = tensor_parallel.group.index * model.kv_heads // tensor_parallel.group.size
        self.rotary = rotary
        self.recompute_core = recompute_core
        hidden, size, kv_size = model.hidden_size, model.attention_size, model.kv_heads * self.head_dim
        self.qkv = ColumnParallelLinear(
            hidden,
            (size, kv_size, kv_size),
            tensor_parallel=tensor_parallel,
            std=model.init_std,
            bias=model.has_qkv_bias,
        )
        self.query_norm = self.key_norm = None
        if model.qk_norm:
            # The same weight serves the heads of all ranks, and each rank sees its own heads' part of the gradient.
            partial = tensor_parallel.group.size > 1
            self.query_norm = RMSNorm(self.head_dim, epsilon=model.norm_epsilon, partial=partial)
            self.key_norm = RMSNorm(self.head_dim, epsilon=model.norm_epsilon, partial=partial)
        self.core = AttentionCore(
            causal=model.causal,
            window=model.attention_window(layer),
            dropout=model.attention_dropout,
            seed=seed,
            layer=layer,
            fused=fused,
        )
        self.projection = RowParallelLinear(
            size, hidden, tensor_parallel=tensor_parallel, std=projection_std, bias=model.has_projection_bias
        )
        local_heads = model.num_heads // tensor_parallel.group.size
        first = tensor_parallel.group.index * local_heads
        self.register_buffer("heads", torch.arange(first, first + local_heads), persistent=False)

    def forward(self, x: Tensor, place: Place) -> Tensor:
        """[B, S, H] ▶ [B, S, H]; under sequence parallelism [B, S/T, H] ▶ [B, S/T, H]."""
        query, key, value = self.qkv(x).split(self.qkv.local_out_features, dim=-1)
        query = self._heads(query)
        key, value = self._key_value_heads(key, value)
        if self.query_norm is not None and self.key_norm is not None:
            query, key = self.query_norm(query), self.key_norm(key)
        if self.rotary is not None:
            positions = place.within_documents
            query, key = self.rotary(query, positions), self.rotary(key, positions)
        if self.recompute_core and torch.is_grad_enabled():
            mixed = checkpoint(self._mix, query, key, value, place, use_reentrant=False, preserve_rng_state=False)
        else:
            mixed = self._mix(query, key, value, place)
        y: Tensor = self.projection(mixed.transpose(1, 2).flatten(2))  # [B, N/T, S, D] ▶ [B, S, N·D/T] ▶ [B, S, H]
        return y

    def _mix(self, query: Tensor, key: Tensor, value: Tensor, place: Place) -> Tensor:
        if place.memory is not None:
            return place.memory.attend(self.layer, self.core, query, key, value, self.heads)
        return self.context_parallel.attend(self.core, query, key, value, self.heads, place)

    def _heads(self, x: Tensor) -> Tensor:
        """[B, S, heads·D] ▶ [B, heads, S, D]."""
        heads: Tensor = x.unflatten(-1, (-1, self.head_dim))
        return heads.transpose(1, 2)

    def _key_value_heads(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """What the local query heads look at: [B, S, K·D/T] each ▶ [B, max(K/T, 1), S, D] each."""
        if self.shared_kv_head is None:
            return self._heads(key), self._heads(value)
        both = gather_for_matmul(torch.stack((key, value)), self.tensor_parallel.group, dim=3)  # [2, B, S, K·D]
        head = slice(self.shared_kv_head, self.shared_kv_head + 1)
        return self._heads(both[0])[:, head], self._heads(both[1])[:, head]
