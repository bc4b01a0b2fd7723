"""How a manifest of version 5 writes pieces: a column for each of their fields, not an object for each piece. No torch.

A tensor's pieces of one layout have the same runs for weight and moments, so a run is written once with a sha256 for
each kind; the cuts are numbers in a table of the whole manifest, and a file is the number of the rank that wrote it
(see ``pieces.rank_file``):

    "cuts": [[], [[0, [[0, 6288]], 0]], …],                        each a list of [dim, ranges, padding]
    "tensors": {
    "embedding.weight": {"shape": [50257, 12288], "trainable": true, "fingerprints": {"weight": "91f0…", …}, "runs": [
        {"ranks": [0, 8], "cuts": [1, 1], "starts": [0, 603648], "lengths": [603648, 603648],
         "sha256": {"weight": "hexadecimal digits of all runs together", "exp_avg": …, "exp_avg_sq": …}}]},
    …}

A stored tensor's name in its file is ``KIND/NAME``, and ``KIND/NAME@START`` for all of a rank's runs of it but the
first.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, overload

from megalm.checkpoint.pieces import BUFFER, WEIGHT, Piece, TensorRecord, key_of, rank_file
from megalm.mesh.slices import Cut, ShardSpec

Cuts = tuple[Cut, ...]

_DIGITS = 64
"""Of a sha256."""
_HEXADECIMAL = re.compile(r"[0-9a-f]*")
_FINGERPRINT = re.compile(r"[0-9a-f]{16}")


@dataclass
class Runs:
    """Runs of one tensor that have the same kinds, as columns.

    Attributes:
        ranks: that wrote each.
        cuts: number of each one's cuts in the table.
        starts: first element in the flattened local tensor.
        lengths: elements.
        sha256: digits of all runs together, by kind.
    """

    ranks: list[int] = field(default_factory=list)
    cuts: list[int] = field(default_factory=list)
    starts: list[int] = field(default_factory=list)
    lengths: list[int] = field(default_factory=list)
    sha256: dict[str, str] = field(default_factory=dict)


class CutTable:
    """Numbers for the cuts that occur, each written once."""

    def __init__(self) -> None:
        self._numbers: dict[str, int] = {}
        self.fields: list[Any] = []

    def number(self, fields: list[Any]) -> int:
        """The number of cuts that are given as they are written."""
        number = self._numbers.setdefault(repr(fields), len(self.fields))
        if number == len(self.fields):
            self.fields.append(fields)
        return number


def cuts_to_fields(cuts: Cuts) -> list[Any]:
    """Cuts as they are written."""
    return [[cut.dim, [list(pair) for pair in cut.ranges], cut.padding] for cut in cuts]


def cuts_from_fields(fields: Any) -> Cuts:
    """Cuts as they were written.

    Raises:
        TypeError, ValueError: they are none.
    """
    cuts = tuple(Cut(dim, tuple((start, stop) for start, stop in ranges), padding) for dim, ranges, padding in fields)
    for cut in cuts:
        _check_counts([cut.dim, cut.padding, *(end for pair in cut.ranges for end in pair)], "a cut")
    return cuts


def is_fingerprint(text: object) -> bool:
    """Whether a text is 16 hexadecimal digits."""
    return isinstance(text, str) and _FINGERPRINT.fullmatch(text) is not None


def tensor_to_fields(
    shape: Sequence[int], fingerprints: dict[str, str], runs: Sequence[Runs], *, trainable: bool
) -> dict[str, Any]:
    """A tensor as it is written."""
    return {
        "shape": list(shape),
        "trainable": trainable,
        "fingerprints": fingerprints,
        "runs": [dict(vars(columns)) for columns in runs],
    }


def tensor_from_fields(name: str, fields: dict[str, Any], table: Sequence[Cuts], *, checked: bool) -> TensorRecord:
    """A tensor as it was written; its pieces are made when they are first asked for.

    Args:
        name: of the tensor.
        fields: JSON.
        table: the manifest's cuts.
        checked: whether another rank has checked the same text.

    Raises:
        KeyError, TypeError, ValueError: what does not fit.
    """
    shape, trainable, fingerprints = tuple(fields["shape"]), fields["trainable"], fields["fingerprints"]
    blocks = [Runs(**columns) for columns in fields["runs"]]
    if not checked:
        _check_counts(shape, "shape")
        if not isinstance(trainable, bool) or not all(map(is_fingerprint, fingerprints.values())):
            raise ValueError(f"trainable {trainable!r}, fingerprints {fingerprints!r}")
        for block in blocks:
            _check(block, table, shape)
    value = fingerprints.get(WEIGHT, fingerprints.get(BUFFER))
    moments = {kind: text for kind, text in fingerprints.items() if kind not in (WEIGHT, BUFFER)}
    pieces = LazyPieces(lambda: list(_pieces(name, blocks, table)))
    return TensorRecord(shape, pieces, value, trainable, moments)


class LazyPieces(Sequence[Piece]):
    """Pieces that are made when one is asked for: a rank reads a few tensors of many."""

    def __init__(self, make: Callable[[], list[Piece]]) -> None:
        self._make: Callable[[], list[Piece]] | None = make
        self._made: list[Piece] = []

    @overload
    def __getitem__(self, index: int) -> Piece: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Piece]: ...
    def __getitem__(self, index: int | slice) -> Piece | Sequence[Piece]:
        return self._all()[index]

    def __len__(self) -> int:
        return len(self._all())

    def __iter__(self) -> Iterator[Piece]:
        return iter(self._all())

    def _all(self) -> list[Piece]:
        if self._make is not None:
            self._made, self._make = self._make(), None
        return self._made


def _pieces(name: str, blocks: Sequence[Runs], table: Sequence[Cuts]) -> Iterator[Piece]:
    first = _first_starts(blocks)
    for runs in blocks:
        files = {rank: rank_file(rank) for rank in set(runs.ranks)}
        for kind, digits in runs.sha256.items():
            columns = zip(runs.ranks, runs.cuts, runs.starts, runs.lengths, strict=True)
            for number, (rank, cuts, start, length) in enumerate(columns):
                key = key_of(kind, name, start, first=first[kind, rank])
                digest = digits[_DIGITS * number : _DIGITS * (number + 1)]
                yield Piece(kind, files[rank], key, table[cuts], start, length, "float32", digest)


def _first_starts(blocks: Sequence[Runs]) -> dict[tuple[str, int], int]:
    """Where the first run of each kind begins that a rank has."""
    first: dict[tuple[str, int], int] = {}
    for runs in blocks:
        for kind in runs.sha256:
            for rank, start in zip(runs.ranks, runs.starts, strict=True):
                if first.setdefault((kind, rank), start) > start:
                    first[kind, rank] = start
    return first


def _check(runs: Runs, table: Sequence[Cuts], shape: tuple[int, ...]) -> None:
    columns = {name: getattr(runs, name) for name in ("ranks", "cuts", "starts", "lengths")}
    for name, column in columns.items():
        if len(column) != len(runs.ranks):
            raise ValueError(f"{len(column)} {name} of {len(runs.ranks)} runs")
        _check_counts(column, name)
    for kind, digits in runs.sha256.items():
        if len(digits) != _DIGITS * len(runs.ranks) or _HEXADECIMAL.fullmatch(digits) is None:
            raise ValueError(f"sha256 of {kind}: {len(digits)} characters for {len(runs.ranks)} runs")
    sizes = {number: ShardSpec(shape, table[number]).local_numel for number in set(runs.cuts)}
    for number, start, length in zip(runs.cuts, runs.starts, runs.lengths, strict=True):
        if start + length > sizes[number]:
            raise ValueError(f"elements {start} + {length} lie outside a slice of {sizes[number]}")


def _check_counts(values: Sequence[object], what: str) -> None:
    """Refuse what is no count; True is one to Python, and not here."""
    if not set(map(type, values)) <= {int} or min(values, default=0) < 0:  # type: ignore[type-var, operator]
        raise ValueError(f"{what}: {list(values)[:8]}: whole numbers from 0 on")
