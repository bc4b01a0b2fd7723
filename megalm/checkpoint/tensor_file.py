"""Writes a safetensors file tensor by tensor: in the memory of one tensor, where the library wants all of them at once.

The format is a little-endian 64-bit length, a JSON header of that length with dtype, shape and offsets of every tensor,
and the tensors' bytes. Files are read by the safetensors library, which validates the header.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from math import prod
from pathlib import Path
from types import TracebackType
from typing import Self

import torch
from torch import Tensor

_CHUNK_BYTES = 1 << 24
"""Bytes handed to the system at once."""

_FLUSH_BYTES = 1 << 27
"""Bytes after which a thread begins to flush, so that the disk is not idle until the last byte is handed over."""

_ALIGNMENT = 8
"""Where the first tensor begins, in bytes, as the library has it."""

DTYPE_NAMES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
"""What safetensors calls the dtypes of weights."""


@dataclass(frozen=True)
class TensorSpec:
    """A tensor that is to be written: its dtype and shape."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of its elements."""
        return prod(self.shape) * self.dtype.itemsize


class TensorFileWriter:
    """A safetensors file being written: every tensor is announced, then written in that order.

    Args:
        path: of the file, which is made anew.
        specs: the tensors by name, in the order in which they come.
        metadata: texts to go with them.

    As a context, it is closed and flushed to the disk on leaving; leaving before the last tensor is an error.
    """

    def __init__(
        self, path: Path, specs: Mapping[str, TensorSpec], *, metadata: Mapping[str, str] | None = None
    ) -> None:
        self.path = path
        self._left = list(specs.items())[::-1]
        self._specs = dict(specs)
        self._header = _header(specs, metadata)
        # Unbuffered: chunks are large, and a copy in between would only cost.
        self._file = path.open("wb", buffering=0)
        self._flusher = ThreadPoolExecutor(1, thread_name_prefix="flush")  # starts no thread before it is used
        self._flush: Future[None] = Future()
        self._flush.set_result(None)
        self._unflushed = 0
        self._write(self._header)

    def write(self, name: str, tensor: Tensor, *, stop: Callable[[], object] = lambda: None) -> None:
        """Write the next tensor, contiguous and on the CPU; ``stop`` is called between chunks, and may raise."""
        expected, spec = self._left.pop()
        if (name, TensorSpec(tensor.dtype, tuple(tensor.shape))) != (expected, spec):
            raise ValueError(
                f"{self.path}: {name} {tensor.dtype} {list(tensor.shape)} comes where {expected} {spec} is due"
            )
        self._write(as_bytes(tensor), stop)

    def replace_metadata(self, metadata: Mapping[str, str]) -> None:
        """Put other texts in the place of those that the file began with, together as long as they were."""
        header = _header(self._specs, metadata)
        if len(header) != len(self._header):
            raise ValueError(f"{self.path}: a header of {len(header)} bytes in the place of {len(self._header)}")
        try:
            os.pwrite(self._file.fileno(), header, 0)
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(self.path)) from None

    def close(self) -> None:
        """Flush to the disk and close."""
        if self._file.closed:
            return
        try:
            self._flush.result()  # the system tells of an error once, to whoever flushes first
            os.fsync(self._file.fileno())
        except OSError as error:  # where a file system learns late that it is full
            raise OSError(error.errno, error.strerror, str(self.path)) from None
        finally:
            self._release()

    def _release(self) -> None:
        """Give the descriptor back, which may be another file's at once: no flush may be left that would meet it."""
        self._flusher.shutdown()
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if error is not None:
            self._release()
            return
        self.close()
        if self._left:
            raise ValueError(f"{self.path}: {len(self._left)} tensors were announced and not written")

    def _write(self, data: bytes | memoryview, stop: Callable[[], object] = lambda: None) -> None:
        view = memoryview(data)
        try:
            while view:
                stop()
                written = self._file.write(view[:_CHUNK_BYTES])
                view = view[written:]
                self._flush_behind(written)
        except OSError as error:  # of a write, which knows no file's name
            raise OSError(error.errno, error.strerror, str(self.path)) from None

    def _flush_behind(self, written: int) -> None:
        """Begin to flush what was written, unless the flush before is not done yet."""
        self._unflushed += written
        if self._unflushed < _FLUSH_BYTES or not self._flush.done():
            return
        self._flush.result()
        self._unflushed = 0
        self._flush = self._flusher.submit(os.fsync, self._file.fileno())


def as_bytes(tensor: Tensor) -> memoryview:
    """The bytes of a contiguous CPU tensor, not copied."""
    return tensor.detach().reshape(-1).view(torch.uint8).numpy().data


def _header(specs: Mapping[str, TensorSpec], metadata: Mapping[str, str] | None) -> bytes:
    fields: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    offset = 0
    for name, spec in specs.items():
        fields[name] = {
            "dtype": DTYPE_NAMES[spec.dtype],
            "shape": list(spec.shape),
            "data_offsets": [offset, offset + spec.nbytes],
        }
        offset += spec.nbytes
    text = json.dumps(fields, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    return len(text).to_bytes(8, "little") + text
