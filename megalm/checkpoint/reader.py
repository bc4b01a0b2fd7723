"""Reads any slice of any tensor of a checkpoint, whatever layout wrote it.

Tensors are assembled one at a time from the pieces that overlap what is asked for: memory is bounded by what is asked
for, one full tensor and one piece. Every piece's sha256 is checked as it is read.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from megalm.checkpoint.fingerprint import fingerprint
from megalm.checkpoint.manifest import BUFFER, WEIGHT, Manifest, Piece, TensorRecord, read_manifest
from megalm.checkpoint.tensor_file import as_bytes
from megalm.core.parameters import StatePiece
from megalm.errors import CheckpointError
from megalm.mesh.slices import ShardSpec


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

        It may be a view of a mapped file, which is not to be written to.

        Raises:
            CheckpointError: the tensor is missing, has holes, another shape, or damaged bytes.
        """
        return self.read_flat(name, kind, shard, 0, shard.local_numel).view(shard.local_shape)

    def read_into(self, local: Tensor, name: str, kind: str, shard: ShardSpec) -> None:
        """Fill the local tensor that ``shard`` describes, in whatever dtype; no copy of it is made on the way.

        Raises:
            CheckpointError: as for :meth:`read_local`.
        """
        record = self._record(name, kind, shard)
        full = None if shard.is_whole else self._whole(record, kind)
        if full is not None:
            local.zero_()
            shard.take_into(local, full)
        else:
            local.copy_(self.read_local(name, kind, shard))

    def read_flat(self, name: str, kind: str, shard: ShardSpec, flat_start: int, length: int) -> Tensor:
        """``length`` elements from ``flat_start`` on of the flattened local tensor that ``shard`` describes.

        Raises:
            CheckpointError: as for :meth:`read_local`.
        """
        record = self._record(name, kind, shard)
        slices = record.of_kind(kind)
        if same := slices.get(shard):
            return self._from_same_slice(name, kind, same, flat_start, length)
        if hole := record.holes(kind):
            raise CheckpointError(f"{self.path}: {name}: {kind} is incomplete: {hole}")
        full = self._whole(record, kind)
        if full is None:
            full = torch.empty(record.shape)
            wanted = _extent(shard, flat_start, length)
            for source, pieces in slices.items():
                for piece in pieces:
                    if _overlap(wanted, _extent(source, piece.flat_start, piece.length)):
                        values = self._read(piece)
                        for rows in source.runs(piece.flat_start, piece.length):
                            rows.of_full(full.view(-1)).copy_(rows.of_local(values))
        local = shard.take(full) if shard.is_sharded else full
        return local.view(-1)[flat_start : flat_start + length]

    def _whole(self, record: TensorRecord, kind: str) -> Tensor | None:
        """A full tensor as it lies in a file, where one piece is all of it; not to be written to."""
        for source, pieces in record.of_kind(kind).items():
            if source.is_whole and len(pieces) == 1:
                return self._read(pieces[0]).view(record.shape)
        return None

    def _from_same_slice(self, name: str, kind: str, pieces: list[Piece], flat_start: int, length: int) -> Tensor:
        """A run of the very slice that these are runs of, in order."""
        stop = flat_start + length
        local: Tensor | None = None
        end = flat_start
        for piece in pieces:
            first, last = max(piece.flat_start, flat_start), min(piece.flat_start + piece.length, stop)
            if first > end:
                break
            if last <= end:
                continue
            values = self._read(piece)[first - piece.flat_start : last - piece.flat_start]
            if local is None and (first, last) == (flat_start, stop):
                return values  # one piece has it all: no copy
            local = torch.empty(length) if local is None else local
            local[first - flat_start : last - flat_start] = values
            end = last
        if end < stop:
            raise CheckpointError(f"{self.path}: {name}: {kind} is incomplete from element {end} on")
        return torch.empty(0) if local is None else local

    def saved_part(self, piece: StatePiece) -> StatePiece:
        """What of a piece of the loaded model the checkpoint has: all of it, in a model of the same shape."""
        return piece

    def find_corruption(self) -> Iterator[str]:
        """Read everything and describe each damaged file or tensor."""
        for name, record in self.manifest.tensors.items():
            for kind in sorted({piece.kind for piece in record.pieces}):
                if hole := record.holes(kind):
                    yield f"{name}: {kind} is incomplete: {hole}"
            shares = 0
            damaged = False
            for piece in record.pieces:
                try:
                    values = self._read(piece)
                except CheckpointError as error:
                    damaged = True
                    yield str(error)
                    continue
                if piece.kind in (WEIGHT, BUFFER):
                    source = ShardSpec(record.shape, piece.cuts)
                    shares += fingerprint(name, source, piece.flat_start, values)
            if record.fingerprint is not None and not damaged and f"{shares % (1 << 64):016x}" != record.fingerprint:
                yield f"{self.path}: {name}: its pieces are whole, but together not the tensor that was saved"

    def _record(self, name: str, kind: str, shard: ShardSpec) -> TensorRecord:
        if not self.has(name, kind):
            raise CheckpointError(f"{self.path}: {name}: no {kind} in the checkpoint")
        self.check_parameters({name: shard.full_shape})
        return self.manifest.tensors[name]

    def _read(self, piece: Piece) -> Tensor:
        path = self.path / piece.file
        try:
            # Opened anew for each piece: pages of a mapping count as this process's memory as long as it lasts.
            with safe_open(path, framework="pt", device="cpu") as file:
                tensor: Tensor = file.get_tensor(piece.key)
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{path}: {piece.key} cannot be read: {error}") from None
        if tensor.shape != (piece.length,) or tensor.dtype is not torch.float32 or piece.dtype != "float32":
            raise CheckpointError(
                f"{path}: {piece.key} is {list(tensor.shape)} {tensor.dtype}, the manifest says [{piece.length}] "
                f"{piece.dtype}"
            )
        if hashlib.sha256(as_bytes(tensor)).hexdigest() != piece.sha256:
            raise CheckpointError(f"{path}: {piece.key} is corrupt: its sha256 is not the manifest's")
        return tensor


Extent = tuple[tuple[int, int], ...]
"""Stretches of a flattened full tensor."""


def _extent(shard: ShardSpec, flat_start: int, length: int) -> Extent:
    """Where a run of a local tensor lies in the full one: all of it and, under strides, what is between."""
    return tuple((rows.full_start, rows.full_stop) for rows in shard.runs(flat_start, length))


def _overlap(one: Extent, other: Extent) -> bool:
    return any(a < d and c < b for a, b in one for c, d in other)
