"""How the layers of a rank are split over its tensor-parallel group."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from megalm.mesh.groups import ALONE, Group

SEQUENCE = 1
"""The dim of an activation that sequence parallelism splits."""


@dataclass(frozen=True)
class TensorParallel:
    """What a layer that is split over tensor-parallel ranks needs to know.

    Attributes:
        group: the tensor-parallel group, of degree T.
        sequence_parallel: activations between column-parallel inputs and row-parallel outputs are split along the
            sequence, [B, S/T, H] (Korthikanti et al. 2022), instead of being whole on every rank.
        parts: in how many parts a linear layer computes a product whose collective nothing else hides; see
            ``overlap.py``.
    """

    group: Group = ALONE
    sequence_parallel: bool = False
    parts: int = 1

    @property
    def splits_sequence(self) -> bool:
        """Whether activations outside tensor-parallel regions are [B, S/T, H] with T above 1."""
        return self.sequence_parallel and self.group.size > 1

    def own_tokens(self, per_token: Tensor) -> Tensor:
        """[S, …] of all tokens ▶ those of this rank's rows of an activation: [S/T, …] under sequence parallelism."""
        return per_token.chunk(self.group.size)[self.group.index] if self.splits_sequence else per_token
