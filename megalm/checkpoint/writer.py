"""Writes a checkpoint: every rank the pieces it holds, rank 0 the manifest; visible only when it is complete.

Ranks do not talk to each other here; they meet in the file system that they share:

1. every rank writes its pieces and an index of them into a temporary folder, and flushes both to the disk;
2. rank 0 waits for all indexes, proves that every element of every tensor is covered, writes the manifest and the
   completeness marker last, and renames the folder: the one operation by which the checkpoint comes into being.

A kill at any moment leaves the previous checkpoint untouched and the new one under its temporary name.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megalm.checkpoint.durable import flush
from megalm.checkpoint.fingerprint import fingerprint
from megalm.checkpoint.manifest import (
    BUFFER,
    COMPLETE_FILE,
    MANIFEST_FILE,
    WEIGHT,
    Manifest,
    Piece,
    TensorRecord,
    parse_piece,
)
from megalm.checkpoint.store import TEMPORARY_PREFIX, remove_folder, replaced_folder, step_folder
from megalm.checkpoint.tensor_file import TensorFileWriter, TensorSpec, as_bytes
from megalm.core.parameters import Recorded, StatePiece
from megalm.errors import CheckpointError
from megalm.version import __version__

CANCELLED = "cancelled"
"""The error of a rank that stopped because another one had failed."""

_SHORTEST_POLL, _LONGEST_POLL = 0.05, 1.0
"""Seconds between two looks for other ranks' indexes: a thousand ranks' file server is not asked without end."""


@dataclass(frozen=True)
class Header:
    """What a checkpoint says besides its tensors; see :class:`megalm.checkpoint.manifest.Manifest`."""

    step: int
    config: dict[str, Any]
    topology: dict[str, int]
    data: dict[str, Any]
    training: dict[str, Any]


@dataclass(frozen=True)
class PieceToWrite(Recorded):
    """A piece whose values are fetched when its turn comes, so that a writer holds one at a time.

    Attributes:
        record, kind, flat_start: as of :class:`megalm.core.parameters.StatePiece`.
        length: number of elements.
        load: gives the values: one-dimensional, fp32, contiguous, on the CPU.
    """

    kind: str
    flat_start: int
    length: int
    load: Callable[[], Tensor] = field(repr=False)

    @classmethod
    def of(cls, piece: StatePiece, values: Tensor | None = None) -> PieceToWrite:
        """A piece of a model that stands still until it is written; or ``values``, a copy of it."""

        def load() -> Tensor:
            found = (piece.values if values is None else values).detach().to("cpu")
            # Trained parameters have fp32 masters; frozen ones and buffers have the model's dtype, which fp32 includes.
            return (found if piece.record.trainable else found.to(torch.float32)).contiguous()

        return cls(piece.record, piece.kind, piece.flat_start, piece.values.numel(), load)

    @property
    def key(self) -> str:
        """Name of the stored tensor in its file."""
        return f"{self.kind}/{self.name}"


def temporary_folder(folder: Path, step: int, attempt: int | str) -> Path:
    """Where ranks write until a checkpoint is complete.

    ``attempt`` tells the saves of all lives of the run apart: what an earlier one left, or a rank that outlived it
    still writes, is not taken for this one's.
    """
    return folder / f"{TEMPORARY_PREFIX}{step_folder(step)}-{attempt}"


def write_rank(
    folder: Path, rank: int, pieces: Sequence[PieceToWrite], *, cancelled: Callable[[], bool] = lambda: False
) -> None:
    """Write one rank's pieces, one at a time, and the index of them.

    Args:
        folder: the temporary folder; made where it does not exist.
        rank: this rank.
        pieces: what it is to write.
        cancelled: asked before each of the writes that a piece takes.

    Raises:
        CheckpointError: a piece is not fp32, two have one key, or the save was cancelled.
        OSError: the disk is full or broken.
    """
    folder.mkdir(parents=True, exist_ok=True)
    file = _rank_file(rank)
    specs: dict[str, TensorSpec] = {}
    for piece in pieces:
        if piece.key in specs:
            raise CheckpointError(f"{piece.name}: rank {rank} has two runs of {piece.kind}; one key holds one")
        specs[piece.key] = TensorSpec(torch.float32, (piece.length,))
    entries = []
    if pieces:
        # One thread hashes what the other writes: both let go of the interpreter, and a piece is in memory once.
        with TensorFileWriter(folder / file, specs) as writer, ThreadPoolExecutor(1) as hasher:
            for piece in pieces:
                values = piece.load()
                if values.dtype is not torch.float32:
                    raise CheckpointError(
                        f"{piece.name}: {piece.kind} is {values.dtype}, masters and moments are float32"
                    )
                entry = hasher.submit(_index_entry, piece, values, file)
                writer.write(piece.key, values, stop=_stop_if(cancelled))
                entries.append(entry.result())
    _write_text(folder / _index_file(rank), json.dumps(entries))


def complete_checkpoint(
    temporary: Path,
    final: Path,
    header: Header,
    world_size: int,
    *,
    given_up: Callable[[], str | None] = lambda: None,
    forbidden: Callable[[], str | None] = lambda: None,
    warn: Callable[[str], object] = lambda _: None,
) -> int:
    """Make a checkpoint of what all ranks have written, once they have; rank 0 alone.

    Args:
        temporary: the folder that ranks write to.
        final: the checkpoint's folder.
        header: what the manifest says besides the tensors.
        world_size: ranks whose indexes are waited for.
        given_up: asked while waiting; a reason ends it.
        forbidden: asked before the checkpoint comes into being; a reason ends it.
        warn: told of what goes wrong after the checkpoint is complete, and costs nothing.

    Returns:
        Bytes of all pieces.

    Raises:
        CheckpointError: a tensor is not covered, ranks disagree, waiting was given up, or it is forbidden.
        OSError: the disk is full or broken.
    """
    tensors = _collect(_await_indexes(temporary, world_size, given_up))
    manifest = Manifest(megalm_version=__version__, tensors=tensors, **_shallow_dict(header))
    text = manifest.to_json()
    _write_text(temporary / MANIFEST_FILE, text)
    for rank in range(world_size):
        (temporary / _index_file(rank)).unlink()  # the manifest has it all
    flush(temporary)
    _write_text(temporary / COMPLETE_FILE, hashlib.sha256(text.encode()).hexdigest() + "\n")
    flush(temporary)
    if reason := forbidden():
        raise CheckpointError(reason)
    _move_into_place(temporary, final, warn)
    return 4 * sum(piece.length for tensor in tensors.values() for piece in tensor.pieces)


def error_of(phase: Callable[[], object]) -> str | None:
    """Run a phase of a save; what a full or broken disk raises becomes a line that other ranks can hear of."""
    try:
        phase()
    except OSError as error:
        return f"{error.filename or 'write'}: {error.strerror or error}"
    except (CheckpointError, RuntimeError) as error:
        return str(error)
    return None


def _rank_file(rank: int) -> str:
    return f"rank-{rank:05d}.safetensors"


def _index_file(rank: int) -> str:
    return f"rank-{rank:05d}.json"


def _index_entry(piece: PieceToWrite, values: Tensor, file: str) -> dict[str, Any]:
    """What the manifest will say of a piece, and its share of the tensor's fingerprint."""
    record = Piece(
        kind=piece.kind,
        file=file,
        key=piece.key,
        cuts=piece.record.shard.cuts,
        flat_start=piece.flat_start,
        length=piece.length,
        dtype="float32",
        sha256=hashlib.sha256(as_bytes(values)).hexdigest(),
    )
    shard, is_value = piece.record.shard, piece.kind in (WEIGHT, BUFFER)
    return {
        "name": piece.name,
        "shape": shard.full_shape,
        "trainable": piece.record.trainable,
        "fingerprint": fingerprint(piece.name, shard, piece.flat_start, values) if is_value else 0,
        "piece": asdict(record),
    }


