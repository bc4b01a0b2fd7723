"""A checkpoint's weights for a model that has more words: old rows as they were saved, new ones as in a fresh model.

What is new in a tensor is a function of the run's seed, the tensor's name and the row, so that every layout reads the
same (see ``core/random.py``).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from math import prod

import torch
from torch import Tensor

from megalm.checkpoint.manifest import WEIGHT
from megalm.checkpoint.reader import CheckpointReader
from megalm.core.parameters import DeclaredTensor, StatePiece
from megalm.core.random import initial_values
from megalm.mesh.slices import ShardSpec


class ExtendedReader(CheckpointReader):
    """Reads a checkpoint as if its model had as many words as the one that is filled.

    Args:
        reader: the checkpoint.
        vocabulary: this rank's slices of the tensors that have a row per word, in the larger model.
        seed: of the initial weights.
        dtype: that a fresh model's weights are rounded to.
    """

    def __init__(
        self, reader: CheckpointReader, vocabulary: Sequence[DeclaredTensor], *, seed: int, dtype: torch.dtype
    ) -> None:
        self.path, self.manifest = reader.path, reader.manifest
        self._seed, self._dtype = seed, dtype
        self._saved = {
            p.name: saved
            for p in vocabulary
            if (saved := reader.manifest.full_shapes.get(p.name)) is not None
            and p.shard.full_shape[0] > saved[0]
            and p.shard.full_shape[1:] == saved[1:]
        }
        self._inits = {p.name: p.init for p in vocabulary}

    def check_parameters(self, full_shapes: Mapping[str, tuple[int, ...]], *, whole_model: bool = False) -> None:
        """See the base class; tensors that grow are compared without what is new in them."""
        super().check_parameters(
            {name: self._saved.get(name, shape) for name, shape in full_shapes.items()}, whole_model=whole_model
        )

    def read_local(self, name: str, kind: str, shard: ShardSpec) -> Tensor:
        """See the base class."""
        saved = self._saved.get(name)
        if saved is None or kind != WEIGHT:
            return super().read_local(name, kind, shard)
        local = initial_values(name, shard, self._inits[name], self._seed).to(self._dtype).float()
        start, stop = self._kept(saved, shard)
        if start < stop:
            local[: stop - start] = super().read_local(name, kind, ShardSpec.along(saved, 0, ((start, stop),)))
        return local

    def saved_part(self, piece: StatePiece) -> StatePiece:
        """What of a piece was saved: all but the new rows and the padding after them."""
        saved = self._saved.get(piece.name)
        if saved is None:
            return piece
        start, stop = self._kept(saved, piece.shard)
        end = (stop - start) * prod(saved[1:])
        return replace(piece, values=piece.values[: max(end - piece.flat_start, 0)])

    @staticmethod
    def _kept(saved: tuple[int, ...], shard: ShardSpec) -> tuple[int, int]:
        """The rows of a rank's slice that were saved; they are its first."""
        (rows,) = shard.cuts
        assert rows.dim == 0, "words are rows"
        ((start, stop),) = rows.ranges
        return min(start, saved[0]), min(stop, saved[0])
