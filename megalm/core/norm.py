"""Normalisation over the hidden dim. Replicated over the tensor-parallel group: ranks see whole hidden vectors."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from megalm.config.schema import Model
from megalm.core.parameters import Init, ParallelModule
from megalm.core.tensor_parallel import TensorParallel
from megalm.mesh.slices import ShardSpec


class LayerNorm(ParallelModule):
    """LayerNorm (Ba et al. 2016), the bias optional: [B, S, H] ▶ [B, S, H]."""

    def __init__(self, hidden_size: int, *, epsilon: float, bias: bool, partial: bool = False) -> None:
        super().__init__()
        self.epsilon = epsilon
        self.weight = self.declare("weight", ShardSpec.replicated(hidden_size), Init.constant(1.0), partial=partial)
        bias_shard = ShardSpec.replicated(hidden_size)
        self.bias = self.declare("bias", bias_shard, Init.constant(0.0), partial=partial) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        """Zero mean, unit variance, then scale and shift."""
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, self.epsilon)


class RMSNorm(ParallelModule):
    """RMSNorm (Zhang & Sennrich 2019): unit root mean square, then scale; [B, S, H] ▶ [B, S, H]."""

    def __init__(self, hidden_size: int, *, epsilon: float, partial: bool = False) -> None:
        super().__init__()
        self.epsilon = epsilon
        self.weight = self.declare("weight", ShardSpec.replicated(hidden_size), Init.constant(1.0), partial=partial)

    def forward(self, x: Tensor) -> Tensor:
        """Divide by the root mean square."""
        return F.rms_norm(x, self.weight.shape, self.weight, self.epsilon)


def make_norm(model: Model, tensor_parallel: TensorParallel) -> LayerNorm | RMSNorm:
    """The norm that a config names, ``layernorm`` or ``rmsnorm``, on activations as they are between sublayers."""
    partial = tensor_parallel.splits_sequence
    if model.norm == "layernorm":
        return LayerNorm(model.hidden_size, epsilon=model.norm_epsilon, bias=model.has_norm_bias, partial=partial)
    if model.norm == "rmsnorm":
        return RMSNorm(model.hidden_size, epsilon=model.norm_epsilon, partial=partial)
    raise ValueError(f"norm={model.norm!r}: layernorm or rmsnorm")
