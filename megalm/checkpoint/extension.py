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

from megalm.checkpoint.pieces import WEIGHT
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
        vars(self).update(vars(reader))
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

    def read_flat(self, name: str, kind: str, shard: ShardSpec, flat_start: int, length: int) -> Tensor:
        """See the base class; of the new rows only those are made that the run reaches."""
        saved = self._saved.get(name)
        if saved is None or kind != WEIGHT:
            return super().read_flat(name, kind, shard, flat_start, length)
        run = torch.zeros(length)
        start, stop = self._kept(saved, shard)
        width = prod(saved[1:])
        end = min(flat_start + length, (stop - start) * width)
        if flat_start < end:
            kept = ShardSpec.along(saved, 0, ((start, stop),))
            run[: end - flat_start] = super().read_flat(name, kind, kept, flat_start, end - flat_start)
        made = self._new_rows(name, shard, stop - start, flat_start, length)
        if made is not None:
            place, values = made
            run[place : place + values.numel()] = values
        return run

    def _new_rows(
        self, name: str, shard: ShardSpec, kept: int, flat_start: int, length: int
    ) -> tuple[int, Tensor] | None:
        """(where they begin in a run, values) of the rows after the first ``kept`` ones of a slice."""
        (rows,) = shard.cuts
        ((begin, end),) = rows.ranges
        width = prod(shard.full_shape[1:])
        first = max(kept, flat_start // width)
        last = min(end - begin, -(-(flat_start + length) // width))
        if first >= last:
            return None
        part = ShardSpec.along(shard.full_shape, 0, ((begin + first, begin + last),))
        made = initial_values(name, part, self._inits[name], self._seed).to(self._dtype).float().view(-1)
        low, high = max(flat_start, first * width), min(flat_start + length, last * width)
        return low - flat_start, made[low - first * width : high - first * width]

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
