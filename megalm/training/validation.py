"""Validation on all ranks: the training pipeline, forward only."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import islice

import numpy as np
import torch
from numpy.typing import NDArray

from megalm.config.schema import Config
from megalm.data.stream.batch import MakeBatch
from megalm.data.stream.loader import validation_batches
from megalm.data.stream.sequences import Corpora
from megalm.engine.deepspeed_engine import DeepSpeedEngine
from megalm.engine.micro_batches import evaluation_micro_batch
from megalm.mesh.groups import ParallelContext
from megalm.objectives.base import Objective

_MICRO_BATCHES_PER_STAGE = 4
"""Micro-batches per pass and stage: enough to keep the forward-only pipeline full, few enough to hold at once."""


class Validator:
    """What an objective reports over the validation split.

    Args:
        config: micro-batch size, and whether attention is kept within documents.
        context: this rank's place and groups.
        corpora: the validation splits.
        objective: what is counted and measured, and what becomes of it.
        make_batch: makes batches of the split's rows.
    """

    def __init__(
        self, config: Config, context: ParallelContext, corpora: Corpora, objective: Objective, make_batch: MakeBatch
    ) -> None:
        self._config = config
        self._context = context
        self._corpora = corpora
        self._objective = objective
        self._make_batch = make_batch

    def scores(self, engine: DeepSpeedEngine, samples: int | None) -> dict[str, float | int | None]:
        """Over the first ``samples`` sequences (None: all); the same on every rank."""
        context, vocab_size = self._context, self._corpora.vocab_size
        batches = validation_batches(
            self._corpora,
            samples,
            self._config.train.micro_batch_size,
            make_batch=self._make_batch,
            dp_rank=context.coordinates.dp,
            dp_size=context.topology.dp,
            reset_at_documents=self._config.data.reset_at_documents,
        )
        # Of the ranks that see the same sequences, one counts.
        counts_here = context.model_group.index == 0 and context.cp_group.index == 0
        sums = dict.fromkeys(self._objective.measures, 0.0)
        counts = np.zeros(self._objective.num_counts(vocab_size))
        while chunk := list(islice(batches, _MICRO_BATCHES_PER_STAGE * context.topology.pp)):
            micro_batches = [
                evaluation_micro_batch(batch, context.device, engine.model.context_parallel) for batch in chunk
            ]
            for name, value in engine.evaluate(micro_batches).items():
                sums[name] += value
            if counts_here:
                counts += sum(self._objective.counts(batch, vocab_size) for batch in chunk)
        return self._objective.scores(*self._over_ranks(sums, counts))

    def _over_ranks(
        self, sums: Mapping[str, float], counts: NDArray[np.float64]
    ) -> tuple[dict[str, float], NDArray[np.float64]]:
        totals = torch.tensor([*sums.values(), *counts.tolist()], dtype=torch.float64, device=self._context.device)
        totals = self._context.world_group.all_reduce(totals).cpu()
        measured = totals[: len(sums)].tolist()
        return dict(zip(sums, measured, strict=True)), totals[len(sums) :].numpy()
