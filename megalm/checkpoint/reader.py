"""Reads any slice of any tensor of a checkpoint, whatever layout wrote it.

Tensors are assembled one at a time from the pieces that overlap what is asked for: memory is bounded by what is asked
for and one piece. The sha256 of every piece that is read whole is checked.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from megalm.checkpoint.fingerprint import fingerprint
from megalm.checkpoint.manifest import Manifest, read_manifest
from megalm.checkpoint.pieces import DIGESTS, Piece, TensorRecord
from megalm.checkpoint.reads import PieceRead, plan_reads, reads_in_part
from megalm.checkpoint.tensor_file import as_bytes
from megalm.core.parameters import StatePiece
from megalm.errors import CheckpointError
from megalm.mesh.slices import ShardSpec


@dataclass
class ReadCount:
    """What a reader has read of tensors.

    Attributes:
        nbytes: of elements that were read.
        pieces: reads of a piece, in part or whole.
    """

    nbytes: int = 0
    pieces: int = 0


class CheckpointReader:
    """A complete checkpoint, opened for reading.

    Args:
        path: the checkpoint's folder.
        manifest: of the checkpoint, where it was read already.
        is_proven: whether all ranks together compare what they have loaded with the tensors' fingerprints. Of a piece
            that is needed in part then only that part is read, and its sha256 cannot be checked; else every piece is
            read whole, and checked.

    Attributes:
        count: what was read so far.

    Raises:
        CheckpointError: incomplete or damaged.
    """

    def __init__(self, path: Path, *, manifest: Manifest | None = None, is_proven: bool = False) -> None:
        self.path = path
        self.manifest: Manifest = read_manifest(path) if manifest is None else manifest
        self.count = ReadCount()
        self._is_proven = is_proven
        self._complete: set[tuple[str, str]] = set()

    def has(self, name: str, kind: str) -> bool:
        """Whether the checkpoint holds a kind of state of a parameter; moments are absent before the first step."""
        record = self.manifest.tensors.get(name)
        return record is not None and kind in record.kinds

    def check_parameters(self, full_shapes: Mapping[str, tuple[int, ...]], *, whole_model: bool = False) -> None:
        """Compare the parameters that this rank needs with what the checkpoint holds.

        Args:
            full_shapes: by name.
            whole_model: ``full_shapes`` is all of the model, so that nothing else may be in the checkpoint.

        Raises:
            CheckpointError: naming every parameter that is missing, too many, or of another shape.
        """
        saved = self.manifest.full_shapes
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
        self._check_complete(name, kind, record)
        in_part = self._is_proven and reads_in_part(record, kind)
        plan = plan_reads(record, kind, shard, flat_start, length, in_part=in_part)
        if len(plan) == 1 and _is_all(plan[0], length):
            (rows,) = plan[0].copies
            return self._values(plan[0])[rows.full_start : rows.full_stop]  # one piece has it all: no copy
        run = torch.zeros(length)
        for read in plan:
            values = self._values(read)
            for rows in read.copies:
                rows.of_local(run).copy_(rows.of_full(values))
        return run

    def _check_complete(self, name: str, kind: str, record: TensorRecord) -> None:
        """Refuse a tensor with holes; each is looked at once."""
        if (name, kind) not in self._complete:
            if hole := record.holes(kind):
                raise CheckpointError(f"{self.path}: {name}: {kind} is incomplete: {hole}")
            self._complete.add((name, kind))

    def _whole(self, record: TensorRecord, kind: str) -> Tensor | None:
        """A full tensor as it lies in a file, where one piece is all of it; not to be written to."""
        for source, pieces in record.of_kind(kind).items():
            if source.saved.is_whole and len(pieces) == 1:
                # Older checkpoints keep padding, which is the end.
                return self._read(pieces[0])[: source.saved.local_numel].view(record.shape)
        return None

    def saved_part(self, piece: StatePiece) -> StatePiece:
        """What of a piece of the loaded model the checkpoint has: all of it, in a model of the same shape."""
        return piece

    def find_corruption(self) -> Iterator[str]:
        """Read everything and describe each damaged file or tensor."""
        for name, record in self.manifest.tensors.items():
            for kind in sorted(record.kinds):
                if hole := record.holes(kind):
                    yield f"{name}: {kind} is incomplete: {hole}"
            shares: dict[str, int] = {}
            damaged = set()
            for piece in record.pieces:
                try:
                    values = self._read(piece)
                except CheckpointError as error:
                    damaged.add(piece.kind)
                    yield str(error)
                    continue
                if record.fingerprint_of(piece.kind) is not None:
                    source = ShardSpec(record.shape, piece.cuts)
                    shares[piece.kind] = shares.get(piece.kind, 0) + fingerprint(name, source, piece.flat_start, values)
            for kind, share in shares.items():
                if kind not in damaged and f"{share % (1 << 64):016x}" != record.fingerprint_of(kind):
                    yield (
                        f"{self.path}: {name}: its pieces of {kind} are whole, but together not the tensor that was "
                        "saved"
                    )

    def _record(self, name: str, kind: str, shard: ShardSpec) -> TensorRecord:
        if not self.has(name, kind):
            raise CheckpointError(f"{self.path}: {name}: no {kind} in the checkpoint")
        self.check_parameters({name: shard.full_shape})
        return self.manifest.tensors[name]

    def _values(self, read: PieceRead) -> Tensor:
        """A piece, of which only what is read may be looked at."""
        if read.is_whole:
            return self._read(read.piece)
        self._count(read.nbytes)
        return self._mapped(read.piece)

    def _read(self, piece: Piece) -> Tensor:
        """All of a piece, whose sha256 is right."""
        tensor = self._mapped(piece)
        self._count(tensor.nbytes)
        if hashlib.sha256(as_bytes(tensor)).hexdigest() != (piece.sha256 or self._sealed_sha256(piece)):
            raise CheckpointError(f"{self.path / piece.file}: {piece.key} is corrupt: its sha256 is not what was saved")
        return tensor

    def _sealed_sha256(self, piece: Piece) -> str:
        """What the file says of a piece, if what it says of its pieces is what the manifest vouches for."""
        path = self.path / piece.file
        try:
            with safe_open(path, framework="pt", device="cpu") as file:
                text = (file.metadata() or {}).get(DIGESTS, "")
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{path}: cannot be read: {error}") from None
        if hashlib.sha256(text.encode()).hexdigest() != piece.seal:
            raise CheckpointError(f"{path}: {piece.key} is corrupt: the sha256 in its file are not what was saved")
        digest: str = json.loads(text)[piece.key]
        return digest

    def _count(self, nbytes: int) -> None:
        self.count.nbytes += nbytes
        self.count.pieces += 1

    def _mapped(self, piece: Piece) -> Tensor:
        """A piece as a view of its file: what is not looked at is not read from the disk."""
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
        return tensor


def _is_all(read: PieceRead, length: int) -> bool:
    """Whether a read is a run as it lies in the piece, all of what is wanted."""
    return len(read.copies) == 1 and (read.copies[0].rows, read.copies[0].width) == (1, length)
