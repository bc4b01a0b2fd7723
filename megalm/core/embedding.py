"""Word embedding with the vocabulary split over a tensor-parallel group, and the output projection that may share it.

Shapes: B batch, S sequence, H hidden, V vocabulary, T tensor-parallel degree, P rows of a rank: ``ceil(V/T)`` rounded
up to a multiple. A rank's rows after its words are padding: zero, never looked up, masked in the logits, and never
saved. They are there for GPUs, whose products are fast where sizes are multiples of 8 elements or more; the CPU leaves
them out of its products (:meth:`VocabParallelEmbedding.rows_to_multiply`).
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from megalm.core.collectives import gather_for_matmul, reduce_from_group, reduce_scatter
from megalm.core.device_kind import device_kind
from megalm.core.linear import SEQUENCE, HandsOverWeightGradients, column_linear
from megalm.core.parameters import Init
from megalm.core.tensor_parallel import TensorParallel
from megalm.core.weight_gradients import WeightGradients
from megalm.mesh.slices import ShardSpec, padded_range


class VocabParallelEmbedding(HandsOverWeightGradients):
    """Rows of the vocabulary, split over the group: ids ▶ hidden vectors, and back to logits with the same rows.

    Attributes:
        weight_gradients: where the output projection's gradient goes; None: to autograd, as the lookup's always does.

    Args:
        vocab_size: V, true words.
        hidden_size: H.
        tensor_parallel: the group.
        std: of the initial values.
        pad_multiple: divides P.
    """

    def __init__(
        self,
        vocab_size: int,
        hidden_size: int,
        *,
        tensor_parallel: TensorParallel,
        std: float,
        pad_multiple: int = 1,
    ) -> None:
        super().__init__()
        self.tensor_parallel, self.vocab_size = tensor_parallel, vocab_size
        self.weight_gradients: WeightGradients | None = None
        self._linear = column_linear(tensor_parallel)
        group = tensor_parallel.group
        self._share = -(-vocab_size // group.size)
        words, self._padding = padded_range(vocab_size, group.index, group.size, pad_multiple)
        self.first_token, self.stop_token = words
        shard = ShardSpec.along((vocab_size, hidden_size), 0, (words,), self._padding)
        self.weight = self.declare("weight", shard, Init.normal(std), per_word=True)

    def hand_over(self, weight_gradients: WeightGradients) -> None:
        """Add the output projection's to a sum, if there is one; see :func:`megalm.core.loss.output_loss`."""
        self.weight_gradients = weight_gradients

    @property
    def local_vocab_size(self) -> int:
        """True words that this rank holds; the columns of :meth:`logits` from here on are padding."""
        return self.stop_token - self.first_token

    @property
    def rows_to_multiply(self) -> int:
        """Rows that products take: on GPUs all, on the CPU those of words.

        Padding gains the CPU nothing, and a product that is longer by zeros adds up in another order.
        """
        return self.local_vocab_size if device_kind(self.weight) == "cpu" else self.local_vocab_size + self._padding

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

        [B, S, H], or [B, S/T, H] under sequence parallelism ▶ [B, S, ceil(V/T)]: the same width on every rank, without
        the padding that is there for products alone; columns without a word are at minus infinity. ``bias`` [P] is
        added.
        """
        rows = self.rows_to_multiply
        logits = self._linear(x, self.weight[:rows], None if bias is None else bias[:rows])
        words = logits[..., : self.local_vocab_size]
        lacking = self._share - self.local_vocab_size
        # Out of place, so that padding rows get no gradient either.
        return F.pad(words, (0, lacking), value=float("-inf")) if lacking else words

    def whole_logits(self, x: Tensor, bias: nn.Parameter | None = None) -> Tensor:
        """The logits of all words on every rank: [B, S, H] ▶ [B, S, V], without padding; for generation."""
        logits = gather_for_matmul(self.logits(x, bias), self.tensor_parallel.group, dim=x.ndim - 1)
        return logits[..., : self.vocab_size]
