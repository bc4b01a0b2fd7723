"""One Transformer block: pre-norm attention and network, each added to the residual stream (Radford et al. 2019).

Shapes: B batch, S sequence, H hidden.
"""

from __future__ import annotations

import math

from torch import Tensor, nn

from megalm.config.schema import Model
from megalm.core.attention import CausalSelfAttention
from megalm.core.groups import Group
from megalm.core.mlp import make_mlp
from megalm.core.norm import make_norm
from megalm.core.position import RotaryPosition


class TransformerBlock(nn.Module):
    """``x + attention(norm x)``, then ``x + mlp(norm x)``.

    Weights start at ``init_std``, the two projections into the residual stream at ``init_std / sqrt(2·num_layers)``, so
    that its variance does not grow with depth (GPT-2).
    """

    def __init__(self, model: Model, *, group: Group, rotary: RotaryPosition | None) -> None:
        super().__init__()
        projection_std = model.init_std / math.sqrt(2 * model.num_layers)
        self.attention_norm = make_norm(model.norm, model.hidden_size, epsilon=model.norm_epsilon, bias=model.bias)
        self.attention = CausalSelfAttention(
            model.hidden_size,
            model.num_heads,
            model.kv_heads,
            group=group,
            std=model.init_std,
            projection_std=projection_std,
            bias=model.bias,
            rotary=rotary,
        )
        self.mlp_norm = make_norm(model.norm, model.hidden_size, epsilon=model.norm_epsilon, bias=model.bias)
        self.mlp = make_mlp(
            model.activation,
            model.hidden_size,
            model.ffn_size,
            group=group,
            std=model.init_std,
            projection_std=projection_std,
            bias=model.bias,
        )

    def forward(self, x: Tensor) -> Tensor:
        """[B, S, H] ▶ [B, S, H]."""
        x = x + self.attention(self.attention_norm(x))
        y: Tensor = x + self.mlp(self.mlp_norm(x))
        return y