def _move_into_place(temporary: Path, final: Path, warn: Callable[[str], object]) -> None:
    """The same step may be there, saved by a life of the run that went another way: it steps aside for an instant.

    Under the name that it has then it still counts as a checkpoint, should this process be killed in that instant.
    """
    replaced = replaced_folder(final)
    if final.exists():
        final.rename(replaced)
    try:
        temporary.rename(final)
    except OSError:
        if replaced.exists():
            replaced.rename(final)
        raise
    # From here on there is a checkpoint, and no error may say that there is none.
    for action in (lambda: flush(final.parent), lambda: remove_folder(replaced) if replaced.exists() else None):
        if problem := error_of(action):
            warn(f"after {final} was saved: {problem}")


def _collect(indexes: Sequence[Path]) -> dict[str, TensorRecord]:
    """Tensors from every rank's index; a hole anywhere is an error, not something to find out at load time."""
    described: dict[str, tuple[tuple[int, ...], bool]] = {}
    pieces: dict[str, list[Piece]] = {}
    fingerprints: dict[str, int] = {}
    for path in indexes:
        for entry in json.loads(path.read_text(encoding="utf-8")):
            name, said = entry["name"], (tuple(entry["shape"]), entry["trainable"])
            if described.setdefault(name, said) != said:
                raise CheckpointError(
                    f"{name}: ranks disagree on its shape and whether it is trained: {described[name]}, {said}"
                )
            pieces.setdefault(name, []).append(parse_piece(entry["piece"]))
            fingerprints[name] = (fingerprints.get(name, 0) + entry["fingerprint"]) % (1 << 64)
    tensors = {
        name: TensorRecord(shape, tuple(pieces[name]), f"{fingerprints[name]:016x}", trainable)
        for name, (shape, trainable) in sorted(described.items())
    }
    of_trained = {piece.kind for tensor in tensors.values() if tensor.trainable for piece in tensor.pieces}
    for name, tensor in tensors.items():
        for kind in sorted(of_trained if tensor.trainable else {piece.kind for piece in tensor.pieces}):
            if hole := tensor.holes(kind):
                raise CheckpointError(f"{name}: no rank wrote {kind} {hole}")
    return tensors


