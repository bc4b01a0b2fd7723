"""Full tensors from the slices that Megatron-LM's ranks hold, whatever files those come from.

A *chunk* is a run of layers that one pipeline rank holds; with virtual stages a rank has several. Chunks are in the
order of the model, each with one set of tensors per tensor-parallel rank.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from megalm.config.schema import Model
from megalm.convert.checks import check_size, same_values, some_of
from megalm.convert.mapping import Shape
from megalm.convert.megatron.names import (
    TIED_COPY,
    Placement,
    Split,
    canonical,
    is_ignored,
    layer_of,
    placements,
)
from megalm.convert.untrusted.safe_pickle import DTYPES, Header
from megalm.convert.weights import full_shapes
from megalm.errors import CheckpointError

_WORD_EMBEDDING = "embedding.word_embeddings.weight"


class Tensors(Protocol):
    """Some tensors by name, each readable on its own."""

    path: Path
    headers: dict[str, Header]

    def get(self, name: str) -> Tensor:
        """One of them."""


class RankTensors:
    """What one tensor-parallel rank holds of a chunk, by the names of ``megatron_names``.

    Args:
        stored: the tensors as they are stored.
        prefix: begins the names of those that belong to this chunk.
    """

    def __init__(self, stored: Tensors, prefix: str = "") -> None:
        self.path = stored.path
        self._stored = stored
        self._names: dict[str, str] = {}
        for name in stored.headers:
            ours = canonical(name.removeprefix(prefix))
            if not name.startswith(prefix) or is_ignored(ours):
                continue
            if ours in self._names:
                raise CheckpointError(f"{self.path}: {name} and {self._names[ours]} are two names of one tensor")
            self._names[ours] = name
        self.headers: dict[str, Header] = {ours: stored.headers[name] for ours, name in self._names.items()}

    def get(self, name: str) -> Tensor:
        """One tensor."""
        return self._stored.get(self._names[name])

    def as_stored(self, name: str) -> str:
        """What a tensor is called in the file."""
        return self._names.get(name, name)


@dataclass(frozen=True)
class _Slices:
    """A megalm tensor, and the ranks' parts of it."""

    place: Placement
    foreign: str
    ranks: Sequence[RankTensors]


