"""Positions: learned absolute embeddings (GPT-2) and rotary ones (Su et al. 2021), and how the latter are stretched.

Shapes: B batch, S sequence, H hidden, N heads, D head dim, R ≤ D elements that are rotated.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from megalm.config.schema import Model
from megalm.core.parameters import Init, ParallelModule
from megalm.mesh.slices import ShardSpec

_FLOAT = torch.float64


class LearnedPosition(ParallelModule):
    """One trained vector per position, added to the word embedding; replicated over the tensor-parallel group.

    ``offset`` rows before that of position 0 belong to no token: fairseq's models (RoBERTa, Liu et al. 2019) number
    positions from the padding token's id + 1. They are kept, so that such a model's embedding stays whole.
    """

    def __init__(
        self, sequence_length: int, hidden_size: int, *, std: float, offset: int = 0, partial: bool = False
    ) -> None:
        super().__init__()
        self.offset = offset
        shard = ShardSpec.replicated(offset + sequence_length, hidden_size)
        self.weight = self.declare("weight", shard, Init.normal(std), partial=partial)

    def forward(self, positions: Tensor) -> Tensor:
        """Positions [S] ▶ [S, H], or [B, S] ▶ [B, S, H]; S may be shorter than the trained length."""
        return F.embedding(positions + self.offset if self.offset else positions, self.weight)


class RotaryPosition(nn.Module):
    """Rotates pairs (d, d + R/2) of each query's and key's first R elements by an angle that grows with the position.

    The tables are fp32 whatever the dtype of the model: at position 2,048 a bf16 angle is off by radians. They are
    plain attributes, not buffers, so that casting the model to bf16 leaves them alone; nothing of them is saved.
    """

    def __init__(self, model: Model, *, device: torch.device) -> None:
        super().__init__()
        frequencies, amplitude = rotary_frequencies(model)
        angle = torch.outer(torch.arange(model.sequence_length, dtype=_FLOAT), frequencies)  # [S, R/2]
        self.rotated = 2 * frequencies.numel()
        self.cos = (angle.cos() * amplitude).float().to(device)
        self.sin = (angle.sin() * amplitude).float().to(device)

    def forward(self, x: Tensor, positions: Tensor) -> Tensor:
        """[B, N, S, D] and the positions [S] or [B, S] of its tokens ▶ [B, N, S, D], in x's dtype."""
        positions = positions if positions.ndim == 1 else positions.unsqueeze(1)  # the same for all heads
        cos, sin = self.cos[positions], self.sin[positions]
        first, second = x[..., : self.rotated].float().chunk(2, dim=-1)
        turned = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)
        return turned if self.rotated == x.shape[-1] else torch.cat((turned, x[..., self.rotated :]), dim=-1)


def rotary_frequencies(model: Model) -> tuple[Tensor, float]:
    """Radians per token of each pair, [R/2] fp64, and the factor of cosines and sines.

    ``linear``: positions are divided by the factor (Chen et al. 2023). ``llama3``: pairs whose wavelength is long
    beside the original context are slowed by the factor, short ones stay, a ramp between (Grattafiori et al. 2024).
    ``yarn``: the same by the number of turns within the original context, and attention is sharpened by
    ``0.1·ln(factor) + 1`` on queries and keys alike (Peng et al. 2023, equations 17 to 22).
    """
    size = round(model.head_size * model.rotary_fraction)
    base, factor = model.rotary_base, model.rotary_factor
    frequencies = base ** (-torch.arange(0, size, 2, dtype=_FLOAT) / size)
    slowed = frequencies / factor
    if model.rotary_scaling == "none":
        return frequencies, 1.0
    if model.rotary_scaling == "linear":
        return slowed, 1.0
    original = model.rotary_original_length or model.sequence_length / factor
    turns = original * frequencies / (2 * math.pi)
    if model.rotary_scaling == "llama3":
        low, high = model.rotary_low_frequency_factor, model.rotary_high_frequency_factor
        kept = ((turns - low) / (high - low)).clamp(0.0, 1.0)
        return kept * frequencies + (1.0 - kept) * slowed, 1.0
    if model.rotary_scaling == "yarn":
        kept = 1.0 - _yarn_ramp(model, size, original)
        return kept * frequencies + (1.0 - kept) * slowed, 0.1 * math.log(factor) + 1.0 if factor > 1.0 else 1.0
    raise ValueError(f"rotary_scaling={model.rotary_scaling!r}: none, linear, llama3 or yarn")


def _yarn_ramp(model: Model, size: int, original: float) -> Tensor:
    """0 for pairs that turn at least ``beta_fast`` times in the original context, 1 below ``beta_slow``, [R/2].

    The ramp is linear in the number of the pair, between the whole pairs next to the two bounds.
    """

    def pair_that_turns(times: float) -> float:
        return size * math.log(original / (times * 2 * math.pi)) / (2 * math.log(model.rotary_base))

    low = max(math.floor(pair_that_turns(model.rotary_beta_fast)), 0)
    high = min(math.ceil(pair_that_turns(model.rotary_beta_slow)), size - 1)
    width = high - low or 0.001
    return ((torch.arange(size // 2, dtype=_FLOAT) - low) / width).clamp(0.0, 1.0)
