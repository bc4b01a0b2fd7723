"""A run's weights as one whole model in one process, whatever layout wrote them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from megalm.checkpoint.manifest import BUFFER, WEIGHT, read_manifest
from megalm.checkpoint.reader import CheckpointReader
from megalm.checkpoint.store import locate
from megalm.config.compose import load_run_config
from megalm.config.schema import Config
from megalm.core.dtype import DTYPES
from megalm.data.shards.dataset import TOKENIZER_FILE
from megalm.data.shards.vocabulary import Vocabulary
from megalm.data.tokenization.tokenizer import Tokenizer
from megalm.errors import ConfigError, DataError
from megalm.models.counts import resolve_vocab_size
from megalm.models.transformer import Transformer, build_full_model
from megalm.objectives.base import Objective
from megalm.objectives.registry import make_objective
from megalm.runs.vocabulary import check_own_tokenizer


@dataclass(frozen=True)
class TrainedModel:
    """A model ready to be asked.

    Attributes:
        model: token ids [B, S] ▶ logits [B, S, V]; with the heads of its objective.
        objective: what it was trained for.
        tokenizer: the one that it was trained with.
        config: of the run, overrides applied.
        device: where the model is.
        checkpoint: the folder that the weights are from.
        vocabulary: the tokenizer, as data are compared with it.
    """

    model: Transformer
    objective: Objective
    tokenizer: Tokenizer
    config: Config
    device: torch.device
    checkpoint: Path
    vocabulary: Vocabulary

    def check_tokens(self, largest: int, what: str) -> None:
        """Refuse ids that the model has no embedding of: a tokenizer may have more words than its model.

        Raises:
            DataError: naming the token.
        """
        rows = self.model.output_embedding.weight.shape[0]
        if largest >= rows:
            raise DataError(
                f"{what}: has token {largest} ({self.tokenizer.name_of(largest)}), and the model has {rows:,} rows; "
                f"{self.vocabulary} has more words than the model: a new run with checkpoint.init_from and "
                "checkpoint.extend_vocab=true learns them"
            )


def load_full_model(run_dir: str | Path, overrides: Sequence[str] = ()) -> TrainedModel:
    """The model of a run, from its newest complete checkpoint; ``checkpoint.resume=PATH`` names another.

    Args:
        run_dir: folder of the run.
        overrides: ``field=value`` changes to the run's config.

    Raises:
        ConfigError: the folder is no run, or an override is wrong.
        CheckpointError: there is no complete checkpoint, or it does not fit the config.
        DataError: the run's tokenizer is missing.
    """
    run_dir = Path(run_dir)
    # What the run itself was resumed from is not what it has learnt since.
    config = load_run_config(run_dir, ["checkpoint.resume=auto", *overrides])
    tokenizer = Tokenizer.load(run_dir / TOKENIZER_FILE)
    resume = config.checkpoint.resume
    checkpoint = locate(run_dir if resume in ("auto", "never") else resume).path
    vocabulary = Vocabulary.of(tokenizer, run_dir / TOKENIZER_FILE)
    check_own_tokenizer(checkpoint, read_manifest(checkpoint), vocabulary)
    device = device_of_one_process(config.launch.device)
    vocab_size = resolve_vocab_size(config.model, tokenizer.vocab_size)
    objective = make_objective(config.objective)
    model = build_full_model(
        config.model, vocab_size, objective=objective, dtype=DTYPES[config.engine.dtype], device=str(device)
    )
    load_weights(model, checkpoint)
    return TrainedModel(model.eval(), objective, tokenizer, config, device, checkpoint, vocabulary)


def load_weights(model: Transformer, checkpoint: Path) -> None:
    """Fill every parameter of a whole model from a checkpoint, in place, one tensor at a time."""
    reader = CheckpointReader(checkpoint)
    tensors = model.tensors()
    reader.check_parameters({t.name: t.shard.full_shape for t in tensors}, whole_model=True)
    with torch.no_grad():
        for t in tensors:
            t.tensor.copy_(reader.read_local(t.name, BUFFER if t.record.is_buffer else WEIGHT, t.shard))


def device_of_one_process(name: str) -> torch.device:
    """The device of a single process: ``auto`` takes CUDA where there is one."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigError("launch.device=cuda: this machine has no CUDA device; launch.device=cpu")
    return torch.device(name)
