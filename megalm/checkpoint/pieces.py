"""The pieces that a full tensor is stored in, and the files that they lie in. No torch.

A *piece* is a run of one rank's flattened local tensor. The local tensor is the slice of the full tensor that its
``cuts`` describe (see ``mesh.slices.ShardSpec``). Readers assemble any other slice from pieces, so a checkpoint has no
layout of its own.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from megalm.mesh.slices import Cut, ShardSpec, uncovered

WEIGHT = "weight"
"""The kind of piece that is a parameter's master, or the parameter itself where it is not trained."""
BUFFER = "buffer"
"""The kind of piece that is state of the model and no parameter. All other kinds are state of the optimizer."""
BYTES_PER_ELEMENT = 4
"""All that is stored is fp32."""
RANKS_PER_FOLDER = 256
"""Ranks whose files lie in one folder: file systems are slow with a folder of 16,384."""


class Piece(NamedTuple):
    """A run of a flattened local tensor, and where it is stored.

    Attributes:
        kind: ``weight`` (fp32 master), ``exp_avg`` or ``exp_avg_sq`` (moments of Adam), ``buffer``.
        file: safetensors file, by its path in the checkpoint's folder.
        key: name of the stored tensor in that file.
        cuts: what the local tensor keeps of the full one, by dim; none: the local tensor is the full one.
        flat_start: first element in the flattened local tensor.
        length: number of elements.
        dtype: torch's name, such as ``float32``.
        sha256: of the stored bytes.
    """

    kind: str
    file: str
    key: str
    cuts: tuple[Cut, ...]
    flat_start: int
    length: int
    dtype: str
    sha256: str


@dataclass(frozen=True)
class TensorRecord:
    """One full tensor.

    Attributes:
        shape: without padding.
        pieces: of every kind.
        fingerprint: hash of the weight that no layout changes (see ``fingerprint.py``), as 16 hexadecimal digits; None
            where the format's version has none.
        trainable: whether the run trained it; if not, there is no state of an optimizer.
        of_moments: the same hash of each moment, by kind; empty where the format's version has none.
    """

    shape: tuple[int, ...]
    pieces: Sequence[Piece]
    fingerprint: str | None = None
    trainable: bool = True
    of_moments: Mapping[str, str] = field(default_factory=dict)

    def fingerprint_of(self, kind: str) -> str | None:
        """The hash of what a kind of piece adds up to; None where the checkpoint has none."""
        return self.fingerprint if kind in (WEIGHT, BUFFER) else self.of_moments.get(kind)

    def of_kind(self, kind: str) -> dict[ShardSpec, list[Piece]]:
        """Pieces of one kind by the local tensor they are runs of, each list in order."""
        found: dict[tuple[Cut, ...], list[Piece]] = defaultdict(list)
        for piece in self.pieces:
            if piece.kind == kind:
                found[piece.cuts].append(piece)
        return {
            ShardSpec(self.shape, cuts): sorted(pieces, key=lambda p: p.flat_start) for cuts, pieces in found.items()
        }

    def holes(self, kind: str) -> str | None:
        """Which part of the full tensor no piece of a kind covers, in words; None where all is covered.

        The time is that of sorting the pieces.
        """
        slices = self.of_kind(kind)
        for shard, pieces in slices.items():
            end = 0
            saved = shard.saved.local_numel
            for start, stop in [*((p.flat_start, p.flat_start + p.length) for p in pieces), (saved, saved)]:
                if start > end:
                    return f"elements {end} to {start} of the slice {shard}"
                end = max(end, stop)
        return uncovered(self.shape, list(slices))


def rank_file(rank: int, ending: str = "safetensors") -> str:
    """A rank's file, by its path in the checkpoint's folder: the first ranks' lie there, each further 256 in a folder.

    A function of the rank alone, so that a file is found whatever the number of ranks was.
    """
    name = f"rank-{rank:05d}.{ending}"
    first = rank // RANKS_PER_FOLDER * RANKS_PER_FOLDER
    return f"{_folder_name(first)}/{name}" if first else name


def rank_folders(world_size: int) -> list[tuple[str, range]]:
    """(path in the checkpoint's folder, ranks whose files lie there) of every folder; the first one is ``.``."""
    firsts = range(0, world_size, RANKS_PER_FOLDER)
    return [
        (_folder_name(first) if first else ".", range(first, min(first + RANKS_PER_FOLDER, world_size)))
        for first in firsts
    ]


def key_of(kind: str, name: str, flat_start: int = 0, *, first: int = 0) -> str:
    """Name of a stored tensor in a rank's file; ``first`` is where the first of the rank's runs of it begins."""
    return f"{kind}/{name}" if flat_start == first else f"{kind}/{name}@{flat_start}"


def _folder_name(first: int) -> str:
    return f"ranks-{first:05d}"
