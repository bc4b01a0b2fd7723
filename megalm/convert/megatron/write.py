"""Writes Megatron-LM checkpoints: one file per rank, tensors in parallel, and never a rank's whole share in memory."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from megalm.checkpoint.tensor_file import as_bytes
from megalm.config.schema import Model
from megalm.convert.mapping import Shape
from megalm.convert.megatron.args import (
    VOCABULARY_DIVISOR,
    args_from_model,
    layout_reasons,
    reasons_against,
)
from megalm.convert.megatron.names import (
    TIED_COPY,
    Placement,
    Split,
    padded_vocabulary,
    placements,
    transformer_engine,
)
from megalm.convert.megatron.read import RANK_FILE, RELEASE, TRACKER_FILE
from megalm.convert.parallel import run_all
from megalm.convert.transfer import Transfer
from megalm.convert.untrusted.torch_archive import Part, read_parts
from megalm.errors import CheckpointError

IMPLEMENTATIONS = ("transformer_engine", "local")
"""Values of Megatron-LM's ``--transformer-impl``, its default first; they name tensors differently."""


def write_megatron(
    transfer: Transfer,
    folder: Path,
    *,
    tp: int,
    pp: int,
    transformer_impl: str = IMPLEMENTATIONS[0],
) -> None:
    """Write a checkpoint that Megatron-LM loads on ``tp`` × ``pp`` ranks.

    It is a *release*: weights without the state of an optimizer, which Megatron-LM starts training from at iteration
    0. A tensor is read once, cut, and written to every file that has a part of it. Several are at once, as far as they
    are no more together than the largest.

    Args:
        transfer: the model.
        folder: where to; made if it is not there.
        tp: tensor-parallel degree.
        pp: pipeline stages.
        transformer_impl: Megatron-LM's option of that name.

    Raises:
        CheckpointError: Megatron-LM does not have this model or this layout, with every reason, and nothing is written;
            or the source cannot be read.
        OSError: the disk is full or broken.
    """
    model, dtype = transfer.info.model, transfer.info.dtype
    if transformer_impl not in IMPLEMENTATIONS:
        raise CheckpointError(f"transformer_impl={transformer_impl!r}: {' or '.join(IMPLEMENTATIONS)}")
    if reasons := reasons_against(model) + layout_reasons(model, tp, pp):
        lines = "\n".join(f"  {reason}" for reason in reasons)
        raise CheckpointError(f"{transfer.info.path}: Megatron-LM cannot have this model\n{lines}")
    args = args_from_model(model, tp=tp, pp=pp, dtype=dtype, transformer_impl=transformer_impl)
    header = {"args": args, "checkpoint_version": 3.0, "iteration": transfer.info.step}
    rename = transformer_engine if transformer_impl == IMPLEMENTATIONS[0] else str
    files: list[_RankFile] = []
    targets: dict[str, list[_Target]] = {name: [] for name in transfer.shapes}
    for stage in range(pp):
        tensors = {rename(name): place for name, place in _stage_tensors(model, stage, pp).items()}
        shapes = {name: _local_shape(model, place, transfer.shapes[place.name], tp) for name, place in tensors.items()}
        ranks = [_RankFile(_rank_file(folder, rank, stage, pp), header, shapes, dtype) for rank in range(tp)]
        files += ranks
        for name, place in tensors.items():
            targets[place.name].append(_Target(place, name, ranks))
    run_all([partial(_write_tensor, transfer, name, targets[name]) for name in targets], cancel=transfer.cancel)
    run_all([file.flush for file in files], cancel=transfer.cancel)
    (folder / TRACKER_FILE).write_text(RELEASE, encoding="utf-8")


def _write_tensor(transfer: Transfer, name: str, targets: Sequence[_Target]) -> None:
    """One tensor, to every rank of every stage that has it; nothing of it is held afterwards."""
    with transfer.hold(name) as tensor:
        for target in targets:
            target.write(transfer.info.model, tensor)
        del tensor  # before others may take its room


def _rank_file(folder: Path, rank: int, stage: int, pp: int) -> Path:
    suffix = f"_{stage:03d}" if pp > 1 else ""
    return folder / RELEASE / f"mp_rank_{rank:02d}{suffix}" / RANK_FILE


