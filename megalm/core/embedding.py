"""Word embedding with the vocabulary split over a tensor-parallel group, and the output projection that may share it.

Shapes: B batch, S sequence, H hidden, V vocabulary, T tensor-parallel degree. Each rank holds ``ceil(V/T)`` rows; the
rows past V on the last ranks are padding: zero, never looked up, masked in the logits, and never saved.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from megalm.core.collectives import gather_for_matmul, reduce_from_group, reduce_scatter
from megalm.core.linear import SEQUENCE, HandsOverWeightGradients, column_linear
from megalm.core.parameters import Init
from megalm.core.tensor_parallel import TensorParallel
from megalm.core.weight_gradients import WeightGradients
from megalm.mesh.slices import ShardSpec, padded_range


class VocabParallelEmbedding(HandsOverWeightGradients):
    """Rows of the vocabulary, split over the group: ids ▶ hidden vectors, and back to logits with the same rows.

    Attributes:
        weight_gradients: where the output projection's gradient goes; None: to autograd, as the lookup's always does.
    """

    def __init__(self, vocab_size: int, hidden_size: int, *, tensor_parallel: TensorParallel, std: float) -> None:
        super().__init__()
        self.tensor_parallel, self.vocab_size = tensor_parallel, vocab_size
        self.weight_gradients: WeightGradients | None = None
        self._linear = column_linear(tensor_parallel)
        group = tensor_parallel.group
        (self.first_token, self.stop_token), padding = padded_range(vocab_size, group.index, group.size)
        shard = ShardSpec.along((vocab_size, hidden_size), 0, ((self.first_token, self.stop_token),), padding)
        self.weight = self.declare("weight", shard, Init.normal(std), per_word=True)

    def hand_over(self, weight_gradients: WeightGradients) -> None:
        """Add the output projection's to a sum, if there is one; see :func:`megalm.core.loss.output_loss`."""
        self.weight_gradients = weight_gradients

    @property
    def local_vocab_size(self) -> int:
        """True words that this rank holds; the columns of :meth:`logits` from here on are padding."""
        return self.stop_token - self.first_token

    def forward(self, tokens: Tensor) -> Tensor:
        """Look up token ids: [B, S] ▶ [B, S, H], or [B, S/T, H] under sequence parallelism.

        Ids outside this rank's rows add zero; the reduction makes them whole.
        """
        if self.tensor_parallel.group.size == 1:
            return F.embedding(tokens, self.weight)
        elsewhere = (tokens < self.first_token) | (tokens >= self.stop_token)
        local = (tokens - self.first_token).masked_fill(elsewhere, 0)
        x = F.embedding(local, self.weight).masked_fill_(elsewhere.unsqueeze(-1), 0.0)
        if self.tensor_parallel.splits_sequence:
            return reduce_scatter(x, self.tensor_parallel.group, SEQUENCE)
        return reduce_from_group(x, self.tensor_parallel.group)

    def logits(self, x: Tensor, bias: nn.Parameter | None = None) -> Tensor:
        """This rank's columns of the logits, for evaluation: training takes :func:`megalm.core.loss.output_loss`.

        [B, S, H], or [B, S/T, H] under sequence parallelism ▶ [B, S, ceil(V/T)], padding columns at minus infinity.
        ``bias`` [ceil(V/T)] is added to them.
        """
        logits = self._linear(x, self.weight, bias)
        padding = self.weight.shape[0] - self.local_vocab_size
        if padding:
            # Out of place, so that padding rows get no gradient either.
            logits = F.pad(logits[..., : self.local_vocab_size], (0, padding), value=float("-inf"))
        return logits

    def whole_logits(self, x: Tensor, bias: nn.Parameter | None = None) -> Tensor:
        """The logits of all words on every rank: [B, S, H] ▶ [B, S, V], without padding; for generation."""
        logits = gather_for_matmul(self.logits(x, bias), self.tensor_parallel.group, dim=x.ndim - 1)
        return logits[..., : self.vocab_size]
