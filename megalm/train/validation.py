"""Validation on all ranks: the training pipeline, forward only."""

from __future__ import annotations

from itertools import islice

import torch

from megalm.config.schema import Config
from megalm.core.groups import ParallelContext
from megalm.data.loader import validation_batches
from megalm.data.shards import TokenShards
from megalm.engine.deepspeed_engine import DeepSpeedEngine
from megalm.engine.micro_batches import validation_micro_batch

_MICRO_BATCHES_PER_STAGE = 4
"""Micro-batches per pass and stage: enough to keep the forward-only pipeline full, few enough to hold at once."""


class Validator:
    """Mean loss over the validation split.

    Args:
        config: micro-batch size.
        context: this rank's place and groups.
        dataset: the validation split.
    """

    def __init__(self, config: Config, context: ParallelContext, dataset: TokenShards) -> None:
        self._config = config
        self._context = context
        self._dataset = dataset

    def loss(self, engine: DeepSpeedEngine, samples: int | None) -> float:
        """Mean loss per token, in nats, over the first ``samples`` sequences (None: all); the same on every rank."""
        batches = validation_batches(
            self._dataset,
            samples,
            self._config.train.micro_batch_size,
            dp_rank=self._context.coordinates.dp,
            dp_size=self._context.topology.dp,
        )
        totals = torch.zeros(2, dtype=torch.float64)
        per_pass = _MICRO_BATCHES_PER_STAGE * self._context.topology.pp
        while chunk := list(islice(batches, per_pass)):
            micro_batches = [validation_micro_batch(batch, self._context, engine.stage.cp) for batch in chunk]
            totals[0] += engine.evaluate(micro_batches)
            if self._context.model.index == 0:  # of the ranks that see the same tokens, one counts them
                totals[1] += sum(float(b.loss_weight.sum()) for b in micro_batches)
        loss_sum, tokens = self._context.world.all_reduce(totals.to(self._context.device)).tolist()
        return loss_sum / tokens
