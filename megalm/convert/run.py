"""megalm's own runs: read whatever layout wrote them, and written as a run folder that every command accepts."""

from __future__ import annotations

import re
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from megalm.checkpoint.manifest import Manifest
from megalm.checkpoint.pieces import WEIGHT
from megalm.checkpoint.reader import CheckpointReader
from megalm.checkpoint.store import CHECKPOINTS_FOLDER, TEMPORARY_PREFIX, locate, step_folder
from megalm.checkpoint.writer import Header, PieceToWrite, complete_checkpoint, write_rank
from megalm.config.check import violations
from megalm.config.parse import config_from_dict, config_to_dict
from megalm.config.schema import Config, Model, Parallel
from megalm.convert.checks import check_architecture, config_around
from megalm.convert.huggingface.token_ids import TokenIds
from megalm.convert.parallel import run_all
from megalm.convert.transfer import Transfer
from megalm.convert.weights import SourceInfo, WeightSource, declared_of, full_shapes
from megalm.core.dtype import DTYPE_NAMES
from megalm.core.parameters import DeclaredTensor
from megalm.data.shards.vocabulary import Vocabulary
from megalm.data.tokenization.tokenizer import Tokenizer
from megalm.errors import CheckpointError, ConfigError
from megalm.mesh.slices import ShardSpec
from megalm.mesh.topology import Topology
from megalm.models.balance import split_layers
from megalm.models.transformer import Part
from megalm.runs.folder import CONFIG_FILE
from megalm.runs.start import ARCHITECTURE
from megalm.runs.vocabulary import TOKENIZER, check_own_tokenizer, tokenizer_folder, tokenizer_record

IMPORTED = "imported"
"""Where a manifest's ``training`` says what its weights were converted from."""
IDS = "ids"
"""Key of ``training.imported`` with the ids of special tokens that the model came with."""


class RunSource(WeightSource):
    """A checkpoint of megalm; of a run, the newest one.

    Args:
        path: folder of a checkpoint or of a run.

    Raises:
        CheckpointError: see :class:`WeightSource`.
    """

    def __init__(self, path: Path) -> None:
        checkpoint = locate(path)
        self._reader = CheckpointReader(checkpoint.path)
        manifest = self._reader.manifest
        model = _model_of(manifest, checkpoint.path)
        self._shapes = full_shapes(model)
        self._reader.check_parameters(self._shapes, whole_model=True)
        self.info = SourceInfo(
            format="megalm",
            path=path,
            model=model,
            dtype=_stored_dtype(manifest),
            step=manifest.step,
            tokenizer=tokenizer_folder(checkpoint.path),
            architecture=_architecture(manifest),
            ids=TokenIds.of_record(_imported(manifest).get(IDS)),
        )

    def read(self, name: str) -> Tensor:
        """See the base class. What was imported from a shorter dtype is given in that one, which loses nothing."""
        tensor = self._reader.read_local(name, WEIGHT, ShardSpec.replicated(*self._shapes[name]))
        return tensor.to(self.info.dtype)

    def check_tokenizer(self, vocabulary: Vocabulary) -> None:
        """Refuse a tokenizer other than the one that the model was trained with.

        Raises:
            CheckpointError: naming both.
        """
        check_own_tokenizer(self._reader.path, self._reader.manifest, vocabulary)


def open_source(path: Path) -> WeightSource:
    """Open a checkpoint of megalm for reading; of a run, the newest one."""
    return RunSource(path)


def check_layout(model: Model, *, tp: int, pp: int) -> None:
    """Refuse a layout over which the model cannot be split.

    Raises:
        ConfigError: naming what does not divide.
    """
    if lines := violations(_config(model, "model", tp=tp, pp=pp), tp * pp):
        raise ConfigError(lines)


