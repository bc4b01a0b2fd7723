"""Proves after a checkpoint was loaded that what arrived is what was saved, in every copy that any rank holds.

Three things are compared, tensor by tensor, as sums of fingerprints over all ranks:

1. Masters, moments, parameters that are not trained, and buffers: what ranks hold is a whole number of copies of the
   full tensor, and adds up to so many times the fingerprint that the checkpoint has of it.
2. The weights that the model computes with: they add up to so many times the fingerprint of the masters, rounded to the
   model's number format.
3. Every tensor of the checkpoint is in the model.

Nothing is read for it, and each rank hashes what it holds. Parameters need no values before they are loaded: one that
was not filled is found here.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod
from typing import Protocol

import torch
from torch import Tensor

from megalm.checkpoint.fingerprint import fingerprint
from megalm.checkpoint.manifest import combined_hash
from megalm.checkpoint.pieces import BUFFER, WEIGHT
from megalm.checkpoint.reader import CheckpointReader
from megalm.core.parameters import StatePiece
from megalm.engine.resume import MOMENTS
from megalm.errors import CheckpointError
from megalm.mesh.groups import ParallelContext

_MODULUS = 1 << 64
_VALUES = (WEIGHT, BUFFER)


class Holder(Protocol):
    """What is asked of an engine."""

    def state_pieces(self) -> Sequence[StatePiece]:
        """What this rank stands for: over all ranks each element once."""

    def held_pieces(self) -> Sequence[StatePiece]:
        """All that this rank holds, copies too."""

    def model_pieces(self) -> Sequence[StatePiece]:
        """Parameters as the model computes with them."""


@dataclass(frozen=True)
class _Sum:
    """Fingerprints of what ranks hold of a tensor, and how many elements that is."""

    share: int
    elements: int

    def is_copies_of(self, share: int, elements: int) -> bool:
        """Whether it is so and so many whole copies, and at least one."""
        copies, rest = divmod(self.elements, max(elements, 1))
        return copies > 0 and rest == 0 and (self.share - copies * share) % _MODULUS == 0


def prove_loaded(reader: CheckpointReader, engine: Holder, context: ParallelContext, *, moments: bool) -> str:
    """Compare what all ranks hold now with what the checkpoint says; collective over all ranks.

    Args:
        reader: of the checkpoint.
        engine: what was filled.
        context: this rank's groups.
        moments: whether the optimizer's state was loaded, too.

    Returns:
        One hash of all weights, the same for every layout.

    Raises:
        CheckpointError: naming every tensor that is missing or is not what was saved.
    """
    kinds = (*_VALUES, *(MOMENTS if moments else ()))
    names = sorted(reader.manifest.tensors)
    sums = _Sums(names, ("loaded", "rounded", "computed", *kinds), context.device)
    formats = {piece.name: piece.values.dtype for piece in engine.model_pieces()}
    for piece in engine.state_pieces():
        if piece.kind in _VALUES:
            sums.add("loaded", piece, piece.values.float())
        if piece.kind == WEIGHT:
            sums.add("rounded", piece, piece.values.to(formats[piece.name]).float())
    for piece in engine.model_pieces():
        sums.add("computed", piece, piece.values.float())
    for piece in engine.held_pieces():
        if piece.kind in kinds:
            saved = reader.saved_part(piece)
            sums.add(piece.kind, saved, saved.values.float())
    of_all = sums.over(context)
    if problems := [problem for name in names for problem in _problems(reader, name, of_all[name], kinds)]:
        raise CheckpointError("\n".join(f"{reader.path}: {problem}" for problem in problems))
    return combined_hash({name: of_all[name]["loaded"].share for name in names})


def _problems(reader: CheckpointReader, name: str, held: dict[str, _Sum], kinds: Sequence[str]) -> Iterator[str]:
    """What is wrong with one tensor, in words."""
    record = reader.manifest.tensors[name]
    if not any(held[kind].elements for kind in _VALUES):
        yield f"{name}: in the checkpoint, not in the model"
        return
    for kind in kinds:
        if not held[kind].elements and (kind in _VALUES or not record.trainable):
            continue  # a parameter is no buffer, and what is not trained has no moments
        text = record.fingerprint_of(kind)
        # Without a fingerprint the elements are counted alone.
        found = _Sum(0, held[kind].elements) if text is None else held[kind]
        if not found.is_copies_of(0 if text is None else int(text, 16), prod(record.shape)):
            yield f"{name}: what was loaded{'' if kind in _VALUES else f' as {kind}'} is not what was saved"
    if held[WEIGHT].elements and not held["computed"].is_copies_of(held["rounded"].share, held["rounded"].elements):
        yield f"{name}: what the model computes with is not what was loaded"


class _Sums:
    """Sums over the pieces of this rank, by what they are sums of and by tensor."""

    def __init__(self, names: Sequence[str], kinds: Sequence[str], device: torch.device) -> None:
        self._names = {name: number for number, name in enumerate(names)}
        self._kinds = {kind: number for number, kind in enumerate(kinds)}
        self._device = device
        self._totals = torch.zeros(len(kinds), 2, len(names), dtype=torch.int64)

    def add(self, kind: str, piece: StatePiece, values: Tensor) -> None:
        """Count a piece, whose fp32 values are given."""
        share = fingerprint(piece.name, piece.shard, piece.flat_start, values)
        elements = sum(rows.rows * rows.width for rows in piece.shard.runs(piece.flat_start, values.numel()))
        # As 64 bits with a sign hold it; sums wrap around.
        signed = share - _MODULUS if share >= _MODULUS // 2 else share
        self._totals[self._kinds[kind], :, self._names[piece.name]] += torch.tensor([signed, elements])

    def over(self, context: ParallelContext) -> dict[str, dict[str, _Sum]]:
        """The sums over all ranks, by tensor; collective."""
        totals = context.world_group.all_reduce(self._totals.to(self._device)).tolist()
        return {
            name: {
                kind: _Sum(totals[row][0][column] % _MODULUS, totals[row][1][column])
                for kind, row in self._kinds.items()
            }
            for name, column in self._names.items()
        }
