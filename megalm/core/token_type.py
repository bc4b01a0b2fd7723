"""Token types: one trained vector per kind of token, such as BERT's two segments (Devlin et al. 2019).

Shapes: B batch, S sequence, H hidden.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from megalm.core.parameters import Init, ParallelModule
from megalm.mesh.slices import ShardSpec


class TokenTypeEmbedding(ParallelModule):
    """Added to the word embedding; replicated over the tensor-parallel group."""

    def __init__(self, num_types: int, hidden_size: int, *, std: float, partial: bool) -> None:
        super().__init__()
        shard = ShardSpec.replicated(num_types, hidden_size)
        self.weight = self.declare("weight", shard, Init.normal(std), partial=partial)

    def forward(self, types: Tensor) -> Tensor:
        """[B, S] ▶ [B, S, H]."""
        return F.embedding(types, self.weight)
