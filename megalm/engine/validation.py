"""Scores of a validation split on all ranks: the pipeline, forward only."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import islice

import numpy as np
import torch
from numpy.typing import NDArray

from megalm.config.schema import Config
from megalm.core.attention.context_parallel import ContextParallel
from megalm.core.pipeline.runner import PipelineResult
from megalm.data.stream.batch import MakeBatch
from megalm.data.stream.loader import validation_batches
from megalm.data.stream.sequences import Corpora
from megalm.engine.micro_batches import evaluation_micro_batch
from megalm.mesh.groups import ParallelContext
from megalm.models.micro_batch import MicroBatch
from megalm.objectives.base import Objective

Evaluate = Callable[[Sequence[MicroBatch]], Mapping[str, float]]
"""Micro-batches ▶ this rank's part of each measure of the objective, by name, to be summed over all ranks."""

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

    def scores(
        self, evaluate: Evaluate, context_parallel: ContextParallel, samples: int | None = None
    ) -> dict[str, float | int | None]:
        """Over the first ``samples`` sequences (None: all); the same on every rank.

        Args:
            evaluate: the model's forward pass.
            context_parallel: which part of each sequence this rank holds.
            samples: how many sequences.
        """
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
            micro_batches = [evaluation_micro_batch(batch, context.device, context_parallel) for batch in chunk]
            for name, value in evaluate(micro_batches).items():
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


def reported(result: PipelineResult, names: Sequence[str], context: ParallelContext) -> dict[str, float]:
    """Sums over micro-batches by name, on one of the ranks that compute the same; zeros elsewhere."""
    if not result.terms or context.tp_group.index:
        return dict.fromkeys(names, 0.0)
    totals = [torch.stack([terms[name] for terms in result.terms]).double().sum() for name in names]
    return dict(zip(names, torch.stack(totals).tolist(), strict=True))
