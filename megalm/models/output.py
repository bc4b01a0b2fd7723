"""What the last stage of a model gives an objective: hidden vectors, and what can be computed of them.

Shapes: B batch, S sequence (this rank's share under context parallelism), H hidden, T tensor-parallel degree.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from megalm.core.attention.context_parallel import ContextParallel
from megalm.core.collectives import copy_to_group, reduce_from_group
from megalm.core.embedding import VocabParallelEmbedding
from megalm.core.loss import output_loss, output_metrics, sequence_log_probabilities


@dataclass(frozen=True)
class Output:
    """The end of a forward pass.

    Attributes:
        hidden: what logits are computed of: the last block's output after the final norm (and BERT's dense layer),
            [B, S, H], or [B, S/T, H] under sequence parallelism.
        positions: the place of each token of ``hidden`` in the whole sequence, [S] or [S/T].
        embedding: the rows that logits are computed with, and how they are split over tensor-parallel ranks.
        bias: added to the logits, a number per row of ``embedding``; None: there is none.
        chunk_tokens: tokens whose logits exist at a time; 0: all.
        context_parallel: which part of each sequence this rank holds.
        heads: the objective's own layers, by name.
        compiles: whether the loss is compiled, as blocks are.
        carried: sums of the scalars that the objective took from the blocks, by name.
    """

    hidden: Tensor
    positions: Tensor
    embedding: VocabParallelEmbedding
    bias: nn.Parameter | None
    chunk_tokens: int
    context_parallel: ContextParallel
    heads: Mapping[str, nn.Module]
    carried: Mapping[str, Tensor]
    compiles: bool = False

    def cross_entropy(self, labels: Tensor, weight: Tensor, *, z_loss: float = 0.0) -> Tensor:
        """Weighted sum of token losses, and with ``z_loss`` a second element; see :func:`output_loss`.

        Args:
            labels: [B, S].
            weight: factor of each token's loss, [B, S].
            z_loss: weight of the mean squared log-partition; 0: there is none.
        """
        return output_loss(
            self.hidden,
            self.embedding,
            labels,
            weight,
            chunk_tokens=self.chunk_tokens,
            z_loss=z_loss,
            bias=self.bias,
            compiles=self.compiles,
        )

    def cross_entropy_and_accuracy(self, labels: Tensor, weight: Tensor) -> Tensor:
        """[2] fp64: weighted sums of token losses and of right guesses, no gradients; see :func:`output_metrics`."""
        return output_metrics(
            self.hidden, self.embedding, labels, weight, chunk_tokens=self.chunk_tokens, bias=self.bias
        )

    def sequence_log_probabilities(self, labels: Tensor, mask: Tensor) -> Tensor:
        """[B]: log-probability of the labels of each whole row that ``mask`` counts, the same on every rank.

        Args:
            labels: [B, S].
            mask: factor of each token, [B, S].
        """
        sums = sequence_log_probabilities(
            self.hidden, self.embedding, labels, mask, chunk_tokens=self.chunk_tokens, bias=self.bias
        )
        return self._over_context(sums)

    def hidden_at(self, positions: Tensor) -> Tensor:
        """[B, H]: the hidden vector at one position of each whole row, the same on every rank.

        Args:
            positions: in the whole sequence, [B].
        """
        here = (self.positions == positions.unsqueeze(1)).to(self.hidden.dtype)  # [B, S], one 1 per row on one rank
        vectors = torch.einsum("bs,bsh->bh", here, self.hidden)
        tensor_parallel = self.embedding.tensor_parallel
        if tensor_parallel.splits_sequence:
            vectors = reduce_from_group(vectors, tensor_parallel.group)
        return self._over_context(vectors)

    def _over_context(self, parts: Tensor) -> Tensor:
        """Add what the context-parallel ranks have of each row.

        All of them go on with the sum and each counts its loss as one of C shares (``MicroBatch.loss_weight``), so the
        gradients that they send back are added as well.
        """
        group = self.context_parallel.group
        return copy_to_group(reduce_from_group(parts, group), group)
