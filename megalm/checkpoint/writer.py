"""Writes a checkpoint: every rank the pieces it holds, rank 0 the manifest; visible only when it is complete.

Nothing is sent between ranks but a word on whether all is well. The steps are

1. rank 0 makes a temporary folder, and removes what an interrupted save left;
2. every rank writes its pieces and an index of them there, and flushes both to the disk;
3. rank 0 reads all indexes, proves that every element of every tensor is covered, writes the manifest and the
   completeness marker last, and renames the folder: the one operation by which the checkpoint comes into being.

A kill at any moment leaves the previous checkpoint untouched and the new one under its temporary name.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.numpy import save_file

import megalm
from megalm.checkpoint.manifest import COMPLETE_FILE, MANIFEST_FILE, Manifest, Piece, TensorRecord
from megalm.checkpoint.store import TEMPORARY_PREFIX, step_folder
from megalm.core.sharding import StatePiece
from megalm.errors import CheckpointError

Agree = Callable[[str | None], str | None]
"""Collective: takes this rank's error, returns the first error of any rank (None: all is well)."""

INDEX_WAIT_SECONDS = 60.0
"""Longest wait for other ranks' indexes: NFS shows another node's new files only when its attribute cache expires."""


@dataclass(frozen=True)
class Header:
    """What a checkpoint says besides its tensors; see :class:`megalm.checkpoint.manifest.Manifest`."""

    step: int
    config: dict[str, Any]
    topology: dict[str, int]
    data: dict[str, Any]
    training: dict[str, Any]


def save_checkpoint(
    folder: Path, header: Header, pieces: Iterable[StatePiece], *, rank: int, world_size: int, agree: Agree
) -> Path:
    """Write ``folder/step-…``; collective over all ranks.

    Args:
        folder: the run's checkpoint folder, on a file system that all ranks share.
        header: the same on every rank.
        pieces: what this rank is to write; live tensors, read before the function returns.
        rank: this rank.
        world_size: number of ranks.
        agree: exchanges errors.

    Returns:
        The folder of the checkpoint, complete.

    Raises:
        CheckpointError: on every rank, if any of them could not write; the previous checkpoint is untouched.
    """
    final = folder / step_folder(header.step)
    temporary = folder / f"{TEMPORARY_PREFIX}{final.name}"
    phases: list[Callable[[], None]] = [
        lambda: _make_folder(folder, temporary) if rank == 0 else None,
        lambda: _write_rank(temporary, pieces, rank),
        lambda: _complete(temporary, final, header, world_size) if rank == 0 else None,
    ]
    for phase in phases:
        error = agree(_error_of(phase))
        if error is not None:
            if rank == 0:
                shutil.rmtree(temporary, ignore_errors=True)
            raise CheckpointError(f"checkpoint of step {header.step} was not saved: {error}")
    return final


def _error_of(phase: Callable[[], None]) -> str | None:
    """Run a phase; what a full or broken disk raises becomes a line that all ranks hear of."""
    try:
        phase()
    except OSError as error:
        return f"{error.filename or 'write'}: {error.strerror or error}"
    except (CheckpointError, RuntimeError) as error:
        return str(error)
    except Exception as error:  # safetensors raises its own type for a failed write
        if type(error).__module__.startswith("safetensors") or type(error).__name__ == "SafetensorError":
            return str(error)
        raise
    return None


