"""Scores of a validation split on all ranks: the pipeline, forward only."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import islice

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from megalm.config.schema import Config
from megalm.core.attention.context_parallel import ContextParallel
from megalm.core.host import to_device
from megalm.core.pipeline.runner import PipelineResult
from megalm.data.stream.batch import Batch, MakeBatch
from megalm.data.stream.loader import example_batch, num_validation_batches, validation_batches
from megalm.data.stream.sequences import Corpora
from megalm.engine.feed import Feed
from megalm.engine.micro_batches import evaluation_micro_batch
from megalm.engine.packed_batch import PackedBatch
from megalm.mesh.groups import ParallelContext
from megalm.models.micro_batch import MicroBatch
from megalm.objectives.base import Objective

Evaluate = Callable[[Sequence[MicroBatch]], Mapping[str, Tensor]]
"""Micro-batches ▶ this rank's part of each measure of the objective, by name, fp64 scalars of the device, to be summed
over all ranks."""

_MICRO_BATCHES_PER_STAGE = 4
"""Micro-batches per pass and stage: enough to keep the forward-only pipeline full, few enough to hold at once."""


class Validator:
    """What an objective reports over the validation split.

    Args:
        config: micro-batch size, who reads, and whether attention is kept within documents.
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
        batches = self._batches(samples)
        # Of the ranks that see the same sequences, one counts; it is one that reads.
        counts_here = context.model_group.index == 0 and context.cp_group.index == 0
        measures = self._objective.measures
        sums = torch.zeros(len(measures), dtype=torch.float64, device=context.device)
        counts = np.zeros(self._objective.num_counts(vocab_size))
        while chunk := list(islice(batches, _MICRO_BATCHES_PER_STAGE * context.topology.pp)):
            micro_batches = [evaluation_micro_batch(packed, context.device, context_parallel) for _, packed in chunk]
            found = evaluate(micro_batches)
            sums += torch.stack([found[name] for name in measures])
            if counts_here:
                counts += sum(self._objective.counts(batch, vocab_size) for batch, _ in chunk if batch is not None)
        return self._objective.scores(*self._over_ranks(sums, counts))

    def _batches(self, samples: int | None) -> Iterator[tuple[Batch | None, PackedBatch]]:
        """This replica's batches, as they were read (None where another rank read them) and on the device."""
        rows, reset = self._config.train.micro_batch_size, self._config.data.reset_at_documents
        dp_rank, dp_size = self._context.coordinates.dp, self._context.topology.dp
        example = example_batch(self._corpora, self._make_batch, reset_at_documents=reset)
        return Feed(self._context, self._config.data.readers, example).deliver_all(
            validation_batches(
                self._corpora,
                samples,
                rows,
                make_batch=self._make_batch,
                dp_rank=dp_rank,
                dp_size=dp_size,
                reset_at_documents=reset,
            ),
            num_validation_batches(self._corpora, samples, rows, dp_size),
            rows,
        )

    def _over_ranks(self, sums: Tensor, counts: NDArray[np.float64]) -> tuple[dict[str, float], NDArray[np.float64]]:
        own = torch.cat((sums, to_device(torch.from_numpy(counts), self._context.device)))
        totals: NDArray[np.float64] = self._context.world_group.all_reduce(own).cpu().numpy()
        measured = totals[: len(sums)].tolist()
        return dict(zip(self._objective.measures, measured, strict=True)), totals[len(sums) :]


def reported(result: PipelineResult, names: Sequence[str], context: ParallelContext) -> dict[str, Tensor]:
    """Sums over micro-batches by name, on one of the ranks that compute the same; zeros elsewhere.

    Returns:
        fp64 scalars of the device, which nobody has waited for.
    """
    if not result.terms or context.tp_group.index:
        totals = torch.zeros(len(names), dtype=torch.float64, device=context.device)
    else:
        totals = torch.stack([torch.stack([terms[name] for terms in result.terms]).double().sum() for name in names])
    return dict(zip(names, totals.unbind(), strict=True))
