"""Which slice of which full parameter a rank holds, and how the full parameter is initialised.

One declaration per parameter is the single source for initialisation, gradient norm, checkpoint and conversion. Full
parameters are described without padding: a vocabulary of 50,257 words on tp=4 has 50,257 rows here, and the last rank's
local tensor has ``padding`` rows more, which are zero, never trained and never saved.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from math import prod

import torch
from torch import Tensor, nn


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
class ShardSpec:
    """A rank's slice of a full parameter: the ``ranges`` along ``dim``, concatenated in order, then ``padding`` rows.

    A fused query-key-value weight has three ranges (its heads of each), a plain column- or row-parallel weight one, a
    replicated parameter ``dim=None`` and no ranges.
    """

    full_shape: tuple[int, ...]
    dim: int | None = None
    ranges: tuple[tuple[int, int], ...] = ()
    padding: int = 0

    def __post_init__(self) -> None:
        if self.dim is None:
            if self.ranges or self.padding:
                raise ValueError("a replicated parameter has neither ranges nor padding")
            return
        if not 0 <= self.dim < len(self.full_shape):
            raise ValueError(f"dim={self.dim}: shape {self.full_shape} has {len(self.full_shape)} dims")
        for start, stop in self.ranges:
            if not 0 <= start <= stop <= self.full_shape[self.dim]:
                raise ValueError(f"range {start}:{stop} is outside 0:{self.full_shape[self.dim]}")

    @classmethod
    def replicated(cls, *full_shape: int) -> ShardSpec:
        """Every tensor-parallel rank holds all of it."""
        return cls(full_shape)

    @property
    def is_sharded(self) -> bool:
        """Whether tensor-parallel ranks hold different slices."""
        return self.dim is not None

    @property
    def local_size(self) -> int:
        """Rows along ``dim`` that hold values (padding excluded)."""
        return sum(stop - start for start, stop in self.ranges)

    @property
    def local_shape(self) -> tuple[int, ...]:
        """Shape of the tensor that the rank allocates (padding included)."""
        if self.dim is None:
            return self.full_shape
        return self._with_dim(self.local_size + self.padding)

    @property
    def local_numel(self) -> int:
        """Elements of the local tensor, padding included."""
        return prod(self.local_shape)

    def take(self, full: Tensor) -> Tensor:
        """The local tensor cut from a full one, ``full_shape`` ▶ ``local_shape``; always a new, contiguous tensor."""
        if tuple(full.shape) != self.full_shape:
            raise ValueError(f"full tensor has shape {tuple(full.shape)}, expected {self.full_shape}")
        if self.dim is None:
            return full.clone(memory_format=torch.contiguous_format)
        local = full.new_zeros(self.local_shape)
        for source, target in self._slices():
            local[target] = full[source]
        return local

    def put(self, local: Tensor, full: Tensor) -> None:
        """Write a local tensor to its place in a full one, dropping padding; the inverse of :meth:`take`."""
        if tuple(local.shape) != self.local_shape or tuple(full.shape) != self.full_shape:
            raise ValueError(
                f"local {tuple(local.shape)}, full {tuple(full.shape)}; expected {self.local_shape}, {self.full_shape}"
            )
        if self.dim is None:
            full.copy_(local)
            return
        for target, source in self._slices():
            full[target] = local[source]

    def runs(self, flat_start: int, length: int) -> Iterator[Rows]:
        """Where ``length`` elements from ``flat_start`` on of the flattened local tensor lie in the full one.

        ZeRO cuts a flattened local tensor anywhere, so what it cuts is no rectangle; it is a few of them. Padding is
        left out.
        """
        if self.dim is None:
            if length:
                yield Rows(1, length, 0, 0, flat_start, 0)
            return
        inner = prod(self.full_shape[self.dim + 1 :])
        local_row = (self.local_size + self.padding) * inner
        full_row = self.full_shape[self.dim] * inner
        stop = flat_start + length
        at = flat_start
        while at < stop:
            outer, low = divmod(at, local_row)
            # Whole rows go together; a row that begins or ends inside the run goes alone.
            rows = (stop - at) // local_row if low == 0 and stop - at >= local_row else 1
            high = min(local_row, low + stop - at)
            for (start, end), offset in zip(self.ranges, self._offsets(), strict=True):
                first, last = max(low, offset * inner), min(high, (offset + end - start) * inner)
                if first < last:
                    yield Rows(
                        rows=rows,
                        width=last - first,
                        local_start=outer * local_row + first - flat_start,
                        local_stride=local_row,
                        full_start=outer * full_row + start * inner + first - offset * inner,
                        full_stride=full_row,
                    )
            at += (rows - 1) * local_row + high - low

    def _offsets(self) -> list[int]:
        """Where each range begins in the local tensor, along ``dim``."""
        return [sum(stop - start for start, stop in self.ranges[:number]) for number in range(len(self.ranges))]

    def _slices(self) -> Iterator[tuple[tuple[slice, ...], tuple[slice, ...]]]:
        """Pairs (place in the full tensor, place in the local tensor), one per range."""
        assert self.dim is not None
        before = (slice(None),) * self.dim
        offset = 0
        for start, stop in self.ranges:
            yield (*before, slice(start, stop)), (*before, slice(offset, offset + stop - start))
            offset += stop - start

    def _with_dim(self, size: int) -> tuple[int, ...]:
        assert self.dim is not None
        return (*self.full_shape[: self.dim], size, *self.full_shape[self.dim + 1 :])


def even_range(size: int, rank: int, degree: int) -> tuple[int, int]:
    """This rank's share of ``size`` items that ``degree`` divides."""
    if size % degree:
        raise ValueError(f"{size} items do not split evenly over {degree} ranks")
    share = size // degree
    return rank * share, (rank + 1) * share


