"""Context parallelism: the sequence of one sample split over ranks.

Shapes: B batch, S whole sequence, C context-parallel degree.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from megalm.core.groups import ALONE, Group


@dataclass(frozen=True)
class ContextParallel:
    """How a sequence is split over ranks, and how attention sees all of it.

    Attributes:
        group: the context-parallel group, of degree C.
        method: ``ulysses`` or ``ring``.
    """

    group: Group = ALONE
    method: str = "ulysses"

    def positions(self, sequence_length: int, device: torch.device | str = "cpu") -> Tensor:
        """[S/C] int64: the positions of the whole sequence that this rank holds, ascending in time on the rank."""
        return torch.arange(sequence_length, device=device)
