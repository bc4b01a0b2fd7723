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

from megalm.data.objectives import make_objective
from megalm.data.shards.dataset import AS_THE_MODELS, open_datasets, other_marks, with_validation
from megalm.data.shards.vocabulary import Vocabulary, check_same
from megalm.data.stream.loader import Batch, label_counts, validation_batches
from megalm.data.stream.sequences import Corpora
from megalm.engine.micro_batches import evaluation_place
from megalm.errors import DataError
from megalm.runs.load import TrainedModel, load_full_model


def run_evaluate(run_dir: str | Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Evaluate a run's newest checkpoint in one process, whatever layout it was trained with.

    Args:
        run_dir: folder of the run.
        overrides: ``field=value`` changes to the run's config: ``data.path`` evaluates on other data,
            ``train.micro_batch_size`` sets the batch.

    Returns:
        ``run``, ``checkpoint`` and ``data`` as text; ``val_loss`` in nats per token; ``val_perplexity``;
        ``val_accuracy``, the share of tokens that the model holds most likely; ``val_commonest``, that of always
        guessing the commonest token; ``tokens`` that these are the means of; and ``note``, where documents begin or
        end otherwise than those that the run was trained with.

    Raises:
        ConfigError, CheckpointError, DataError: see :func:`megalm.runs.load.load_full_model`; and the data are not
            there, or were made by another tokenizer.
    """
    trained = load_full_model(run_dir, overrides)
    config = trained.config
    datasets = with_validation(open_datasets(config.data))
    if not datasets:
        raise DataError(
            f"data.path={' '.join(config.data.path)}: was prepared without validation documents; "
            "data.path=DIR evaluates on another dataset"
        )
    corpora = Corpora.open([dataset.below("val") for dataset in datasets], config.model.sequence_length)
    where = ", ".join(dataset.location for dataset in datasets)
    for dataset in datasets:
        check_same(
            trained.vocabulary,
            Vocabulary.of_dataset(dataset, "val"),
            f"data.path={dataset.location}",
            "so its perplexity would mean nothing",
        )
    batches = validation_batches(
        corpora,
        None,
        config.train.micro_batch_size,
        dp_rank=0,
        dp_size=1,
        objective=make_objective(config.objective, config.run.seed, trained.tokenizer),
    )
    loss, accuracy, commonest, tokens = scores(trained, batches, corpora)
    marks = other_marks(trained.tokenizer, corpora.shards[0].index)
    note = f"{marks}: the perplexity is of documents as they are in these data; {AS_THE_MODELS}"
    return {
        "run": str(run_dir),
        "checkpoint": str(trained.checkpoint),
        "data": where,
        "val_loss": loss,
        "val_perplexity": _perplexity(loss),
        "val_accuracy": accuracy,
        "val_commonest": commonest,
        "tokens": tokens,
        **({} if marks is None else {"note": note}),
    }


@torch.inference_mode()
def scores(trained: TrainedModel, batches: Iterable[Batch], corpora: Corpora) -> tuple[float, float, float, int]:
    """Over all loss tokens: mean cross-entropy in nats, accuracy, that of the commonest token, and their number."""
    loss_sum, correct = 0.0, 0.0
    counts = torch.zeros(corpora.vocab_size, dtype=torch.float64)
    eos_id = corpora.eos_id if trained.config.data.reset_at_documents else None
    for batch in batches:
        trained.check_tokens(int(batch.tokens.max()), "the validation split")
        place = evaluation_place(batch.tokens, eos_id, trained.device)
        logits = trained.model(batch.tokens.to(trained.device), place).float()  # [B, S, V]
        losses = F.cross_entropy(logits.flatten(0, 1), batch.labels.to(trained.device).flatten(), reduction="none")
        mask = batch.loss_mask.to(trained.device).flatten()  # [B·S]
        loss_sum += float((losses * mask).double().sum())
        right = logits.argmax(-1).flatten() == batch.labels.to(trained.device).flatten()
        correct += float((right * mask).double().sum())
        counts += label_counts(batch, corpora.vocab_size)
    tokens = int(counts.sum())
    if tokens == 0:
        raise DataError("the validation split has no tokens that a loss could be computed of; prepare more text")
    return loss_sum / tokens, correct / tokens, float(counts.max()) / tokens, tokens


def _perplexity(loss: float) -> float:
    return math.exp(loss) if loss < 709 else math.inf
