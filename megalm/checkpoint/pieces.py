"""The pieces that a full tensor is stored in, and the files that they lie in. No torch.

A *piece* is a run of one rank's flattened local tensor. The local tensor is the slice of the full tensor that its
``cuts`` describe (see ``mesh.slices.ShardSpec``). Readers assemble any other slice from pieces, so a checkpoint has no
layout of its own.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, overload

from megalm.mesh.slices import Cut, ShardSpec, uncovered

WEIGHT = "weight"
"""The kind of piece that is a parameter's master, or the parameter itself where it is not trained."""
BUFFER = "buffer"
"""The kind of piece that is state of the model and no parameter. All other kinds are state of the optimizer."""
BYTES_PER_ELEMENT = 4
"""All that is stored is fp32."""
FINGERPRINT_MODULUS = 1 << 64
"""Of a tensor's fingerprint, to which ranks' shares of it add up."""
SEAL_DIGITS = 64
"""Of a sha256."""
DIGESTS = "sha256"
"""Under which name a file's header says the sha256 of each of its tensors, as JSON."""
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
        sha256: of the stored bytes; empty where the file itself says it, under a seal.
        seal: sha256 of what the file says of its tensors' sha256.
    """

    kind: str
    file: str
    key: str
    cuts: tuple[Cut, ...]
    flat_start: int
    length: int
    dtype: str
    sha256: str
    seal: str = ""


Interval = tuple[tuple[Cut, ...], int, int]
"""A stretch of the flattened local tensor that some cuts describe: (cuts, first element, after the last)."""


class Stretch(NamedTuple):
    """Neighbours in a local tensor: equally long pieces of ranks at equal distances, one after the other.

    Attributes:
        cuts: as of :class:`Piece`.
        start: first element of the first piece.
        length: elements of each.
        rank: that wrote the first piece.
        step: from one rank to the next.
        members: pieces.
    """

    cuts: tuple[Cut, ...]
    start: int
    length: int
    rank: int
    step: int
    members: int


class StretchedPieces(Sequence[Piece]):
    """Pieces that are made when one is asked for: a rank reads a few tensors of many.

    Args:
        name: of the tensor.
        stretches: by kind.
        seals: of ranks' files, 64 digits each.
    """

    def __init__(self, name: str, stretches: Mapping[str, Sequence[Stretch]], seals: str) -> None:
        self._name, self._seals = name, seals
        self._stretches = stretches
        self._made: list[Piece] | None = None

    @overload
    def __getitem__(self, index: int) -> Piece: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Piece]: ...
    def __getitem__(self, index: int | slice) -> Piece | Sequence[Piece]:
        return self._all()[index]

    def __len__(self) -> int:
        return sum(stretch.members for stretches in self._stretches.values() for stretch in stretches)

    def __iter__(self) -> Iterator[Piece]:
        return iter(self._all())

    @property
    def are_made(self) -> bool:
        """Whether one was asked for."""
        return self._made is not None

    @property
    def kinds(self) -> set[str]:
        """Kinds of which there are pieces."""
        return set(self._stretches)

    def intervals(self, kind: str) -> list[Interval]:
        """What the pieces of a kind cover."""
        return [(s.cuts, s.start, s.start + s.length * s.members) for s in self._stretches.get(kind, ())]

    def _all(self) -> list[Piece]:
        if self._made is None:
            self._made = [piece for kind, stretches in self._stretches.items() for piece in self._of(kind, stretches)]
        return self._made

    def _of(self, kind: str, stretches: Sequence[Stretch]) -> Iterator[Piece]:
        runs = [
            (s.rank + number * s.step, s.cuts, s.start + number * s.length, s.length)
            for s in stretches
            for number in range(s.members)
        ]
        first: dict[int, int] = {}
        for rank, _, start, _ in runs:
            first[rank] = min(first.get(rank, start), start)
        for rank, cuts, start, length in runs:
            key = key_of(kind, self._name, start, first=first[rank])
            seal = self._seals[SEAL_DIGITS * rank : SEAL_DIGITS * (rank + 1)]
            yield Piece(kind, rank_file(rank), key, cuts, start, length, "float32", "", seal)


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

    @property
    def kinds(self) -> set[str]:
        """Kinds of which there are pieces."""
        if isinstance(self.pieces, StretchedPieces):
            return self.pieces.kinds
        return {piece.kind for piece in self.pieces}

    def intervals(self, kind: str) -> list[Interval]:
        """What the pieces of one kind cover."""
        if isinstance(self.pieces, StretchedPieces):
            return self.pieces.intervals(kind)
        return [(p.cuts, p.flat_start, p.flat_start + p.length) for p in self.pieces if p.kind == kind]

    def holes(self, kind: str) -> str | None:
        """Which part of the full tensor no piece of a kind covers, in words; None where all is covered.

        The time is that of sorting the intervals.
        """
        found: dict[tuple[Cut, ...], list[tuple[int, int]]] = defaultdict(list)
        for cuts, start, stop in self.intervals(kind):
            found[cuts].append((start, stop))
        slices = {ShardSpec(self.shape, cuts): intervals for cuts, intervals in found.items()}
        for shard, intervals in slices.items():
            end = 0
            for start, stop in [*sorted(intervals), (shard.saved.local_numel,) * 2]:
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
