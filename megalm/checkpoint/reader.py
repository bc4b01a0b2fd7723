"""Reads any slice of any tensor of a checkpoint, whatever layout wrote it.

Tensors are assembled one at a time: memory is bounded by one full tensor. Every piece's sha256 is checked as it is
read.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from megalm.checkpoint.manifest import Manifest, Piece, SliceKey, TensorRecord, read_manifest
from megalm.core.sharding import ShardSpec
from megalm.errors import CheckpointError


class CheckpointReader:
    """A complete checkpoint, opened for reading.

    Args:
        path: the checkpoint's folder.

    Raises:
        CheckpointError: incomplete or damaged.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.manifest: Manifest = read_manifest(path)
        self._files: dict[str, Any] = {}

    def has(self, name: str, kind: str) -> bool:
        """Whether the checkpoint holds a kind of state of a parameter; moments are absent before the first step."""
        record = self.manifest.tensors.get(name)
        return record is not None and any(piece.kind == kind for piece in record.pieces)

    def check_parameters(self, full_shapes: Mapping[str, tuple[int, ...]], *, whole_model: bool = False) -> None:
        """Compare the parameters that this rank needs with what the checkpoint holds.

        Args:
            full_shapes: by name.
            whole_model: ``full_shapes`` is all of the model, so that nothing else may be in the checkpoint.

        Raises:
            CheckpointError: naming every parameter that is missing, too many, or of another shape.
        """
        saved = {name: record.shape for name, record in self.manifest.tensors.items()}
        problems = [f"{name}: not in the checkpoint" for name in full_shapes if name not in saved]
        problems += [
            f"{name}: {list(saved[name])} in the checkpoint, {list(shape)} in the model"
            for name, shape in full_shapes.items()
            if name in saved and saved[name] != shape
        ]
        if whole_model:
            problems += [f"{name}: in the checkpoint, not in the model" for name in saved if name not in full_shapes]
        if problems:
            raise CheckpointError("\n".join(f"{self.path}: {problem}" for problem in problems))

    def read_local(self, name: str, kind: str, shard: ShardSpec) -> Tensor:
        """The local tensor that ``shard`` describes, padding zero; fp32, ``shard.local_shape``.

        Raises:
            CheckpointError: the tensor is missing, has holes, another shape, or damaged bytes.
        """
        record = self._record(name, kind, shard)
        wanted = (shard.dim, shard.ranges, shard.padding)
        slices = record.of_kind(kind)
        if wanted in slices:
            return self._assemble(name, kind, record, wanted, slices[wanted]).view(shard.local_shape)
        if hole := record.holes(kind):
            raise CheckpointError(f"{self.path}: {name}: {kind} is incomplete: {hole}")
        full = torch.empty(record.shape)
        for key, pieces in slices.items():
            source = ShardSpec(record.shape, *key)
            source.put(self._assemble(name, kind, record, key, pieces).view(source.local_shape), full)
        return shard.take(full)

    def read_flat(self, name: str, kind: str, shard: ShardSpec, flat_start: int, length: int) -> Tensor:
        """``length`` elements from ``flat_start`` on of the flattened local tensor that ``shard`` describes."""
        record = self._record(name, kind, shard)
        for piece in record.of_kind(kind).get((shard.dim, shard.ranges, shard.padding), ()):
            if piece.flat_start <= flat_start and flat_start + length <= piece.flat_start + piece.length:
                start = flat_start - piece.flat_start
                return self._read(piece)[start : start + length]
        return self.read_local(name, kind, shard).view(-1)[flat_start : flat_start + length]

    def find_corruption(self) -> Iterator[str]:
        """Read everything and describe each damaged file or tensor."""
        for name, record in self.manifest.tensors.items():
            for kind in sorted({piece.kind for piece in record.pieces}):
                if hole := record.holes(kind):
                    yield f"{name}: {kind} is incomplete: {hole}"
            for piece in record.pieces:
                try:
                    self._read(piece)
                except CheckpointError as error:
                    yield str(error)

    def _record(self, name: str, kind: str, shard: ShardSpec) -> TensorRecord:
        if not self.has(name, kind):
            raise CheckpointError(f"{self.path}: {name}: no {kind} in the checkpoint")
        self.check_parameters({name: shard.full_shape})
        return self.manifest.tensors[name]

    def _assemble(self, name: str, kind: str, record: TensorRecord, key: SliceKey, pieces: list[Piece]) -> Tensor:
        """A flattened local tensor from its runs."""
        local = torch.empty(ShardSpec(record.shape, *key).local_numel)
        end = 0
        for piece in pieces:
            if piece.flat_start > end:
                break
            local[piece.flat_start : piece.flat_start + piece.length] = self._read(piece)
            end = max(end, piece.flat_start + piece.length)
        if end < local.numel():
            raise CheckpointError(f"{self.path}: {name}: {kind} is incomplete from element {end} on")
        return local

    def _read(self, piece: Piece) -> Tensor:
        path = self.path / piece.file
        try:
            if piece.file not in self._files:
                self._files[piece.file] = safe_open(path, framework="pt", device="cpu")
            tensor: Tensor = self._files[piece.file].get_tensor(piece.key)
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{path}: {piece.key} cannot be read: {error}") from None
        if tensor.shape != (piece.length,) or tensor.dtype is not torch.float32 or piece.dtype != "float32":
            raise CheckpointError(
                f"{path}: {piece.key} is {list(tensor.shape)} {tensor.dtype}, the manifest says [{piece.length}] "
                f"{piece.dtype}"
            )
        if hashlib.sha256(tensor.numpy().data).hexdigest() != piece.sha256:
            raise CheckpointError(f"{path}: {piece.key} is corrupt: its sha256 is not the manifest's")
        return tensor
