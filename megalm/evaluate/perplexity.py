"""``megalm evaluate``: loss and perplexity of a run over a whole validation split.

Shapes: B batch, S sequence length, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F

from megalm.data.loader import Batch, validation_batches
from megalm.data.objectives import OBJECTIVES
from megalm.data.shards import TokenShards
from megalm.errors import DataError
from megalm.generate.load import TrainedModel, load_full_model


def run_evaluate(run_dir: str | Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Evaluate a run's newest checkpoint in one process, whatever layout it was trained with.

    Args:
        run_dir: folder of the run.
        overrides: ``field=value`` changes to the run's config: ``data.path`` evaluates on other data,
            ``train.micro_batch_size`` sets the batch.

    Returns:
        ``run``, ``checkpoint`` and ``data`` as text; ``val_loss`` in nats per token; ``val_perplexity``; ``tokens``
        that the loss is the mean of.

    Raises:
        ConfigError, CheckpointError, DataError: see :func:`megalm.generate.load.load_full_model`; and the data are not
            there, or were made by another tokenizer.
    """
    trained = load_full_model(run_dir, overrides)
    config = trained.config
    folder = Path(config.data.path) / "val"
    dataset = TokenShards(folder, config.model.sequence_length)
    if dataset.index.tokenizer_sha256 != trained.tokenizer.sha256:
        raise DataError(
            f"data.path={config.data.path}: made by another tokenizer than the run's, so its perplexity would mean "
            "nothing; prepare the text with the tokenizer.json of the run"
        )
    batches = validation_batches(
        dataset,
        None,
        config.train.micro_batch_size,
        dp_rank=0,
        dp_size=1,
        objective=OBJECTIVES[config.objective.name](),
    )
    loss, tokens = mean_loss(trained, batches)
    return {
        "run": str(run_dir),
        "checkpoint": str(trained.checkpoint),
        "data": str(folder),
        "val_loss": loss,
        "val_perplexity": _perplexity(loss),
        "tokens": tokens,
    }


@torch.inference_mode()
def mean_loss(trained: TrainedModel, batches: Iterable[Batch]) -> tuple[float, int]:
    """Mean cross-entropy over the loss tokens of all batches, in nats, and how many they are."""
    loss_sum, tokens = 0.0, 0
    for batch in batches:
        logits = trained.model(batch.tokens.to(trained.device)).float()  # [B, S, V]
        losses = F.cross_entropy(logits.flatten(0, 1), batch.labels.to(trained.device).flatten(), reduction="none")
        mask = batch.loss_mask.to(trained.device).flatten()  # [B·S]
        loss_sum += float((losses * mask).double().sum())
        tokens += int(mask.sum())
    if tokens == 0:
        raise DataError("the validation split has no tokens that a loss could be computed of; prepare more text")
    return loss_sum / tokens, tokens


def _perplexity(loss: float) -> float:
    return math.exp(loss) if loss < 709 else math.inf
