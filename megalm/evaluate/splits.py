"""What a run's objective reports over whole validation splits, on all ranks of a model."""

from __future__ import annotations

from typing import Any

from megalm.core.pipeline.runner import PipelineRunner
from megalm.data.shards.dataset import open_datasets, with_validation
from megalm.data.stream.batch import Batch, Ints, MakeBatch, Rows
from megalm.data.stream.sequences import Corpora
from megalm.engine.validation import Validator, reported
from megalm.generate.ranks import OnRank
from megalm.models.micro_batch import MicroBatch
from megalm.runs.load import TrainedModel

SCORES = "megalm.evaluate.splits:scores"


def scores(rank: OnRank, payload: Any) -> dict[str, float | int | None]:  # noqa: ARG001 - the config says it all
    """By the names of ``metrics.jsonl``; replicas share the sequences.

    Raises:
        DataError: the model has no embedding of a token.
    """
    trained = rank.trained
    config, objective, context = trained.config, trained.objective, trained.context
    corpora = open_splits(trained)
    runner: PipelineRunner[MicroBatch] = PipelineRunner(
        trained.model.run,
        context,
        schedule="1f1b",
        between_stages=trained.model.between_stages(config.train.micro_batch_size, config.model.sequence_length),
        early_receives=config.parallel.early_receives,
    )
    make_batch = _checked(trained, objective.make_batch(trained.tokenizer, config.run.seed))
    validator = Validator(config, context, corpora, objective, make_batch)
    return validator.scores(
        lambda batches: reported(runner.evaluate(batches), objective.measures, context),
        trained.model.context_parallel,
    )


def open_splits(trained: TrainedModel) -> Corpora:
    """The validation splits of the datasets that ``data.path`` names."""
    config = trained.config
    datasets = with_validation(open_datasets(config.data))
    return Corpora.open(
        [dataset.below("val") for dataset in datasets],
        config.model.sequence_length,
        trained.objective.sequences_per_example,
    )


def _checked(trained: TrainedModel, make_batch: MakeBatch) -> MakeBatch:
    """The same, after a look at the ids."""

    def made(rows: Rows, samples: Ints) -> Batch:
        batch = make_batch(rows, samples)
        trained.found.check_tokens(int(batch.tokens.max()), "the validation split")
        return batch

    return made
