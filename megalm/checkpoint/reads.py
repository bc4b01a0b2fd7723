"""Which bytes of a checkpoint a run of a local tensor is read from, whatever layout wrote it. Integers only; no torch.

The reader reads by these plans, and a dry run adds them up: what it says is what would be read.

Of a piece that is needed in part only that part is read, where the whole is proven otherwise: by the fingerprint of the
tensor that all ranks together have read. Rows that lie apart in a piece, as columns of a matrix do, are read with what
is between them: a disk reads no single rows of a few kilobytes.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from megalm.checkpoint.pieces import BYTES_PER_ELEMENT, Piece, TensorRecord
from megalm.mesh.parameter import StateRun
from megalm.mesh.slices import Rows, ShardSpec


@dataclass(frozen=True)
class PieceRead:
    """What is read of one piece.

    Attributes:
        piece: which.
        spans: elements of the piece that are read: (first, after the last), in order and apart.
        copies: where they go: ``local`` places are those of the run that is wanted, ``full`` places those of the piece.
    """

    piece: Piece
    spans: tuple[tuple[int, int], ...]
    copies: tuple[Rows, ...]

    @property
    def is_whole(self) -> bool:
        """Whether all of the piece is read, so that its sha256 can be checked."""
        return self.spans == ((0, self.piece.length),)

    @property
    def nbytes(self) -> int:
        """How much is read."""
        return BYTES_PER_ELEMENT * sum(stop - start for start, stop in self.spans)


def plan_reads(
    record: TensorRecord, kind: str, shard: ShardSpec, flat_start: int, length: int, *, in_part: bool
) -> list[PieceRead]:
    """What is read for ``length`` elements from ``flat_start`` on of the local tensor that ``shard`` describes.

    Args:
        record: the tensor, without holes.
        kind: of pieces.
        shard: the slice that is wanted.
        flat_start: of the run that is wanted.
        length: of the run that is wanted.
        in_part: whether a piece may be read in part; if not, each one that is needed is read whole.
    """
    slices = record.of_kind(kind)
    same = {source: pieces for source, pieces in slices.items() if source.saved == shard.saved}
    slices = same or slices
    wanted = list(shard.runs(flat_start, length))
    plan = []
    for source, pieces in slices.items():
        for piece in pieces:
            copies = tuple(_copies(piece, source, shard, flat_start, length, wanted))
            if copies:
                spans = _merged(_span(rows) for rows in copies) if in_part else ((0, piece.length),)
                plan.append(PieceRead(piece, spans, copies))
    return plan


def reads_in_part(record: TensorRecord, kind: str) -> bool:
    """Whether a fingerprint proves what is loaded, so that a piece may be read in part."""
    return record.fingerprint_of(kind) is not None


def bytes_to_read(saved: Mapping[str, TensorRecord], runs: Iterable[StateRun]) -> int:
    """Bytes that a rank reads of a checkpoint to fill the runs that it holds.

    Args:
        saved: the checkpoint's tensors, by name.
        runs: what the rank reads: see ``engine.resume.runs_of_rank``.
    """
    return sum(
        read.nbytes
        for run in runs
        for read in plan_reads(
            saved[run.name],
            run.kind,
            run.shard,
            run.flat_start,
            run.length,
            in_part=reads_in_part(saved[run.name], run.kind),
        )
    )


def _copies(
    piece: Piece, source: ShardSpec, shard: ShardSpec, flat_start: int, length: int, wanted: list[Rows]
) -> Iterator[Rows]:
    """Elements of the run that is wanted which lie in a piece."""
    if source.saved == shard.saved:  # padding is at the end of both, as far as they have any
        first = max(piece.flat_start, flat_start)
        stop = min(piece.flat_start + piece.length, flat_start + length)
        if first < stop:
            yield Rows(1, stop - first, first - flat_start, 0, first - piece.flat_start, 0)
        return
    for theirs in source.runs(piece.flat_start, piece.length):
        for mine in wanted:
            if mine.full_start < theirs.full_stop and theirs.full_start < mine.full_stop:
                yield from shared_rows(mine, theirs)


def shared_rows(one: Rows, other: Rows) -> Iterator[Rows]:
    """Elements of the full tensor that two runs share: ``local`` places are those of ``one``, ``full`` of ``other``."""
    if other.rows == 1:
        for row, rows, column, width in _inside(one, other.full_start, other.full_stop):
            full = one.full_start + row * one.full_stride + column
            local = one.local_start + row * one.local_stride + column
            yield Rows(
                rows, width, local, one.local_stride, other.local_start + full - other.full_start, one.full_stride
            )
    elif one.rows == 1:
        for found in shared_rows(other, one):
            yield _swapped(found)
    elif one.full_stride == other.full_stride:
        yield from _aligned(one, other)
    elif one.rows < other.rows:
        for row in range(one.rows):
            yield from shared_rows(_row(one, row), other)
    else:
        for row in range(other.rows):
            yield from shared_rows(one, _row(other, row))


def _inside(rows: Rows, start: int, stop: int) -> Iterator[tuple[int, int, int, int]]:
    """(first row, rows, first column, width) of what lies in ``start:stop`` of the full tensor."""
    stride = max(rows.full_stride, 1)
    # The rows that reach into the stretch, of which the first and the last may do so in part.
    low = max(0, (start - rows.full_start - rows.width) // stride + 1)
    high = min(rows.rows, -(-(stop - rows.full_start) // stride)) if rows.rows > 1 else 1
    partial: dict[int, tuple[int, int]] = {}
    for row in {low, high - 1} if low < high else ():
        begin = rows.full_start + row * rows.full_stride
        first, last = max(start, begin) - begin, min(stop, begin + rows.width) - begin
        if (first, last) != (0, rows.width):
            partial[row] = first, last
    for row, (first, last) in partial.items():
        if first < last:
            yield row, 1, first, last - first
    complete = range(low + (low in partial), high - (high - 1 in partial))
    if complete:
        yield complete.start, len(complete), 0, rows.width


def _aligned(one: Rows, other: Rows) -> Iterator[Rows]:
    """Of rows at one distance: each row of one meets the same two neighbours of the other."""
    stride = one.full_stride
    apart, shift = divmod(other.full_start - one.full_start, stride)
    # Row k of the other begins ``shift`` after row k + apart of the first, and ``stride - shift`` before the next one.
    for rows_apart, begin in ((apart, shift), (apart + 1, shift - stride)):
        first, last = max(0, begin), min(one.width, begin + other.width)
        low, high = max(0, rows_apart), min(one.rows, other.rows + rows_apart)
        if first < last and low < high:
            yield Rows(
                high - low,
                last - first,
                one.local_start + low * one.local_stride + first,
                one.local_stride,
                other.local_start + (low - rows_apart) * other.local_stride + first - begin,
                other.local_stride,
            )


def _row(rows: Rows, number: int) -> Rows:
    return Rows(
        1,
        rows.width,
        rows.local_start + number * rows.local_stride,
        0,
        rows.full_start + number * rows.full_stride,
        0,
    )


def _swapped(rows: Rows) -> Rows:
    return Rows(rows.rows, rows.width, rows.full_start, rows.full_stride, rows.local_start, rows.local_stride)


def _span(rows: Rows) -> tuple[int, int]:
    """Where rows lie in a piece, with what is between them."""
    return rows.full_start, rows.full_stop


def _merged(spans: Iterable[tuple[int, int]]) -> tuple[tuple[int, int], ...]:
    """Stretches that touch or overlap, as one."""
    merged: list[tuple[int, int]] = []
    for start, stop in sorted(spans):
        if merged and start <= merged[-1][1]:
            merged[-1] = merged[-1][0], max(stop, merged[-1][1])
        else:
            merged.append((start, stop))
    return tuple(merged)