def _stage_tensors(model: Model, stage: int, pp: int) -> dict[str, Placement]:
    """What a stage has, by its name there: its layers numbered anew, what is before them, and what is after."""
    layers = model.num_layers // pp
    first = stage * layers
    found: dict[str, Placement] = {}
    for place in placements(model):
        if place.layer is None:
            here = stage == 0 if place.foreign.startswith("embedding.") else stage == pp - 1
        else:
            here = first <= place.layer < first + layers
        if here:
            found[place.foreign_name(first)] = place
    if model.tie_embeddings and pp > 1 and stage == pp - 1:
        found[TIED_COPY] = placements(model)[0]
    return found


def _padded(model: Model, tp: int) -> int:
    assert model.vocab_size is not None
    return padded_vocabulary(model.vocab_size, VOCABULARY_DIVISOR, tp)


def _local_shape(model: Model, place: Placement, shape: Shape, tp: int) -> Shape:
    if place.split is Split.VOCABULARY:
        shape = (_padded(model, tp), *shape[1:])
    (foreign,) = place.form.foreign_shapes(shape)
    return place.split.local_shape(foreign, tp)


def _cut(model: Model, place: Placement, tensor: Tensor, tp: int) -> Iterator[Tensor]:
    """Every tensor-parallel rank's part of a full tensor, contiguous, without the padding at a vocabulary's end."""
    if place.split is Split.VOCABULARY:
        rows = _padded(model, tp) // tp
        yield from (tensor[rank * rows : (rank + 1) * rows] for rank in range(tp))
        return
    (foreign,) = place.form.to_foreign(tensor)
    yield from place.split.cut(foreign, tp)


@dataclass(frozen=True)
class _Target:
    """Where a tensor goes: a name in the files of a stage. A tied embedding goes to two stages."""

    place: Placement
    foreign: str
    ranks: Sequence[_RankFile]

    def write(self, model: Model, tensor: Tensor) -> None:
        """Deal a full tensor out to the ranks."""
        for rank, part in zip(self.ranks, _cut(model, self.place, tensor, len(self.ranks)), strict=True):
            rank.write(self.foreign, part)


class _RankFile:
    """A file of ``torch.save`` whose tensors are written one by one, in any order and by any thread.

    torch writes it with room for the tensors' bytes (``torch.serialization.skip_data``), which are filled in after. The
    checksums of those parts stay unset, as with ``torch.serialization.set_crc32_options(False)``; torch checks none.
    """

    def __init__(self, path: Path, header: Mapping[str, Any], shapes: Mapping[str, Shape], dtype: torch.dtype) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        with FakeTensorMode():
            weights = {name: torch.empty(shape, dtype=dtype) for name, shape in shapes.items()}
        with torch.serialization.skip_data(materialize_fake_tensors=True):
            torch.save({**header, "model": weights}, path)
        self._path = path
        self._parts = dict(zip(weights, _storages(path, [tensor.nbytes for tensor in weights.values()]), strict=True))

    def write(self, name: str, tensor: Tensor) -> None:
        """Fill in one tensor, or its first rows: the rest stays zero."""
        part = self._parts[name]
        if tensor.nbytes > part.size:
            raise ValueError(f"{name}: {tensor.nbytes} bytes where {part.size} have room")
        data = as_bytes(tensor)
        # Opened anew each time, so that files open at once are as many as threads, not as ranks.
        with self._path.open("r+b", buffering=0) as file:
            file.seek(part.offset)
            while data:
                data = data[file.write(data) :]

    def flush(self) -> None:
        """Force what was written to the disk."""
        with self._path.open("r+b", buffering=0) as file:
            os.fsync(file.fileno())


def _storages(path: Path, sizes: Sequence[int]) -> list[Part]:
    """Where each tensor's bytes are: the archive's ``…/data/0``, ``…/data/1``, … in the order of saving."""
    parts = {part.name.split("/", 1)[1]: part for part in read_parts(path)}
    found = [parts[f"data/{number}"] for number in range(len(sizes))]
    for part, size in zip(found, sizes, strict=True):
        if part.size != size:
            raise ValueError(f"{path}: {part.name} has room for {part.size} bytes, not {size}")
    return found