def padded_range(size: int, rank: int, degree: int) -> tuple[tuple[int, int], int]:
    """This rank's share of ``size`` items rounded up to a multiple of ``degree``: its true range, and its padding."""
    share = -(-size // degree)
    start, stop = min(rank * share, size), min((rank + 1) * share, size)
    return (start, stop), share - (stop - start)


@dataclass(frozen=True)
class Init:
    """How a full parameter is filled: ``normal`` with a standard deviation, or a ``constant``."""

    kind: str
    value: float

    @classmethod
    def normal(cls, std: float) -> Init:
        """Zero-mean Gaussian."""
        return cls("normal", std)

    @classmethod
    def constant(cls, value: float) -> Init:
        """One value everywhere."""
        return cls("constant", value)


@dataclass(frozen=True)
class Declaration:
    """What a module says about one of its parameters.

    Attributes:
        shard: the slice that this rank holds.
        init: how it starts.
        partial: every tensor-parallel rank holds the same values, but sees only a part of their gradient (its share of
            the sequence, or of the heads): the engine adds the parts.
    """

    shard: ShardSpec
    init: Init
    partial: bool = False

    @property
    def decays(self) -> bool:
        """Weight decay applies to matrices; norms and biases are spared (Brown et al. 2020, GPT-2)."""
        return len(self.shard.full_shape) > 1


class ParallelModule(nn.Module):
    """A module that declares every parameter it owns, instead of creating it by hand."""

    declarations: dict[str, Declaration]

    def __init__(self) -> None:
        super().__init__()
        self.declarations = {}

    def declare(self, name: str, shard: ShardSpec, init: Init, *, partial: bool = False) -> nn.Parameter:
        """Create and register the local tensor of a parameter; its values come later, from ``random.initialise``."""
        parameter = nn.Parameter(torch.zeros(shard.local_shape))
        self.register_parameter(name, parameter)
        self.declarations[name] = Declaration(shard, init, partial)
        return parameter


@dataclass(frozen=True)
class DeclaredParameter:
    """One parameter of a model: its layout-independent name, what was declared of it, and the local tensor."""

    name: str
    declaration: Declaration = field(repr=False)
    parameter: nn.Parameter = field(repr=False)

    @property
    def shard(self) -> ShardSpec:
        """The slice that this rank holds."""
        return self.declaration.shard


def declared_parameters(module: nn.Module) -> list[DeclaredParameter]:
    """Every parameter below ``module``, in registration order; a parameter that no module declared is an error."""
    found = []
    for prefix, child in module.named_modules():
        for name, parameter in child.named_parameters(recurse=False):
            full_name = f"{prefix}.{name}" if prefix else name
            declarations = getattr(child, "declarations", {})
            if name not in declarations:
                raise TypeError(f"{full_name}: {type(child).__name__} holds a parameter that it does not declare")
            found.append(DeclaredParameter(full_name, declarations[name], parameter))
    return found


@dataclass(frozen=True)
class StatePiece:
    """A contiguous run of one parameter's flattened local tensor, in the possession of this rank.

    ZeRO cuts the flattened local tensor without regard to rows, so a piece is described by the slice of the full
    parameter that the local tensor is (``shard``), where in the flattened local tensor it begins, and its values.

    Attributes:
        name: layout-independent name of the parameter.
        kind: ``weight`` (fp32 master), ``exp_avg`` or ``exp_avg_sq`` (Adam moments).
        shard: what the local tensor is of the full parameter.
        flat_start: offset of the first element in the flattened local tensor (padding included).
        values: one-dimensional fp32 tensor; the live storage of the optimizer, not a copy.
    """

    name: str
    kind: str
    shard: ShardSpec
    flat_start: int
    values: Tensor = field(repr=False)
