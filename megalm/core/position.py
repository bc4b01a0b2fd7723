"""Positions: learned absolute embeddings (GPT-2) and rotary ones (Su et al. 2021).

Shapes: B batch, S sequence, H hidden, N heads, D head dim.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from megalm.core.sharding import Init, ParallelModule, ShardSpec


class LearnedPosition(ParallelModule):
    """One trained vector per position, added to the word embedding; replicated over the tensor-parallel group."""

    def __init__(self, sequence_length: int, hidden_size: int, *, std: float, partial: bool = False) -> None:
        super().__init__()
        self.weight = self.declare(
            "weight", ShardSpec.replicated(sequence_length, hidden_size), Init.normal(std), partial=partial
        )

    def forward(self, positions: Tensor) -> Tensor:
        """Positions [S] ▶ [S, H]; S may be shorter than the trained length."""
        return F.embedding(positions, self.weight)


class RotaryPosition(nn.Module):
    """Rotates pairs (d, d + D/2) of each query and key by an angle that grows with the position.

    The tables are fp32 whatever the dtype of the model: at position 2,048 a bf16 angle is off by radians. They are
    plain attributes, not buffers, so that casting the model to bf16 leaves them alone; nothing of them is saved.
    """

    def __init__(self, sequence_length: int, head_dim: int, *, base: float, device: torch.device) -> None:
        super().__init__()
        if head_dim % 2:
            raise ValueError(f"head_dim={head_dim}: rotary positions need an even head dim")
        frequency = base ** (-torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)  # [D/2]
        angle = torch.outer(torch.arange(sequence_length, dtype=torch.float64), frequency)  # [S, D/2]
        self.cos = angle.cos().float().to(device)
        self.sin = angle.sin().float().to(device)

    def forward(self, x: Tensor, positions: Tensor) -> Tensor:
        """[B, N, S, D] and the positions [S] of its rows ▶ [B, N, S, D], in x's dtype."""
        cos, sin = self.cos[positions], self.sin[positions]
        first, second = x.float().chunk(2, dim=-1)
        return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)
