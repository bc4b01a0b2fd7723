"""Writes a checkpoint: every rank the pieces it holds, rank 0 the manifest; visible only when it is complete.

Ranks do not talk to each other here; they meet in the file system that they share:

1. every rank writes its pieces and an index of them into a temporary folder, and flushes both to the disk;
2. rank 0 waits for all indexes (``collect.py``), proves that every element of every tensor is covered, writes the
   manifest and the completeness marker last, and renames the folder: the one operation by which the checkpoint comes
   into being.

A kill at any moment leaves the previous checkpoint untouched and the new one under its temporary name.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megalm.checkpoint.collect import INDEX_ENDING, await_indexes, collect
from megalm.checkpoint.durable import flush
from megalm.checkpoint.fingerprint import fingerprint
from megalm.checkpoint.index import NO_SEAL, index_of
from megalm.checkpoint.manifest import COMPLETE_FILE, FORMAT, MANIFEST_FILE, VERSION, manifest_of, to_json
from megalm.checkpoint.pieces import BYTES_PER_ELEMENT, DIGESTS, Interval, key_of, rank_file, rank_folders
from megalm.checkpoint.store import TEMPORARY_PREFIX, remove_folder, replaced_folder, step_folder
from megalm.checkpoint.tensor_file import TensorFileWriter, TensorSpec, as_bytes
from megalm.core.parameters import Recorded, StatePiece
from megalm.errors import CheckpointError
from megalm.mesh.parameter import StateRun
from megalm.version import __version__

CANCELLED = "cancelled"
"""The error of a rank that stopped because another one had failed."""


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
        CheckpointError: a piece is not fp32, two are the same, or the save was cancelled.
        OSError: the disk is full or broken.
    """
    path = folder / rank_file(rank)
    path.parent.mkdir(parents=True, exist_ok=True)
    named = _named(pieces)
    shares, seal = _write_pieces(path, named, cancelled) if named else ([], NO_SEAL)
    runs = [StateRun(piece.record, piece.kind, piece.flat_start, piece.length) for piece in named.values()]
    _write_text(folder / rank_file(rank, INDEX_ENDING), index_of(zip(runs, shares, strict=True), seal))


def _write_pieces(
    path: Path, named: Mapping[str, PieceToWrite], cancelled: Callable[[], bool]
) -> tuple[list[int], str]:
    """Write a file; returns each piece's share of its tensor's fingerprint, and the file's seal."""
    specs = {key: TensorSpec(torch.float32, (piece.length,)) for key, piece in named.items()}
    metadata = {DIGESTS: json.dumps(dict.fromkeys(named, NO_SEAL))}  # as long as what takes its place
    digests, shares = {}, []
    # Two threads hash what this one writes: all let go of the interpreter, and a piece is in memory once.
    with TensorFileWriter(path, specs, metadata=metadata) as writer, ThreadPoolExecutor(2) as hashers:
        for key, piece in named.items():
            values = piece.load()
            if values.dtype is not torch.float32:
                raise CheckpointError(f"{piece.name}: {piece.kind} is {values.dtype}, masters and moments are float32")
            digest = hashers.submit(_sha256, values)
            share = hashers.submit(fingerprint, piece.name, piece.shard, piece.flat_start, values)
            writer.write(key, values, stop=_stop_if(cancelled))
            digests[key] = digest.result()
            shares.append(share.result())
        text = json.dumps(digests)
        writer.replace_metadata({DIGESTS: text})
    return shares, hashlib.sha256(text.encode()).hexdigest()


def _named(pieces: Sequence[PieceToWrite]) -> dict[str, PieceToWrite]:
    """Pieces by the names that they are stored under."""
    first: dict[tuple[str, str], int] = {}
    for piece in pieces:
        place = piece.kind, piece.name
        first[place] = min(first.get(place, piece.flat_start), piece.flat_start)
    named: dict[str, PieceToWrite] = {}
    for piece in pieces:
        key = key_of(piece.kind, piece.name, piece.flat_start, first=first[piece.kind, piece.name])
        if named.setdefault(key, piece) is not piece:
            raise CheckpointError(f"{piece.name}: a rank has two runs of {piece.kind} from {piece.flat_start} on")
    return named


def _sha256(values: Tensor) -> str:
    return hashlib.sha256(as_bytes(values)).hexdigest()


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
    await_indexes(temporary, world_size, given_up)
    fields = {"megalm_version": __version__, **_shallow_dict(header), **collect(temporary, world_size)}
    nbytes = BYTES_PER_ELEMENT * _stored_elements(fields, temporary)
    text = to_json(fields)
    _write_text(temporary / MANIFEST_FILE, text)
    for rank in range(world_size):
        (temporary / rank_file(rank, INDEX_ENDING)).unlink()  # the manifest has it all
    for folder, _ in reversed(rank_folders(world_size)):  # the checkpoint's own folder last
        flush(temporary / folder)
    _write_text(temporary / COMPLETE_FILE, hashlib.sha256(text.encode()).hexdigest() + "\n")
    flush(temporary)
    if reason := forbidden():
        raise CheckpointError(reason)
    _move_into_place(temporary, final, warn)
    return nbytes


def error_of(phase: Callable[[], object]) -> str | None:
    """Run a phase of a save; what a full or broken disk raises becomes a line that other ranks can hear of."""
    try:
        phase()
    except OSError as error:
        return f"{error.filename or 'write'}: {error.strerror or error}"
    except (CheckpointError, RuntimeError) as error:
        return str(error)
    return None


def _stored_elements(fields: dict[str, Any], folder: Path) -> int:
    """How many elements a checkpoint has; what no reader could read is an error now, and so is a hole anywhere."""
    tensors = manifest_of({"format": FORMAT, "version": VERSION, **fields}, folder / MANIFEST_FILE).tensors
    of_trained = set().union(*(tensor.kinds for tensor in tensors.values() if tensor.trainable))
    elements = 0
    for name, tensor in tensors.items():
        proven: list[list[Interval]] = []
        for kind in sorted(of_trained if tensor.trainable else tensor.kinds):
            intervals = tensor.intervals(kind)
            elements += sum(stop - start for _, start, stop in intervals)
            if intervals in proven:  # moments lie as weights do
                continue
            if hole := tensor.holes(kind):
                raise CheckpointError(f"{name}: no rank wrote {kind} {hole}")
            proven.append(intervals)
    return elements


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