def _await_indexes(folder: Path, world_size: int, given_up: Callable[[], str | None]) -> list[Path]:
    """Every rank's index, once this host sees them all."""
    paths = [folder / _index_file(rank) for rank in range(world_size)]
    pause = _SHORTEST_POLL
    while True:
        # One listing, which makes an NFS client ask the server again, and not a question per rank.
        present = set(os.listdir(folder)) if folder.is_dir() else set()  # noqa: PTH208 - names are all that is wanted
        missing = [rank for rank, path in enumerate(paths) if path.name not in present]
        if not missing:
            return paths
        if reason := given_up():
            listed = ", ".join(map(str, missing[:16])) + (", ..." if len(missing) > 16 else "")
            raise CheckpointError(f"{folder}: no index of {len(missing)} of {world_size} ranks ({listed}): {reason}")
        time.sleep(pause)
        pause = min(1.5 * pause, _LONGEST_POLL)


def _stop_if(cancelled: Callable[[], bool]) -> Callable[[], None]:
    def stop() -> None:
        if cancelled():
            raise CheckpointError(CANCELLED)

    return stop


def _shallow_dict(header: Header) -> dict[str, Any]:
    return {name: getattr(header, name) for name in Header.__dataclass_fields__}


def _write_text(path: Path, text: str) -> None:
    """Write a file that others see whole or not at all."""
    unfinished = path.with_name(f"{path.name}.unfinished")
    try:
        with unfinished.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        unfinished.rename(path)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from None
