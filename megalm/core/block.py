"""One Transformer block: pre-norm attention and network, each added to the residual stream (Radford et al. 2019).

Shapes: B batch, S sequence, H hidden.
"""

from __future__ import annotations

import math

from torch import Tensor, nn

from megalm.config.schema import Model
from megalm.core.attention import SelfAttention
from megalm.core.context_parallel import ContextParallel
from megalm.core.mlp import make_mlp
from megalm.core.norm import make_norm
from megalm.core.place import Place
from megalm.core.position import RotaryPosition
from megalm.core.tensor_parallel import TensorParallel


class TransformerBlock(nn.Module):
    """``x + attention(norm x)``, then ``x + mlp(norm x)``.

    Weights start at ``init_std``, the two projections into the residual stream at ``init_std / sqrt(2·num_layers)``, so
    that its variance does not grow with depth (GPT-2).

    Args:
        model: architecture.
        layer: number of this block in the whole model.
        tp: how weights and activations are split over tensor-parallel ranks.
        cp: how the sequence is split over context-parallel ranks.
        rotary: rotary positions, shared by all blocks; None where positions are learned.
        seed: of dropout masks.
        recompute: ``none``, ``selective`` or ``full``.
    """

    def __init__(
        self,
        model: Model,
        layer: int,
        *,
        tp: TensorParallel,
        cp: ContextParallel,
        rotary: RotaryPosition | None,
        seed: int,
        recompute: str,
    ) -> None:
        super().__init__()
        projection_std = model.init_std / math.sqrt(2 * model.num_layers)
        self.attention_norm = make_norm(model, tp)
        self.attention = SelfAttention(
            model,
            layer,
            tp=tp,
            cp=cp,
            rotary=rotary,
            projection_std=projection_std,
            seed=seed,
            recompute_core=recompute == "selective",
        )
        self.mlp_norm = make_norm(model, tp)
        self.mlp = make_mlp(
            model.activation,
            model.hidden_size,
            model.ffn_size,
            tp=tp,
            std=model.init_std,
            projection_std=projection_std,
            bias=model.bias,
        )

    def forward(self, x: Tensor, place: Place) -> Tensor:
        """[B, S, H] ▶ [B, S, H]."""
        x = x + self.attention(self.attention_norm(x), place)
        y: Tensor = x + self.mlp(self.mlp_norm(x))
        return y
