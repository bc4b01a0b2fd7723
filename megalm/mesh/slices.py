"""Which slice of a full tensor a rank holds, over any of its dims. Integers only: no torch is imported.

A full tensor is described without padding: a vocabulary of 50,257 words has 50,257 rows here, and a rank's local tensor
may have ``padding`` rows more, which are zero, never trained and never saved.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import product
from math import prod
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

Ranges = tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Rows:
    """Equally long runs of elements at equal distances, in a run of a flattened local tensor and in the full tensor.

    Attributes:
        rows: how many.
        width: elements of each.
        local_start: offset of the first, from the beginning of the run of the local tensor.
        local_stride: elements from one to the next there.
        full_start: offset of the first in the flattened full tensor.
        full_stride: elements from one to the next there.
    """

    rows: int
    width: int
    local_start: int
    local_stride: int
    full_start: int
    full_stride: int

    def of_local(self, flat: Tensor) -> Tensor:
        """[rows, width], a view of the run of the local tensor."""
        return flat.as_strided(
            (self.rows, self.width), (self.local_stride, 1), flat.storage_offset() + self.local_start
        )

    def of_full(self, flat: Tensor) -> Tensor:
        """[rows, width], a view of the flattened full tensor."""
        return flat.as_strided((self.rows, self.width), (self.full_stride, 1), flat.storage_offset() + self.full_start)

    @property
    def full_stop(self) -> int:
        """End of the last one in the flattened full tensor."""
        return self.full_start + (self.rows - 1) * self.full_stride + self.width


@dataclass(frozen=True)
class Cut:
    """What a slice keeps along one dim: ``ranges`` of the full tensor, concatenated in order, then ``padding`` rows."""

    dim: int
    ranges: Ranges
    padding: int = 0

    @property
    def size(self) -> int:
        """Rows along the dim that hold values (padding excluded)."""
        return sum(stop - start for start, stop in self.ranges)

    def pairs(self) -> Iterator[tuple[tuple[int, int], int]]:
        """(range in the full tensor, where it begins in the local tensor) of each range."""
        offset = 0
        for start, stop in self.ranges:
            yield (start, stop), offset
            offset += stop - start


@dataclass(frozen=True)
class ShardSpec:
    """A rank's slice of a full tensor: along each dim that is cut, some ranges of it; along others all.

    A fused query-key-value weight is cut along dim 0 into three ranges (a rank's heads of each), a plain column- or
    row-parallel weight into one, an expert weight [experts, out, in] along dims 0 and 1. A replicated tensor has no
    cuts.
    """

    full_shape: tuple[int, ...]
    cuts: tuple[Cut, ...] = ()

    def __post_init__(self) -> None:
        dims = [cut.dim for cut in self.cuts]
        if dims != sorted(set(dims)):
            raise ValueError(f"cuts along dims {dims}: one for each dim, in ascending order")
        for cut in self.cuts:
            if not 0 <= cut.dim < len(self.full_shape):
                raise ValueError(f"dim={cut.dim}: shape {self.full_shape} has {len(self.full_shape)} dims")
            if cut.padding < 0:
                raise ValueError(f"padding={cut.padding}: at least 0")
            for start, stop in cut.ranges:
                if not 0 <= start <= stop <= self.full_shape[cut.dim]:
                    raise ValueError(f"range {start}:{stop} is outside 0:{self.full_shape[cut.dim]}")

    @classmethod
    def replicated(cls, *full_shape: int) -> ShardSpec:
        """All of the tensor."""
        return cls(full_shape)

    @classmethod
    def along(cls, full_shape: tuple[int, ...], dim: int, ranges: Ranges, padding: int = 0) -> ShardSpec:
        """Cut along one dim."""
        return cls(full_shape, (Cut(dim, ranges, padding),))

    @property
    def is_sharded(self) -> bool:
        """Whether any dim is cut; a cut that keeps everything, as on one rank, counts."""
        return bool(self.cuts)

    @property
    def is_whole(self) -> bool:
        """Whether the local tensor is the full one: each cut keeps everything, in order, without padding."""
        return all(
            not cut.padding
            and [stop for _, stop in cut.ranges][-1:] == [self.full_shape[cut.dim]]
            and [start for start, _ in cut.ranges] == [0, *(stop for _, stop in cut.ranges[:-1])]
            for cut in self.cuts
        )

    @cached_property
    def local_shape(self) -> tuple[int, ...]:
        """Shape of the tensor that the rank allocates (padding included)."""
        sizes = {cut.dim: cut.size + cut.padding for cut in self.cuts}
        return tuple(sizes.get(dim, size) for dim, size in enumerate(self.full_shape))

    @cached_property
    def saved(self) -> ShardSpec:
        """What a checkpoint keeps of the slice: all but padding along dim 0, the end of the flattened local tensor."""
        if not self.cuts or self.cuts[0].dim or not self.cuts[0].padding:
            return self
        return ShardSpec(self.full_shape, (replace(self.cuts[0], padding=0), *self.cuts[1:]))

    @property
    def local_numel(self) -> int:
        """Elements of the local tensor, padding included."""
        return prod(self.local_shape)

    @property
    def numel(self) -> int:
        """Elements of the local tensor that are part of the full one."""
        sizes = {cut.dim: cut.size for cut in self.cuts}
        return prod(sizes.get(dim, size) for dim, size in enumerate(self.full_shape))

    def blocks(self) -> Iterator[tuple[tuple[slice, ...], tuple[slice, ...]]]:
        """Pairs (place in the full tensor, place in the local tensor) of the blocks that the slice is made of."""
        for chosen in product(*(cut.pairs() for cut in self.cuts)):
            full, local = [slice(None)] * len(self.full_shape), [slice(None)] * len(self.full_shape)
            for cut, ((start, stop), offset) in zip(self.cuts, chosen, strict=True):
                full[cut.dim], local[cut.dim] = slice(start, stop), slice(offset, offset + stop - start)
            yield tuple(full), tuple(local)

    def take(self, full: Tensor) -> Tensor:
        """The local tensor cut from a full one, ``full_shape`` ▶ ``local_shape``; always a new, contiguous tensor."""
        local = full.new_zeros(self.local_shape)
        self.take_into(local, full)
        return local

    def take_into(self, local: Tensor, full: Tensor) -> None:
        """Write the slice of a full tensor into a local one, whose padding stays as it is."""
        if tuple(full.shape) != self.full_shape:
            raise ValueError(f"full tensor has shape {tuple(full.shape)}, expected {self.full_shape}")
        for source, target in self.blocks():
            local[target] = full[source]

    def put(self, local: Tensor, full: Tensor) -> None:
        """Write a local tensor to its place in a full one, dropping padding; the inverse of :meth:`take`."""
        if tuple(local.shape) != self.local_shape or tuple(full.shape) != self.full_shape:
            raise ValueError(
                f"local {tuple(local.shape)}, full {tuple(full.shape)}; expected {self.local_shape}, {self.full_shape}"
            )
        for target, source in self.blocks():
            full[target] = local[source]

    def runs(self, flat_start: int, length: int) -> Iterator[Rows]:
        """Where ``length`` elements from ``flat_start`` on of the flattened local tensor lie in the full one.

        ZeRO cuts a flattened local tensor anywhere, so what it cuts is no rectangle; it is a few of them. Padding is
        left out.
        """
        if not length:
            return
        if not self.cuts:
            yield Rows(1, length, 0, 0, flat_start, 0)
            return
        # The last dim that is cut, and what is inside it, is a row; the dims before it are a smaller tensor of rows.
        cut = self.cuts[-1]
        outside = ShardSpec(self.full_shape[: cut.dim], self.cuts[:-1])
        inner = prod(self.full_shape[cut.dim + 1 :])
        local_row, full_row = self.local_shape[cut.dim] * inner, self.full_shape[cut.dim] * inner
        at, stop = flat_start, flat_start + length
        while at < stop:
            row, low = divmod(at, local_row)
            # Whole rows go together; a row that begins or ends inside the run goes alone.
            rows = (stop - at) // local_row if low == 0 and stop - at >= local_row else 1
            high = min(local_row, low + stop - at)
            for columns in _columns(cut, inner, low, high):
                for part in outside.runs(row, rows):
                    yield from _rows_of(part, row, columns, local_row, full_row, flat_start)
            at += (rows - 1) * local_row + high - low


def _columns(cut: Cut, inner: int, low: int, high: int) -> Iterator[tuple[int, int, int]]:
    """What ``low:high`` of a local row has of each range: (offset in the local row, offset in the full row, width)."""
    for (start, stop), offset in cut.pairs():
        first, last = max(low, offset * inner), min(high, (offset + stop - start) * inner)
        if first < last:
            yield first, start * inner + first - offset * inner, last - first


def _rows_of(
    part: Rows, first_row: int, columns: tuple[int, int, int], local_row: int, full_row: int, flat_start: int
) -> Iterator[Rows]:
    """The elements of a few rows, from the places of these rows among all rows."""
    local_offset, full_offset, width = columns
    for number in range(part.rows):
        local = first_row + part.local_start + number * part.local_stride
        full = part.full_start + number * part.full_stride
        yield Rows(
            rows=part.width,
            width=width,
            local_start=local * local_row + local_offset - flat_start,
            local_stride=local_row,
            full_start=full * full_row + full_offset,
            full_stride=full_row,
        )


def uncovered(full_shape: tuple[int, ...], slices: Sequence[ShardSpec]) -> str | None:
    """Which part of a full tensor none of some slices holds, in words; None where all is covered.

    Exact for any slices, also such as overlap: between two neighbouring ends of ranges all elements are alike, so one
    cell stands for them.
    """
    edges = [{0, size} for size in full_shape]
    for shard in slices:
        for cut in shard.cuts:
            edges[cut.dim].update(end for pair in cut.ranges for end in pair)
    cells = [sorted(found) for found in edges]
    number = [{edge: index for index, edge in enumerate(found)} for found in cells]
    covered: set[tuple[int, ...]] = set()
    for shard in slices:
        for full, _ in shard.blocks():
            spans = [
                range(number[dim][place.start or 0], number[dim][size if place.stop is None else place.stop])
                for dim, (place, size) in enumerate(zip(full, full_shape, strict=True))
            ]
            covered.update(product(*spans))
    if len(covered) == prod(len(found) - 1 for found in cells):
        return None
    missing = next(cell for cell in product(*(range(len(found) - 1) for found in cells)) if cell not in covered)
    places = [
        f"{cells[dim][index]}:{cells[dim][index + 1]}" if len(cells[dim]) > 2 else ":"
        for dim, index in enumerate(missing)
    ]
    return f"[{', '.join(places)}]"


def even_range(size: int, rank: int, degree: int) -> tuple[int, int]:
    """This rank's share of ``size`` items that ``degree`` divides."""
    if size % degree:
        raise ValueError(f"{size} items do not split evenly over {degree} ranks")
    share = size // degree
    return rank * share, (rank + 1) * share


def padded_range(size: int, rank: int, degree: int, multiple: int = 1) -> tuple[tuple[int, int], int]:
    """This rank's share of ``size`` items: its true range, and its padding up to what all ranks hold alike.

    All hold ``ceil(size / degree)`` items rounded up to a multiple. The true ranges do not depend on the multiple.
    """
    share = -(-size // degree)
    start, stop = min(rank * share, size), min((rank + 1) * share, size)
    return (start, stop), -(-share // multiple) * multiple - (stop - start)
