"""A run's weights in this process: the whole model, or one rank's part of it, whatever layout wrote them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from megalm.checkpoint.pieces import BUFFER, WEIGHT
from megalm.checkpoint.reader import CheckpointReader
from megalm.config.schema import Config, Engine
from megalm.core.attention.context_parallel import ContextParallel
from megalm.core.dtype import DTYPES
from megalm.core.tensor_parallel import TensorParallel
from megalm.data.shards.vocabulary import Vocabulary
from megalm.data.tokenization.tokenizer import Tokenizer
from megalm.errors import ConfigError
from megalm.mesh.groups import ParallelContext
from megalm.models.balance import split_layers
from megalm.models.transformer import Part, Transformer
from megalm.objectives.base import Objective
from megalm.objectives.registry import make_objective
from megalm.runs.find import FoundModel, KnownModel, find_model


@dataclass(frozen=True)
class TrainedModel:
    """A model ready to be asked.

    Attributes:
        model: token ids [B, S] ▶ logits [B, S, V]; with the heads of its objective. On several ranks, this one's part.
        objective: what it was trained for.
        found: where it is from, its config and its tokenizer.
        context: this rank's place and groups.
        in_training: whether a trainer changes the weights between questions, which must stay where they lie in memory.
    """

    model: Transformer
    objective: Objective
    found: KnownModel
    context: ParallelContext
    in_training: bool = False

    @property
    def tokenizer(self) -> Tokenizer:
        """The one that it was trained with."""
        return self.found.tokenizer

    @property
    def config(self) -> Config:
        """Of the run, overrides applied."""
        return self.found.config

    @property
    def checkpoint(self) -> Path:
        """The folder that the weights are from."""
        return self.found.checkpoint

    @property
    def vocabulary(self) -> Vocabulary:
        """The tokenizer, as data are compared with it."""
        return self.found.vocabulary

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self.context.device


def load_full_model(run: str | Path, overrides: Sequence[str] = ()) -> TrainedModel:
    """The whole model of a run in one process; arguments and errors as for :func:`megalm.runs.find.find_model`."""
    found = find_model(run, overrides, world_size=1)
    return load_part(found, ParallelContext.single(device_of_one_process(found.config.launch.device)))


def load_part(found: FoundModel, context: ParallelContext) -> TrainedModel:
    """One rank's part of a model, filled from the checkpoint one tensor at a time: no rank holds more than its own
    part and the tensor that it reads.

    Raises:
        CheckpointError: the checkpoint does not fit the config, or is damaged.
    """
    config, vocab_size = found.config, found.vocab_size
    layers = split_layers(config, vocab_size)
    objective = make_objective(config.objective)
    with _default_dtype(DTYPES[config.engine.dtype]):
        model = Transformer(
            config.model,
            vocab_size,
            part=Part({stage: layers[stage] for stage in context.stages}, context.topology.num_stages),
            tensor_parallel=TensorParallel(context.tp_group),
            context_parallel=ContextParallel(),
            engine=Engine(),
            objective=objective,
            seed=config.run.seed,
            device=context.device,
        )
    load_weights(model, found.checkpoint)
    return TrainedModel(model.eval(), objective, found, context)


def load_weights(model: Transformer, checkpoint: Path) -> None:
    """Fill every parameter of a model, or of a rank's part of one, from a checkpoint, in place."""
    reader = CheckpointReader(checkpoint)
    tensors = model.tensors()
    whole = len(model.part.stages) == model.part.num_stages
    reader.check_parameters({t.name: t.shard.full_shape for t in tensors}, whole_model=whole)
    with torch.no_grad():
        for t in tensors:
            reader.read_into(t.tensor, t.name, BUFFER if t.record.is_buffer else WEIGHT, t.shard)


def device_of_one_process(name: str) -> torch.device:
    """The device of a single process: ``auto`` takes CUDA where there is one."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigError("launch.device=cuda: this machine has no CUDA device; launch.device=cpu")
    return torch.device(name)


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """Parameters made meanwhile have this dtype from the first: never twice the memory for a cast."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