class MegatronWeights:
    """The tensors of a model, cut over ranks.

    Args:
        path: what the user named.
        model: the architecture.
        chunks: see above.

    Raises:
        CheckpointError: a tensor is missing, unknown, or of another shape or dtype.
    """

    def __init__(self, path: Path, model: Model, chunks: Sequence[Sequence[RankTensors]]) -> None:
        self.path, self.model = path, model
        self.notes: tuple[str, ...] = ()
        self._check_size(chunks)
        self._shapes = full_shapes(model)
        self._slices = self._locate(chunks)
        self._tied_copies = self._find_tied_copies(chunks)
        self.dtype = self._check(chunks)

    def read(self, name: str) -> Tensor:
        """One full tensor by megalm's name, contiguous."""
        slices = self._slices[name]
        place = slices.place
        parts = [rank.get(slices.foreign) for rank in slices.ranks]
        for part, copy in zip(parts, self._tied_copies, strict=False) if name == "embedding.weight" else ():
            if not same_values(part, copy()):
                raise CheckpointError(
                    f"{self.path}: the word embedding on the first stage and its copy on the last differ, and args tie "
                    "them; the checkpoint is damaged, or its args.untie_embeddings_and_output_weights is wrong"
                )
        joined = place.split.join(parts)
        if place.split is Split.VOCABULARY:
            joined = joined[: self.model.vocab_size]
        return place.form.to_megalm([joined]).contiguous()

    def _check_size(self, chunks: Sequence[Sequence[RankTensors]]) -> None:
        headers = [header for ranks in chunks for rank in ranks for header in rank.headers.values()]
        check_size(self.path, self.model, sum(header.numel for header in headers), len(headers))

    def _locate(self, chunks: Sequence[Sequence[RankTensors]]) -> dict[str, _Slices]:
        """The chunk of every tensor: layers are numbered anew in each."""
        chunk_of: list[int] = []
        first_layers: list[int] = []
        for number, ranks in enumerate(chunks):
            first_layers.append(len(chunk_of))
            chunk_of += [number] * _layer_count(ranks[0])
        if len(chunk_of) != self.model.num_layers:
            raise CheckpointError(
                f"{self.path}: its stages have {len(chunk_of)} layers together, args.num_layers={self.model.num_layers}"
            )
        last = len(chunks) - 1
        found = {}
        for place in placements(self.model):
            outside = 0 if place.foreign.startswith("embedding.") else last
            number = outside if place.layer is None else chunk_of[place.layer]
            found[place.name] = _Slices(place, place.foreign_name(first_layers[number]), chunks[number])
        return found

    def _find_tied_copies(self, chunks: Sequence[Sequence[RankTensors]]) -> list[Callable[[], Tensor]]:
        """The last stage's copy of a tied embedding, by tensor-parallel rank; empty where there is none."""
        if not self.model.tie_embeddings or any(TIED_COPY not in rank.headers for rank in chunks[-1]):
            return []

        def reader(rank: RankTensors) -> Callable[[], Tensor]:
            return lambda: rank.get(TIED_COPY)

        return [reader(rank) for rank in chunks[-1]]

    def _check(self, chunks: Sequence[Sequence[RankTensors]]) -> torch.dtype:
        """Prove by shapes and dtypes that the tensors are those of the model; returns their dtype."""
        wanted: dict[RankTensors, dict[str, Shape]] = {rank: {} for ranks in chunks for rank in ranks}
        for name, slices in self._slices.items():
            (shape,) = slices.place.form.foreign_shapes(self._shapes[name])
            for rank in slices.ranks:
                wanted[rank][slices.foreign] = _local_shape(slices, shape)
        problems = [line for rank, shapes in wanted.items() for line in _problems(rank, shapes, self._tied_copies)]
        if problems:
            raise CheckpointError(some_of(problems))
        self._check_vocabulary()
        dtypes = {rank.headers[name].dtype for rank, shapes in wanted.items() for name in shapes}
        if len(dtypes) > 1 or not dtypes <= set(DTYPES):
            listed = ", ".join(sorted(map(str, dtypes)))
            raise CheckpointError(f"{self.path}: weights of dtype {listed}; convert models of one dtype of {DTYPES}")
        return dtypes.pop()

    def _check_vocabulary(self) -> None:
        """Padded rows of all ranks must hold the words, and ranks must share them evenly."""
        for slices in self._slices.values():
            if slices.place.split is Split.VOCABULARY:
                rows = [rank.headers[slices.foreign].shape[0] for rank in slices.ranks]
                if sum(rows) < (self.model.vocab_size or 0):
                    raise CheckpointError(
                        f"{self.path}: {slices.foreign} has {sum(rows):,} rows on {len(rows)} ranks, fewer than the "
                        f"vocabulary's {self.model.vocab_size:,} words"
                    )


def _layer_count(rank: RankTensors) -> int:
    layers = {layer for name in rank.headers if (layer := layer_of(name)) is not None}
    if layers != set(range(len(layers))):
        raise CheckpointError(f"{rank.path}: its layers are numbered {sorted(layers)[:12]}, not from 0 on")
    return len(layers)


def _local_shape(slices: _Slices, shape: Shape) -> Shape:
    """What one rank must have. The padding of a vocabulary follows from what the first rank has."""
    if slices.place.split is not Split.VOCABULARY:
        return slices.place.split.local_shape(shape, len(slices.ranks))
    first = slices.ranks[0].headers.get(slices.foreign)
    rows = first.shape[0] if first is not None and first.shape else -(-shape[0] // len(slices.ranks))
    return (rows, *shape[1:])


def _problems(rank: RankTensors, wanted: Mapping[str, Shape], tied_copies: Sequence[object]) -> list[str]:
    """What does not fit between a rank's tensors and what it should have."""
    lines = [f"{rank.path}: {name}: missing" for name in wanted if name not in rank.headers]
    lines += [
        f"{rank.path}: {rank.as_stored(name)}: shape {list(rank.headers[name].shape)}, expected {list(shape)}"
        for name, shape in wanted.items()
        if name in rank.headers and rank.headers[name].shape != shape
    ]
    lines += [
        f"{rank.path}: {rank.as_stored(name)}: not a tensor of this model"
        for name in rank.headers
        if name not in wanted and not (name == TIED_COPY and tied_copies)
    ]
    return lines
