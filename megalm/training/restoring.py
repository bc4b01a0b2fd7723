"""Restores a run: loads what a start point says, and proves that what arrived is what was saved (``proof.py``)."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megalm.checkpoint.extension import ExtendedReader
from megalm.checkpoint.manifest import MANIFEST_FILE, Manifest, parse_manifest, read_manifest, read_text
from megalm.checkpoint.reader import CheckpointReader
from megalm.data.stream.loader import TrainLoader
from megalm.engine.deepspeed_engine import DeepSpeedEngine
from megalm.errors import CheckpointError
from megalm.mesh.groups import ParallelContext
from megalm.runs.start import ARCHITECTURE, RESUMED_FROM, StartMode, StartPoint
from megalm.training.progress import Progress
from megalm.training.proof import prove_loaded

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
    # What is loaded is proven below, so that a rank reads those parts of pieces alone that it needs.
    reader = CheckpointReader(start.path, manifest=shared_manifest(start.path, context), is_proven=True)
    if start.extends_vocab:
        dtype = next(engine.model.parameters()).dtype
        per_word = [t for t in engine.tensors if t.record.per_word]
        reader = ExtendedReader(reader, per_word, seed=seed, dtype=dtype)
    manifest = reader.manifest
    reader.check_parameters(engine.full_shapes())
    resumes = start.mode is StartMode.RESUME
    if resumes:
        loader.load_state_dict(manifest.data)
    scalars = manifest.training["engine"] if resumes else None
    engine.load_state(reader, scalars=scalars)
    parameters = prove_loaded(reader, engine, context, moments=bool(scalars and scalars["optimizer_steps"]))
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


def shared_manifest(path: Path, context: ParallelContext) -> Manifest:
    """A checkpoint's manifest, which rank 0 reads and checks; the others take its word. Collective over all ranks.

    Raises:
        CheckpointError: on every rank, where rank 0 finds it incomplete or damaged.
    """
    if context.world_group.size == 1:
        return read_manifest(path)
    text, manifest, error = "", None, ""
    if context.rank == 0:
        try:
            text = read_text(path)
            manifest = parse_manifest(text, path / MANIFEST_FILE)
        except CheckpointError as refused:
            error = str(refused)
    if error := _from_rank_0(error, context):
        raise CheckpointError(error)
    text = _from_rank_0(text, context)
    return parse_manifest(text, path / MANIFEST_FILE, checked=True) if manifest is None else manifest


def _from_rank_0(text: str, context: ParallelContext) -> str:
    """Rank 0's text on every rank; collective."""
    data = torch.frombuffer(bytearray(text.encode() or b"\0"), dtype=torch.uint8).to(context.device)
    size = torch.tensor([len(text.encode())], device=context.device)
    dist.broadcast(size, src=0, group=context.world_group.handle)
    length = int(size)
    if not length:
        return ""
    if context.rank != 0:
        data = torch.empty(length, dtype=torch.uint8, device=context.device)
    dist.broadcast(data, src=0, group=context.world_group.handle)
    return data.cpu().numpy().tobytes().decode()
