"""``megalm evaluate``: loss and perplexity of a run over a whole validation split."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from megalm.data.shards.dataset import AS_THE_MODELS, open_datasets, other_marks, with_validation
from megalm.data.shards.vocabulary import Vocabulary, check_same
from megalm.data.stream.loader import validation_batches
from megalm.data.stream.sequences import Corpora
from megalm.engine.micro_batches import evaluation_micro_batch
from megalm.errors import DataError
from megalm.runs.load import TrainedModel, load_full_model


def run_evaluate(run_dir: str | Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Evaluate a run's newest checkpoint in one process, whatever layout it was trained with.

    Args:
        run_dir: folder of the run.
        overrides: ``field=value`` changes to the run's config: ``data.path`` evaluates on other data,
            ``train.micro_batch_size`` sets the batch.

    Returns:
        ``run``, ``checkpoint`` and ``data`` as text; what the run's objective reports, for language models ``val_loss``
        in nats per token, ``val_perplexity``, ``val_accuracy`` (share of tokens that the model holds most likely),
        ``val_commonest`` (that of always guessing the commonest token) and ``tokens`` (how many these are means over);
        and ``note``, where documents begin or end otherwise than those that the run was trained with.

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
    corpora = Corpora.open(
        [dataset.below("val") for dataset in datasets],
        config.model.sequence_length,
        trained.objective.sequences_per_example,
    )
    where = ", ".join(dataset.location for dataset in datasets)
    for dataset in datasets:
        check_same(
            trained.vocabulary,
            Vocabulary.of_dataset(dataset, "val"),
            f"data.path={dataset.location}",
            "so its perplexity would mean nothing",
        )
    found = scores(trained, corpora)
    units = f"{trained.objective.unit}s"
    marks = other_marks(trained.tokenizer, corpora.shards[0].index)
    note = f"{marks}: the perplexity is of documents as they are in these data; {AS_THE_MODELS}"
    return {
        "run": str(run_dir),
        "checkpoint": str(trained.checkpoint),
        "data": where,
        **{name: value for name, value in found.items() if name != f"val_{units}"},
        units: found[f"val_{units}"],
        **({} if marks is None else {"note": note}),
    }


@torch.inference_mode()
def scores(trained: TrainedModel, corpora: Corpora) -> dict[str, float | int | None]:
    """What the run's objective reports over whole validation splits, by the names of ``metrics.jsonl``.

    Raises:
        DataError: nothing in the split carries loss.
    """
    config, objective = trained.config, trained.objective
    batches = validation_batches(
        corpora,
        None,
        config.train.micro_batch_size,
        make_batch=objective.make_batch(trained.tokenizer, config.run.seed),
        dp_rank=0,
        dp_size=1,
        reset_at_documents=config.data.reset_at_documents,
    )
    sums = dict.fromkeys(objective.measures, 0.0)
    counts = np.zeros(objective.num_counts(corpora.vocab_size))
    for batch in batches:
        trained.check_tokens(int(batch.tokens.max()), "the validation split")
        micro_batch = evaluation_micro_batch(batch, trained.device, trained.model.context_parallel)
        for name, value in trained.model.run(0, None, micro_batch).items():
            sums[name] += float(value)
        counts += objective.counts(batch, corpora.vocab_size)
    if not counts.sum():
        raise DataError("the validation split has no tokens that a loss could be computed of; prepare more text")
    return objective.scores(sums, counts)