def _make_folder(folder: Path, temporary: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for stale in folder.glob(f"{TEMPORARY_PREFIX}*"):
        shutil.rmtree(stale)
    temporary.mkdir()


def _write_rank(folder: Path, pieces: Iterable[StatePiece], rank: int) -> None:
    file = f"rank-{rank:05d}.safetensors"
    arrays, records = {}, []
    for piece in pieces:
        values = piece.values.detach().to("cpu").contiguous()
        if values.dtype is not torch.float32:
            raise CheckpointError(f"{piece.name}: {piece.kind} is {values.dtype}, masters and moments are float32")
        key = f"{piece.kind}/{piece.name}"
        if key in arrays:
            raise CheckpointError(f"{piece.name}: rank {rank} has two runs of {piece.kind}; one key holds one")
        arrays[key] = array = values.numpy()
        record = Piece(
            kind=piece.kind,
            file=file,
            key=key,
            dim=piece.shard.dim,
            ranges=piece.shard.ranges,
            padding=piece.shard.padding,
            flat_start=piece.flat_start,
            length=array.size,
            dtype="float32",
            sha256=hashlib.sha256(array.data).hexdigest(),
        )
        records.append({"name": piece.name, "shape": piece.shard.full_shape, "piece": asdict(record)})
    if arrays:
        save_file(arrays, str(folder / file))
        _flush(folder / file)
    _write_text(folder / f"rank-{rank:05d}.json", json.dumps(records))


def _complete(temporary: Path, final: Path, header: Header, world_size: int) -> None:
    manifest = Manifest(
        megalm_version=megalm.__version__, tensors=_collect(temporary, world_size), **_shallow_dict(header)
    )
    text = manifest.to_json()
    _write_text(temporary / MANIFEST_FILE, text)
    for rank in range(world_size):
        (temporary / f"rank-{rank:05d}.json").unlink()  # the manifest has it all
    _flush(temporary)
    _write_text(temporary / COMPLETE_FILE, hashlib.sha256(text.encode()).hexdigest() + "\n")
    _flush(temporary)
    # The same step may be there, saved by a life of the run that went another way. Moving it aside takes an instant;
    # deleting it first would leave the run without a checkpoint for as long as that takes.
    replaced = final.parent / f"{TEMPORARY_PREFIX}replaced-{final.name}"
    if final.exists():
        final.rename(replaced)
    try:
        temporary.rename(final)
    except OSError:
        if replaced.exists():
            replaced.rename(final)
        raise
    _flush(final.parent)
    if replaced.exists():
        shutil.rmtree(replaced)


def _collect(folder: Path, world_size: int) -> dict[str, TensorRecord]:
    """Tensors from every rank's index; a hole anywhere is an error, not something to find out at load time."""
    shapes: dict[str, tuple[int, ...]] = {}
    pieces: dict[str, list[Piece]] = {}
    for path in _await_indexes(folder, world_size):
        for record in json.loads(path.read_text(encoding="utf-8")):
            shape = tuple(record["shape"])
            if shapes.setdefault(record["name"], shape) != shape:
                raise CheckpointError(
                    f"{record['name']}: ranks disagree on its shape: {shapes[record['name']]}, {shape}"
                )
            fields = record["piece"]
            ranges = tuple((start, stop) for start, stop in fields["ranges"])
            pieces.setdefault(record["name"], []).append(Piece(**{**fields, "ranges": ranges}))
    tensors = {name: TensorRecord(shapes[name], tuple(pieces[name])) for name in sorted(shapes)}
    kinds = sorted({piece.kind for tensor in tensors.values() for piece in tensor.pieces})
    for name, tensor in tensors.items():
        for kind in kinds:
            if hole := tensor.holes(kind):
                raise CheckpointError(f"{name}: no rank wrote {kind} {hole}")
    return tensors


def _await_indexes(folder: Path, world_size: int) -> list[Path]:
    """Every rank's index, once this host sees them all."""
    paths = [folder / f"rank-{rank:05d}.json" for rank in range(world_size)]
    deadline = time.monotonic() + INDEX_WAIT_SECONDS
    while missing := [rank for rank, path in enumerate(paths) if not path.is_file()]:
        if time.monotonic() > deadline:
            listed = ", ".join(map(str, missing[:16])) + (", ..." if len(missing) > 16 else "")
            raise CheckpointError(
                f"{folder}: no index of {len(missing)} of {world_size} ranks ({listed}) after {INDEX_WAIT_SECONDS:.0f} "
                "s; run.dir must be on a file system that all ranks share"
            )
        list(folder.iterdir())  # makes an NFS client ask the server again
        time.sleep(0.05)
    return paths


def _shallow_dict(header: Header) -> dict[str, Any]:
    return {name: getattr(header, name) for name in Header.__dataclass_fields__}


def _write_text(path: Path, text: str) -> None:
    with path.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _flush(path: Path) -> None:
    """Force a file, or a folder's entries, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
