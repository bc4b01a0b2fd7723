"""Objectives whose loss is the mean cross-entropy of tokens. No torch.

Shapes: V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar

import numpy as np
from numpy.typing import NDArray

from megalm.data.stream.batch import Batch
from megalm.objectives.base import Objective

if TYPE_CHECKING:
    from torch import Tensor

    from megalm.models.micro_batch import MicroBatch
    from megalm.models.output import Output


class TokenObjective(Objective):
    """Mean cross-entropy per token that carries loss, and the z-loss if its weight is above 0.

    The terms are ``loss``, in nats per token, and ``z_loss``: ``objective.z_loss`` times the mean squared log-partition
    of the logits (Chowdhery et al. 2022, section 5).
    """

    measures: ClassVar[tuple[str, ...]] = ("loss", "accuracy")

    @property
    def terms(self) -> tuple[str, ...]:
        """``loss``, and ``z_loss`` where there is one."""
        return ("loss", "z_loss") if self.settings.z_loss else ("loss",)

    def loss(self, output: Output, micro_batch: MicroBatch) -> Mapping[str, Tensor]:
        """Both terms from one pass over the logits."""
        values = output.cross_entropy(micro_batch.labels, micro_batch.loss_weight, z_loss=self.settings.z_loss)
        return dict(zip(self.terms, values.unbind(), strict=True))

    def measure(self, output: Output, micro_batch: MicroBatch) -> Mapping[str, Tensor]:
        """Sums of the losses, and of the labels that have the largest logit."""
        sums = output.cross_entropy_and_accuracy(micro_batch.labels, micro_batch.loss_weight)
        return dict(zip(self.measures, sums.unbind(), strict=True))

    def num_counts(self, vocab_size: int) -> int:
        """V."""
        return vocab_size

    def counts(self, batch: Batch, vocab_size: int) -> NDArray[np.float64]:
        """[V]: how often each word is a label that carries loss."""
        counts = np.bincount(batch.labels.ravel(), batch.loss_mask.ravel(), minlength=vocab_size)
        return counts.astype(np.float64, copy=False)

    def scores(self, sums: Mapping[str, float], counts: NDArray[np.float64]) -> dict[str, float | int | None]:
        """Loss, perplexity, accuracy, and the accuracy of always guessing the commonest token."""
        means = super().scores(sums, counts)
        loss = means["val_loss"]
        return {
            "val_loss": loss,
            "val_perplexity": None if loss is None else perplexity(loss),
            "val_accuracy": means["val_accuracy"],
            "val_commonest": None if loss is None else float(counts.max()) / float(counts.sum()),
            "val_tokens": means["val_tokens"],
        }


def perplexity(loss: float) -> float:
    """``exp(loss)`` of a mean cross-entropy in nats; infinity where that is no double."""
    try:
        return math.exp(loss)
    except OverflowError:
        return math.inf
