"""Tensors between a source and a target: cast, checked for NaN, counted, and few in memory at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from math import prod
from threading import Condition, Lock

import torch
from torch import Tensor

from megalm.convert.checks import is_finite
from megalm.convert.weights import WeightSource, full_shapes
from megalm.core.dtype import DTYPE_NAMES
from megalm.errors import CheckpointError

Progress = Callable[[int], object]
"""Called with the bytes processed since the last call."""


class Transfer(WeightSource):
    """The view of a source that targets read from. Safe to use from several threads.

    Args:
        source: what is converted.
        dtype: what its weights are cast to.
        progress: called for each tensor when it is read for the first time.
    """

    def __init__(self, source: WeightSource, dtype: torch.dtype, *, progress: Progress = lambda _: None) -> None:
        self.info = replace(source.info, dtype=dtype)
        self.shapes = full_shapes(source.info.model)
        self.warnings: list[str] = []
        self.progress = progress
        self._source = source
        self._budget = _Budget(max(map(self.nbytes, self.shapes)))
        self._seen: set[str] = set()
        self._lock = Lock()
        self._cancelled = False

    @property
    def total_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(map(self.nbytes, self.shapes))

    def nbytes(self, name: str) -> int:
        """Bytes of one tensor, in the longer of its two dtypes."""
        return prod(self.shapes[name]) * max(self.info.dtype.itemsize, 4)

    def cancel(self) -> None:
        """Make every further read fail."""
        self._cancelled = True
        self._budget.cancel()

    def is_cancelled(self) -> bool:
        """Whether the conversion was cancelled."""
        return self._cancelled

    def read(self, name: str) -> Tensor:
        """One full tensor, cast; the first time, it is counted and a warning noted where it is not finite."""
        if self._cancelled:
            raise CheckpointError("cancelled")
        tensor = self._source.read(name)
        if tuple(tensor.shape) != self.shapes[name]:
            raise CheckpointError(f"{name}: shape {list(tensor.shape)}, expected {list(self.shapes[name])}")
        cast = tensor.to(self.info.dtype)
        with self._lock:
            is_new = name not in self._seen
            self._seen.add(name)
        if is_new:
            if not is_finite(cast):
                self._warn(name, was_finite=is_finite(tensor))
            self.progress(self.nbytes(name))
        return cast

    @contextmanager
    def hold(self, name: str) -> Iterator[Tensor]:
        """One full tensor, as :meth:`read`; what is held at any time is at most as large as the largest tensor."""
        with self._budget.take(self.nbytes(name)):
            yield self.read(name)

    def close(self) -> None:
        """Close the source."""
        self._source.close()

    def _warn(self, name: str, *, was_finite: bool) -> None:
        dtype = DTYPE_NAMES[self.info.dtype]
        text = f"{name}: holds numbers too large for {dtype}" if was_finite else f"{name}: holds NaN or infinity"
        with self._lock:
            self.warnings.append(text)


class _Budget:
    """Bytes that several threads share; a thread waits until there are enough."""

    def __init__(self, limit: int) -> None:
        self._left = self._limit = limit
        self._changed = Condition()
        self._cancelled = False

    @contextmanager
    def take(self, size: int) -> Iterator[None]:
        """Hold ``size`` bytes, or all there are where that is less."""
        size = min(size, self._limit)
        with self._changed:
            self._changed.wait_for(lambda: self._cancelled or self._left >= size)
            if self._cancelled:
                raise CheckpointError("cancelled")
            self._left -= size
        try:
            yield
        finally:
            with self._changed:
                self._left += size
                self._changed.notify_all()

    def cancel(self) -> None:
        """Make every waiting thread fail."""
        with self._changed:
            self._cancelled = True
            self._changed.notify_all()
