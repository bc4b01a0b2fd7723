"""Writes Megatron-LM checkpoints: one file per rank, tensor by tensor, with no rank's share ever in memory."""

from __future__ import annotations

import os
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from megalm.checkpoint.adapters.mapping import Shape
from megalm.checkpoint.adapters.megatron_args import (
    VOCABULARY_DIVISOR,
    args_from_model,
    layout_reasons,
    reasons_against,
)
from megalm.checkpoint.adapters.megatron_names import (
    TIED_COPY,
    Placement,
    Split,
    padded_vocabulary,
    placements,
    transformer_engine,
)
from megalm.checkpoint.adapters.megatron_read import RANK_FILE, RELEASE, TRACKER_FILE
from megalm.checkpoint.adapters.weights import WeightSource, full_shapes
from megalm.checkpoint.tensor_file import as_bytes
from megalm.config.schema import Model
from megalm.errors import CheckpointError

IMPLEMENTATIONS = ("transformer_engine", "local")
"""What Megatron-LM's ``--transformer-impl`` chooses from, its default first; tensors' names differ."""

_LOCAL_HEADER_BYTES = 30
"""Of a file in a zip archive, before its name and its extra field, whose lengths are its last four bytes."""


def write_megatron(
    source: WeightSource,
    folder: Path,
    *,
    tp: int,
    pp: int,
    dtype: torch.dtype,
    on_tensor: Callable[[str, Tensor], None],
    transformer_impl: str = IMPLEMENTATIONS[0],
) -> None:
    """Write a checkpoint that Megatron-LM loads on ``tp`` × ``pp`` ranks.

    It is a *release*: weights without the state of an optimizer, which Megatron-LM starts training from at iteration
    0. A tensor is read once, cut, and written to every rank's file of its stage; memory is bounded by it.

    Args:
        source: the weights.
        folder: where to; made if it is not there.
        tp: tensor-parallel degree.
        pp: pipeline stages.
        dtype: of the weights there.
        on_tensor: called with every full tensor, as it was read, by megalm's name.
        transformer_impl: Megatron-LM's option of that name.

    Raises:
        CheckpointError: Megatron-LM does not have this model or this layout, with every reason; nothing is written.
    """
    model = source.info.model
    if transformer_impl not in IMPLEMENTATIONS:
        raise CheckpointError(f"transformer_impl={transformer_impl!r}: {' or '.join(IMPLEMENTATIONS)}")
    if reasons := reasons_against(model) + layout_reasons(model, tp, pp):
        lines = "\n".join(f"  {reason}" for reason in reasons)
        raise CheckpointError(f"{source.info.path}: Megatron-LM cannot have this model\n{lines}")
    args = args_from_model(model, tp=tp, pp=pp, dtype=dtype, transformer_impl=transformer_impl)
    header = {"args": args, "checkpoint_version": 3.0, "iteration": source.info.step}
    shapes = full_shapes(model)
    for stage in range(pp):
        tensors = _stage_tensors(model, stage, pp)
        rename = transformer_engine if transformer_impl == IMPLEMENTATIONS[0] else str
        foreign = {rename(name): place for name, place in tensors.items()}
        locals_ = {name: _local_shape(model, place, shapes[place.name], tp) for name, place in foreign.items()}
        with ExitStack() as files:
            ranks = [
                files.enter_context(_RankFile(_rank_file(folder, rank, stage, pp), header, locals_, dtype))
                for rank in range(tp)
            ]
            for name, place in foreign.items():
                is_copy = model.tie_embeddings and name == TIED_COPY
                _write_tensor(source, place, name, ranks, dtype, on_tensor if not is_copy else _ignore)
    (folder / TRACKER_FILE).write_text(RELEASE, encoding="utf-8")


def _write_tensor(
    source: WeightSource,
    place: Placement,
    name: str,
    ranks: Sequence[_RankFile],
    dtype: torch.dtype,
    on_tensor: Callable[[str, Tensor], None],
) -> None:
    """One tensor, to every rank; nothing of it is held afterwards."""
    tensor = source.read(place.name)
    on_tensor(place.name, tensor)
    for rank, part in zip(ranks, _cut(source.info.model, place, tensor.to(dtype), len(ranks)), strict=True):
        rank.write(name, part)


def _ignore(name: str, tensor: Tensor) -> None:
    """A tensor that has passed before."""


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


class _RankFile:
    """A file of ``torch.save`` whose tensors are written one by one.

    torch writes it with room for the tensors' bytes (``torch.serialization.skip_data``), which are filled in after. The
    checksums of those parts stay unset, as with ``torch.serialization.set_crc32_options(False)``; torch checks none.
    """

    def __init__(self, path: Path, header: Mapping[str, Any], shapes: Mapping[str, Shape], dtype: torch.dtype) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        with FakeTensorMode():
            weights = {name: torch.empty(shape, dtype=dtype) for name, shape in shapes.items()}
        with torch.serialization.skip_data(materialize_fake_tensors=True):
            torch.save({**header, "model": weights}, path)
        offsets = _storage_offsets(path, [tensor.nbytes for tensor in weights.values()])
        self._offsets = dict(zip(weights, offsets, strict=True))
        self._nbytes = {name: tensor.nbytes for name, tensor in weights.items()}
        self._file = path.open("r+b", buffering=0)

    def write(self, name: str, tensor: Tensor) -> None:
        """Fill in one tensor, or its first rows: the rest stays zero."""
        if tensor.nbytes > self._nbytes[name]:
            raise ValueError(f"{name}: {tensor.nbytes} bytes where {self._nbytes[name]} have room")
        data = as_bytes(tensor)
        self._file.seek(self._offsets[name])
        while data:
            data = data[self._file.write(data) :]

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        with self._file:
            os.fsync(self._file.fileno())


def _storage_offsets(path: Path, sizes: Sequence[int]) -> list[int]:
    """Where each tensor's bytes begin: they are the archive's ``…/data/0``, ``…/data/1``, … in the order of saving."""
    with zipfile.ZipFile(path) as archive:
        members = {member.filename.split("/", 1)[1]: member for member in archive.infolist()}
    offsets = []
    with path.open("rb") as file:
        for number, size in enumerate(sizes):
            member = members[f"data/{number}"]
            if member.file_size != size:
                raise ValueError(f"{path}: {member.filename} has room for {member.file_size} bytes, not {size}")
            file.seek(member.header_offset + _LOCAL_HEADER_BYTES - 4)
            lengths = file.read(4)
            extra = int.from_bytes(lengths[:2], "little") + int.from_bytes(lengths[2:], "little")
            offsets.append(member.header_offset + _LOCAL_HEADER_BYTES + extra)
    return offsets
