"""Normalisation over the hidden dim. Replicated over the tensor-parallel group: ranks see whole hidden vectors."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from megalm.core.sharding import Init, ParallelModule, ShardSpec


class LayerNorm(ParallelModule):
    """LayerNorm (Ba et al. 2016), the bias optional: [B, S, H] ▶ [B, S, H]."""

    def __init__(self, hidden_size: int, *, epsilon: float, bias: bool) -> None:
        super().__init__()
        self.epsilon = epsilon
        self.weight = self.declare("weight", ShardSpec.replicated(hidden_size), Init.constant(1.0))
        self.bias = self.declare("bias", ShardSpec.replicated(hidden_size), Init.constant(0.0)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        """Zero mean, unit variance, then scale and shift."""
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, self.epsilon)


class RMSNorm(ParallelModule):
    """RMSNorm (Zhang & Sennrich 2019): unit root mean square, then scale; [B, S, H] ▶ [B, S, H]."""

    def __init__(self, hidden_size: int, *, epsilon: float) -> None:
        super().__init__()
        self.epsilon = epsilon
        self.weight = self.declare("weight", ShardSpec.replicated(hidden_size), Init.constant(1.0))

    def forward(self, x: Tensor) -> Tensor:
        """Divide by the root mean square."""
        return F.rms_norm(x, self.weight.shape, self.weight, self.epsilon)


def make_norm(kind: str, hidden_size: int, *, epsilon: float, bias: bool) -> LayerNorm | RMSNorm:
    """The norm that a config names: ``layernorm`` or ``rmsnorm``."""
    if kind == "layernorm":
        return LayerNorm(hidden_size, epsilon=epsilon, bias=bias)
    if kind == "rmsnorm":
        return RMSNorm(hidden_size, epsilon=epsilon)
    raise ValueError(f"norm={kind!r}: layernorm or rmsnorm")
