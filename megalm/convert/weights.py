"""What every format is converted through: an architecture and its full tensors, by megalm's names, one at a time.

A format that can be read is a :class:`WeightSource`; a format that can be written takes one. Tensors are whole (no
tensor-parallel slices, no padding of the vocabulary) and in megalm's arrangement; their dtype is that of the source.
Names, shapes and slices of a model follow from its architecture alone: :func:`declared_of` and :func:`full_shapes`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from megalm.config.schema import Engine, Model
from megalm.convert.huggingface.token_ids import TokenIds
from megalm.core.attention.context_parallel import ContextParallel
from megalm.core.parameters import DeclaredTensor
from megalm.core.tensor_parallel import TensorParallel
from megalm.errors import CheckpointError
from megalm.mesh.groups import Group
from megalm.models.transformer import Part, Transformer


@dataclass(frozen=True)
class SourceInfo:
    """Metadata of a model, read before any of its tensors.

    Attributes:
        format: name of the format, as on the command line.
        path: what the user named.
        model: architecture; ``vocab_size`` is the true one, without padding.
        dtype: of the stored weights.
        step: optimizer steps that the weights have seen; 0 where the format does not say.
        tokenizer: folder that holds ``tokenizer.json`` or other files of the tokenizer; None: there is none.
        notes: one line for each thing that the source holds and a conversion leaves out.
        architecture: ``model_type`` of the Hugging Face folder that the weights once were in; empty: they were in none.
        ids: of special tokens, as the model's Hugging Face folder gave them; None: it has none, or was trained since.
    """

    format: str
    path: Path
    model: Model
    dtype: torch.dtype
    step: int = 0
    tokenizer: Path | None = None
    notes: tuple[str, ...] = field(default=())
    architecture: str = ""
    ids: TokenIds | None = None


class WeightSource(ABC):
    """A model in some format, opened for reading: everything but the tensors has been read and checked.

    A constructor raises :class:`CheckpointError` where a file is missing, damaged, not what it says, or describes a
    model that megalm does not have. It reads no tensor.
    """

    info: SourceInfo

    @abstractmethod
    def read(self, name: str) -> Tensor:
        """One full tensor by megalm's name, contiguous; memory is bounded by it, and it may be a view of a mapped file.

        Must be safe to call from several threads at once.

        Raises:
            CheckpointError: the tensor is missing, has another shape or dtype, or its bytes are damaged.
        """

    def close(self) -> None:  # noqa: B027 - most formats keep nothing open
        """Close open files."""


def declared_of(model: Model, *, tp: int = 1, tp_rank: int = 0, part: Part | None = None) -> list[DeclaredTensor]:
    """The parameters of one tensor-parallel rank's stages, without memory: names, slices of full tensors, meta tensors.

    Args:
        model: architecture, its ``vocab_size`` set.
        tp: tensor-parallel degree.
        tp_rank: the rank.
        part: which stages; None: the whole model as one stage.
    """
    if model.vocab_size is None:
        raise CheckpointError("the model's vocab_size is not known")
    with torch.device("meta"):
        stages = Transformer(
            model,
            model.vocab_size,
            part=part or Part({0: range(model.num_layers)}, 1),
            tensor_parallel=TensorParallel(Group(tuple(range(tp)), tp_rank)),
            context_parallel=ContextParallel(),
            engine=Engine(),
            objective=None,
            seed=0,
            device=torch.device("meta"),
        )
    return stages.tensors()


def full_shapes(model: Model) -> dict[str, tuple[int, ...]]:
    """Shape of every full tensor by name, in the order of the model; a tied output projection is not among them."""
    return {p.name: p.shard.full_shape for p in declared_of(model)}
