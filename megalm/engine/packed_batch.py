"""A replica's batch as one run of bytes: one copy to the device, one message to the ranks that did not read it.

A buffer begins with the number of units that carry loss in the batch; then come the arrays of the batch, one after the
other. What lies where follows from :class:`Layout`, which depends on the objective and the lengths of the run alone,
and from the number of rows, so that a rank that has read nothing can take a buffer apart.

Shapes: B rows, S sequence length.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from megalm.core.documents import document_places
from megalm.core.host import staging
from megalm.data.stream.batch import Batch

_ALIGNMENT = 64
"""Bytes; arrays begin at multiples of it, as torch's own do."""
_UNITS = np.dtype(np.float64)


@dataclass(frozen=True)
class Array:
    """One array of a batch.

    Attributes:
        name: unique in the batch.
        dtype: of its elements, as numpy names it.
        row: its shape without the rows.
    """

    name: str
    dtype: str
    row: tuple[int, ...]


@dataclass(frozen=True)
class Layout:
    """What a buffer holds, for any number of rows."""

    arrays: tuple[Array, ...]

    def nbytes(self, rows: int) -> int:
        """Length of a buffer."""
        *_, (_, end, _) = [*self._places(rows)]
        return end

    def _places(self, rows: int) -> Iterator[tuple[int, int, Array]]:
        """Where each array begins and where the next one may."""
        start = _ALIGNMENT
        for array in self.arrays:
            end = start + rows * prod(array.row) * np.dtype(array.dtype).itemsize
            end += -end % _ALIGNMENT
            yield start, end, array
            start = end

    def fill(self, buffer: NDArray[np.uint8], arrays: Mapping[str, NDArray[np.generic]], units: float) -> None:
        """Write a batch into a buffer."""
        buffer[: _UNITS.itemsize].view(_UNITS)[0] = units
        rows = len(next(iter(arrays.values())))
        for start, _, array in self._places(rows):
            size = rows * prod(array.row) * np.dtype(array.dtype).itemsize
            own = buffer[start : start + size].view(array.dtype).reshape(rows, *array.row)
            np.copyto(own, arrays[array.name])

    def views(self, buffer: Tensor, rows: int) -> PackedBatch:
        """The batch in a buffer, [nbytes] uint8 on any device; nothing is copied."""
        found = {}
        for start, _, array in self._places(rows):
            size = rows * prod(array.row) * np.dtype(array.dtype).itemsize
            part = buffer[start : start + size].view(_torch_dtype(array.dtype))
            found[array.name] = part.view(rows, *array.row)
        return PackedBatch(buffer[: _UNITS.itemsize].view(torch.float64)[0], found)


@dataclass(frozen=True)
class PackedBatch:
    """A batch on the device, views of one buffer.

    Attributes:
        units: how many units of it carry loss, a scalar in fp64.
        arrays: by name; see :func:`arrays_of`.
    """

    units: Tensor
    arrays: Mapping[str, Tensor]

    @property
    def rows(self) -> int:
        """B."""
        return len(self.arrays["tokens"])

    def group(self, name: str) -> dict[str, Tensor]:
        """The arrays ``name.*``, by what stands for the asterisk."""
        prefix = f"{name}."
        return {key.removeprefix(prefix): value for key, value in self.arrays.items() if key.startswith(prefix)}


def arrays_of(batch: Batch) -> dict[str, NDArray[np.generic]]:
    """What a device needs of a batch, [B, ...] each, by name."""
    arrays: dict[str, NDArray[np.generic]] = {
        "tokens": batch.tokens,
        "labels": batch.labels,
        "loss_mask": batch.loss_mask,
        "samples": batch.samples,
    }
    if batch.document_starts is not None:
        arrays["document_numbers"], arrays["within_documents"] = document_places(batch.document_starts)
    arrays |= {f"token_inputs.{name}": values for name, values in batch.token_inputs.items()}
    return arrays | {f"row_inputs.{name}": values for name, values in batch.row_inputs.items()}


def layout_of(batch: Batch) -> Layout:
    """The layout of a batch's arrays."""
    return _layout(arrays_of(batch))


def pack(batch: Batch, device: torch.device, layout: Layout) -> Tensor:
    """A batch in one buffer of host memory, [nbytes] uint8, from which it can be copied to ``device`` without a wait.

    Raises:
        ValueError: it has another layout.
    """
    arrays = arrays_of(batch)
    if (found := _layout(arrays)) != layout:
        raise ValueError(
            f"the objective's make_batch gave {found.arrays}, and of other rows {layout.arrays}: names, dtypes and "
            "shapes must not depend on the rows"
        )
    buffer = staging(layout.nbytes(len(batch.tokens)), device)
    layout.fill(buffer.numpy(), arrays, batch.loss_mask.sum(dtype=np.float64))
    return buffer


def _layout(arrays: Mapping[str, NDArray[np.generic]]) -> Layout:
    return Layout(tuple(Array(name, values.dtype.str, values.shape[1:]) for name, values in arrays.items()))


def _torch_dtype(name: str) -> torch.dtype:
    return torch.from_numpy(np.empty(0, dtype=name)).dtype
