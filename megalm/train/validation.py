"""Validation on all ranks: the training pipeline, forward only.

Shapes: V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import islice

import torch
from torch import Tensor

from megalm.config.schema import Config
from megalm.data.objectives import DataObjective
from megalm.data.stream.loader import label_counts, validation_batches
from megalm.data.stream.sequences import Corpora
from megalm.engine.deepspeed_engine import DeepSpeedEngine
from megalm.engine.micro_batches import validation_micro_batch
from megalm.mesh.groups import ParallelContext

_MICRO_BATCHES_PER_STAGE = 4
"""Micro-batches per pass and stage: enough to keep the forward-only pipeline full, few enough to hold at once."""


@dataclass(frozen=True)
class Scores:
    """How good a model is on some sequences, by tokens that carry loss; None where there are none.

    Attributes:
        loss: mean cross-entropy, in nats.
        accuracy: share of tokens that the model holds most likely.
        commonest: the same of a model that always guesses the commonest token.
        tokens: how many tokens those are the means of.
    """

    loss: float | None
    accuracy: float | None
    commonest: float | None
    tokens: int

    @classmethod
    def of(cls, loss_sum: float, correct: float, label_counts: Tensor) -> Scores:
        """From sums over all tokens, and how often each word is a label, [V]."""
        tokens = float(label_counts.sum())
        if tokens == 0:
            return cls(None, None, None, 0)
        return cls(loss_sum / tokens, correct / tokens, float(label_counts.max()) / tokens, round(tokens))


class Validator:
    """Scores over the validation split.

    Args:
        config: micro-batch size.
        context: this rank's place and groups.
        corpora: the validation splits.
        objective: what is learnt.
        eos_id: ends a document, with which attention and positions begin anew; None: rows are one document each.
    """

    def __init__(
        self,
        config: Config,
        context: ParallelContext,
        corpora: Corpora,
        objective: DataObjective,
        *,
        eos_id: int | None,
    ) -> None:
        self._config = config
        self._context = context
        self._corpora = corpora
        self._objective = objective
        self._eos_id = eos_id

    def scores(self, engine: DeepSpeedEngine, samples: int | None) -> Scores:
        """Over the first ``samples`` sequences (None: all); the same on every rank."""
        batches = validation_batches(
            self._corpora,
            samples,
            self._config.train.micro_batch_size,
            dp_rank=self._context.coordinates.dp,
            dp_size=self._context.topology.dp,
            objective=self._objective,
        )
        totals = torch.zeros(2 + self._corpora.vocab_size, dtype=torch.float64)
        per_pass = _MICRO_BATCHES_PER_STAGE * self._context.topology.pp
        while chunk := list(islice(batches, per_pass)):
            micro_batches = [
                validation_micro_batch(batch, self._context, engine.model.context_parallel, eos_id=self._eos_id)
                for batch in chunk
            ]
            totals[:2] += torch.tensor(engine.evaluate(micro_batches), dtype=torch.float64)
            if self._context.model_group.index == 0 and self._context.cp_group.index == 0:
                # Of the ranks that see the same sequences, one counts their labels.
                for batch in chunk:
                    totals[2:] += label_counts(batch, self._corpora.vocab_size)
        totals = self._context.world_group.all_reduce(totals.to(self._context.device)).cpu()
        return Scores.of(float(totals[0]), float(totals[1]), totals[2:])
