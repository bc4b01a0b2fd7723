"""Restores a run: loads what a start point says, and proves that what arrived is what was saved."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from megalm.checkpoint.extension import ExtendedReader
from megalm.checkpoint.fingerprint import fingerprint
from megalm.checkpoint.manifest import BUFFER, WEIGHT, Manifest, combined_hash
from megalm.checkpoint.reader import CheckpointReader
from megalm.core.parameters import StatePiece
from megalm.data.stream.loader import TrainLoader
from megalm.engine.deepspeed_engine import DeepSpeedEngine
from megalm.errors import CheckpointError
from megalm.mesh.groups import ParallelContext
from megalm.runs.start import ARCHITECTURE, RESUMED_FROM, StartMode, StartPoint
from megalm.training.progress import Progress

PARENT = "parent"
"""Where a manifest's ``training`` says whose weights the run began with."""

_WORDS = {
    StartMode.RESUME: "weights, optimizer and position",
    StartMode.INIT_FROM: "weights alone",
    StartMode.FINETUNE: "weights, for a new phase of data",
}


@dataclass(frozen=True)
class Restored:
    """What a run began with.

    Attributes:
        progress: how far it is.
        words: what was loaded, in one line; None for initial weights.
        lineage: what checkpoints of the run say of where its weights are from: ``parent``, another run's checkpoint
            that it began with, ``resumed_from``, the named one that it went on from, and ``architecture``, what the
            weights were converted from.
        resumed: what the checkpoint says of the run that goes on; None for one that begins.
    """

    progress: Progress
    words: str | None = None
    lineage: dict[str, Any] = field(default_factory=dict)
    resumed: Manifest | None = None


def restore(
    start: StartPoint, engine: DeepSpeedEngine, loader: TrainLoader, context: ParallelContext, *, seed: int = 0
) -> Restored:
    """Load what the start point says; collective over all ranks.

    Args:
        start: where the run starts from.
        engine: what is filled.
        loader: takes its position in the data.
        context: this rank's groups.
        seed: of initial weights, where the model gets rows that the checkpoint has not.

    Raises:
        CheckpointError: the checkpoint does not fit the model, or is damaged, or what arrived in the model is not what
            was saved.
        DataError: the data or its order is not what the checkpoint was trained with.
    """
    if start.path is None:
        return Restored(Progress())
    reader = CheckpointReader(start.path)
    if start.extends_vocab:
        dtype = next(engine.model.parameters()).dtype
        per_word = [t for t in engine.tensors if t.record.per_word]
        reader = ExtendedReader(reader, per_word, seed=seed, dtype=dtype)
    manifest = reader.manifest
    reader.check_parameters(engine.full_shapes())
    resumes = start.mode is StartMode.RESUME
    if resumes:
        loader.load_state_dict(manifest.data)
    engine.load_state(reader, scalars=manifest.training["engine"] if resumes else None)
    parameters = _prove_loaded(reader, engine, context)
    what = _WORDS[start.mode] + (", rows added to the vocabulary" if start.extends_vocab else "")
    words = f"{start.mode.value}, step {manifest.step:,}: {what}; hash {parameters}; {start.path}"
    if resumes:
        lineage = {
            key: manifest.training[key] for key in (PARENT, RESUMED_FROM, ARCHITECTURE) if key in manifest.training
        }
        if start.is_named:
            lineage[RESUMED_FROM] = {"checkpoint": str(start.path.resolve()), "step": manifest.step}
        return Restored(Progress(**manifest.training["progress"]), words, lineage, manifest)
    parent = {
        "mode": start.mode.value,
        "checkpoint": str(start.path),
        "step": manifest.step,
        "parameters": parameters,
        "data": manifest.data,
    }
    kept = {ARCHITECTURE: manifest.training[ARCHITECTURE]} if ARCHITECTURE in manifest.training else {}
    return Restored(Progress(), words, {PARENT: parent, **kept})


def _prove_loaded(reader: CheckpointReader, engine: DeepSpeedEngine, context: ParallelContext) -> str:
    """Hash the parameters that all ranks hold now, and compare tensor by tensor with what the checkpoint says of them.

    Returns:
        One hash of them all, the same for every layout.
    """
    names = sorted(reader.manifest.tensors)
    number = {name: index for index, name in enumerate(names)}
    # Shares of fingerprints; how many there are; shares of what the checkpoint has of them, without rows added here.
    sums = torch.zeros(3, len(names), dtype=torch.int64)
    for piece in engine.state_pieces():
        if piece.kind in (WEIGHT, BUFFER):
            sums[:, number[piece.name]] += torch.tensor([_share(piece), 1, _share(reader.saved_part(piece))])
    totals, counts, kept = context.world_group.all_reduce(sums.to(context.device)).tolist()
    loaded = {name: total % (1 << 64) for name, total in zip(names, totals, strict=True)}
    as_saved = {name: total % (1 << 64) for name, total in zip(names, kept, strict=True)}
    saved = reader.manifest.fingerprints
    problems = [
        f"{reader.path}: {name}: in the checkpoint, not in the model"
        for name, count in zip(names, counts, strict=True)
        if not count
    ]
    problems += [
        f"{reader.path}: {name}: what was loaded is not what was saved"
        for name, count in zip(names, counts, strict=True)
        if count and saved is not None and as_saved[name] != saved[name]
    ]
    if problems:
        raise CheckpointError("\n".join(problems))
    return combined_hash(loaded)


def _share(piece: StatePiece) -> int:
    """A piece's share of its tensor's fingerprint, as 64 bits with a sign hold it."""
    # Frozen parameters and buffers have the model's dtype here, and fp32 in the checkpoint.
    share = fingerprint(piece.name, piece.shard, piece.flat_start, piece.values.float())
    return share - (1 << 64) if share >= 1 << 63 else share
