"""Simulated layouts: what ranks of a (tp, dp) world would hand to the writer, from known full tensors."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from threading import Barrier, Thread

import torch
from safetensors import safe_open

from megalm.checkpoint.manifest import COMPLETE_FILE, MANIFEST_FILE, read_manifest
from megalm.checkpoint.pieces import DIGESTS, Piece
from megalm.checkpoint.save import save_checkpoint
from megalm.checkpoint.writer import Header, PieceToWrite
from megalm.core.parameters import StatePiece
from megalm.errors import CheckpointError
from megalm.mesh.parameter import ParameterRecord
from megalm.mesh.slices import ShardSpec, padded_range

SHAPES = {
    "embedding.weight": (13, 6),  # padded vocabulary
    "norm.weight": (6,),  # replicated
    "qkv.weight": (36, 6),  # three fused ranges
    "projection.weight": (6, 12),  # sliced along dim 1
}
KINDS = ("weight", "exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class Layout:
    """Degrees, and where ZeRO cuts each flattened local tensor (fractions of its length)."""

    tp: int = 1
    dp: int = 1
    cuts: tuple[float, ...] = ()


def full_tensors() -> dict[tuple[str, str], torch.Tensor]:
    """Every tensor of every kind, all elements different."""
    generator = torch.Generator().manual_seed(0)
    return {(name, kind): torch.randn(shape, generator=generator) for name, shape in SHAPES.items() for kind in KINDS}


def shard_of(name: str, tp: int, rank: int) -> ShardSpec:
    """The slice of a parameter that a tensor-parallel rank holds."""
    shape = SHAPES[name]
    if name == "embedding.weight":
        valid, padding = padded_range(shape[0], rank, tp)
        return ShardSpec.along(shape, 0, (valid,), padding)
    if name == "norm.weight":
        return ShardSpec.replicated(*shape)
    if name == "projection.weight":
        share = shape[1] // tp
        return ShardSpec.along(shape, 1, ((rank * share, (rank + 1) * share),))
    third, share = shape[0] // 3, shape[0] // 3 // tp
    return ShardSpec.along(
        shape, 0, tuple((i * third + rank * share, i * third + (rank + 1) * share) for i in range(3))
    )


def pieces_of(layout: Layout, tp_rank: int, dp_rank: int) -> list[StatePiece]:
    """What one rank would write: its ZeRO range of each parameter that it owns."""
    pieces = []
    for (name, kind), full in full_tensors().items():
        shard = shard_of(name, layout.tp, tp_rank)
        if not shard.is_sharded and tp_rank:
            continue
        flat = shard.take(full).view(-1)
        edges = [0, *sorted(round(c * flat.numel()) for c in layout.cuts[: layout.dp - 1]), flat.numel()]
        edges += [flat.numel()] * (layout.dp + 1 - len(edges))
        start, stop = edges[dp_rank], edges[dp_rank + 1]
        if stop > start:
            pieces.append(StatePiece(ParameterRecord(name, shard), kind, start, flat[start:stop]))
    return pieces


def header(step: int, training: dict | None = None) -> Header:
    """A header with something in every field."""
    return Header(step, {"model": {}}, {"tp": 1}, {"consumed_samples": 8}, training or {"progress": {"step": step}})


def save(
    folder: Path,
    layout: Layout,
    step: int = 1,
    pieces: Callable[[Layout, int, int], list[StatePiece]] = pieces_of,
    training: dict | None = None,
) -> list[Path | Exception]:
    """Save from all simulated ranks, one thread each; returns what each rank got."""
    world_size = layout.tp * layout.dp
    errors: list[str | None] = [None] * world_size
    barrier = Barrier(world_size)
    results: list[Path | Exception] = [RuntimeError("did not run")] * world_size

    def run(rank: int) -> None:
        def agree(error: str | None) -> str | None:
            errors[rank] = error
            barrier.wait(timeout=30)
            first = next((e for e in errors if e is not None), None)
            barrier.wait(timeout=30)
            return first

        try:
            mine = [PieceToWrite.of(piece) for piece in pieces(layout, rank % layout.tp, rank // layout.tp)]
            results[rank] = save_checkpoint(
                folder, header(step, training), mine, rank=rank, world_size=world_size, agree=agree
            )
        except CheckpointError as error:
            results[rank] = error
        except Exception as error:
            results[rank] = error
            barrier.abort()

    threads = [Thread(target=run, args=(rank,)) for rank in range(world_size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def fields_of(checkpoint: Path) -> dict:
    """What the text of a manifest says."""
    return json.loads((checkpoint / MANIFEST_FILE).read_text())


def rewrite(checkpoint: Path, fields: dict) -> None:
    """Another manifest for a checkpoint, which vouches for it."""
    text = json.dumps(fields)
    (checkpoint / MANIFEST_FILE).write_text(text)
    (checkpoint / COMPLETE_FILE).write_text(hashlib.sha256(text.encode()).hexdigest())


def fields_of_version_4(checkpoint: Path) -> dict:
    """A manifest as version 4 had it: an object for each piece, and no fingerprints of moments."""
    manifest = read_manifest(checkpoint)

    def fields_of_piece(piece: Piece) -> dict:
        with safe_open(checkpoint / piece.file, framework="pt") as file:
            digests = json.loads(file.metadata()[DIGESTS])
        fields = {**piece._asdict(), "cuts": [asdict(cut) for cut in piece.cuts], "sha256": digests[piece.key]}
        del fields["seal"]
        return fields

    fields = {name: getattr(manifest, name) for name in ("megalm_version", "step", "config", "topology", "data")}
    tensors = {
        name: {
            "shape": list(record.shape),
            "pieces": [fields_of_piece(piece) for piece in record.pieces],
            "fingerprint": record.fingerprint,
            "trainable": record.trainable,
        }
        for name, record in manifest.tensors.items()
    }
    return {"format": "megalm-checkpoint", "version": 4, **fields, "training": manifest.training, "tensors": tensors}