def write_run(transfer: Transfer, folder: Path, *, name: str, tokenizer: Tokenizer | None, tp: int, pp: int) -> None:
    """Write a run folder: config, tokenizer, and one checkpoint in pieces for a layout.

    Args:
        transfer: the model.
        folder: an empty folder.
        name: of the run.
        tokenizer: the model's; None: it has none.
        tp: tensor-parallel degree of the pieces.
        pp: pipeline-parallel degree of the pieces.

    Raises:
        CheckpointError: the source cannot be read.
        OSError: the disk is full or broken.
    """
    info = transfer.info
    model = info.model if info.format == "megalm" else _with_defaults(info.model)
    config = _config(model, _run_name(name), tp=tp, pp=pp, dtype=DTYPE_NAMES[info.dtype])
    text = yaml.safe_dump(config_to_dict(config), sort_keys=False, allow_unicode=True)
    (folder / CONFIG_FILE).write_text(text, encoding="utf-8")
    if tokenizer is not None:
        tokenizer.save(folder)
    checkpoints = folder / CHECKPOINTS_FOLDER
    temporary = checkpoints / f"{TEMPORARY_PREFIX}{step_folder(info.step)}"
    stages = split_layers(config, info.model.vocab_size or 0)
    tasks = [
        partial(_write_rank, transfer, temporary, stages, stage=stage, tp=tp, tp_rank=rank)
        for stage in range(pp)
        for rank in range(tp)
    ]
    run_all(tasks, cancel=transfer.cancel)
    header = Header(
        step=info.step,
        config=config_to_dict(config),
        topology={"tp": tp, "pp": pp, "virtual_stages": 1, "cp": 1, "dp": 1},
        data={},
        training={
            IMPORTED: {
                "format": info.format,
                "dtype": str(info.dtype).removeprefix("torch."),
                **({} if info.ids is None else {IDS: info.ids.to_record()}),
            },
            **({ARCHITECTURE: info.architecture} if info.architecture else {}),
            **({} if tokenizer is None else {TOKENIZER: tokenizer_record(tokenizer)}),
        },
    )
    complete_checkpoint(temporary, checkpoints / step_folder(info.step), header, tp * pp)


def _write_rank(transfer: Transfer, folder: Path, stages: list[range], *, stage: int, tp: int, tp_rank: int) -> None:
    """One rank's pieces: its slices, and of replicated tensors all where it is the first."""
    part = Part({stage: stages[stage]}, len(stages))
    topology, rank = Topology(tp=tp, pp=len(stages)), stage * tp + tp_rank
    declared = [
        p
        for p in declared_of(transfer.info.model, tp=tp, tp_rank=tp_rank, part=part)
        if p.record.is_owned_by(topology, rank)
    ]
    # A tensor is held until the next one is asked for: until then it is being written and hashed.
    with ExitStack() as held:

        def piece(p: DeclaredTensor) -> PieceToWrite:
            def load() -> Tensor:
                held.close()
                full = held.enter_context(transfer.hold(p.name))
                # Every rank reads the whole tensor again; sliced before it is cast, only the slice is held twice.
                return (p.shard.take(full) if p.shard.is_sharded else full).to(torch.float32).reshape(-1)

            return PieceToWrite(p.record, WEIGHT, 0, p.shard.local_numel, load)

        write_rank(folder, rank, [piece(p) for p in declared], cancelled=transfer.is_cancelled)


def _config(model: Model, name: str, *, tp: int, pp: int, dtype: str = "fp32") -> Config:
    base = config_around(model, name=name)
    return replace(base, parallel=Parallel(tp=tp, pp=pp), engine=replace(base.engine, dtype=dtype))


def _with_defaults(model: Model) -> Model:
    """A model of another format, its sizes left open where they are what megalm derives: as presets have them.

    ``checkpoint.init_from`` compares field by field.
    """
    derived = replace(model, ffn_hidden_size=None)
    model = derived if derived.ffn_size == model.ffn_size else model
    model = replace(model, head_dim=None) if model.attention_size == model.hidden_size else model
    return replace(model, num_kv_heads=None) if model.kv_heads == model.num_heads else model


def _run_name(name: str) -> str:
    """A folder's name as a valid run name."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip("-._")[:200] or "converted"


def _model_of(manifest: Manifest, path: Path) -> Model:
    try:
        model = config_from_dict(manifest.config).model
    except ConfigError as error:
        raise CheckpointError(f"{path}: its config is not one of this megalm's:\n{error}") from None
    words = manifest.tensors.get("embedding.weight")
    if model.vocab_size is None and words is not None:
        model = replace(model, vocab_size=words.shape[0])
    check_architecture(path, model)
    if model.num_layers > len(manifest.tensors):
        raise CheckpointError(
            f"{path}: {len(manifest.tensors)} tensors are not the {model.num_layers} layers of its config"
        )
    return model


def _stored_dtype(manifest: Manifest) -> torch.dtype:
    """The dtype that imported weights had in their own format; fp32 if megalm has trained them since."""
    name = _imported(manifest).get("dtype")
    return {str(dtype): dtype for dtype in DTYPE_NAMES}.get(f"torch.{name}", torch.float32)


def _architecture(manifest: Manifest) -> str:
    """The Hugging Face architecture that weights were converted from, also where megalm has trained them since."""
    name = manifest.training.get(ARCHITECTURE)
    return name if isinstance(name, str) else ""


def _imported(manifest: Manifest) -> dict[str, Any]:
    """Where weights were imported from; empty if megalm has trained them since."""
    imported = manifest.training.get(IMPORTED)
    return imported if isinstance(imported, dict) and "progress" not in manifest.training else {}
