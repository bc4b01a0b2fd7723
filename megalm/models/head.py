"""The end of a Transformer: the last block's output ▶ the vectors that logits are computed of, and what computes them.

Shapes: B batch, S sequence (this rank's share under context parallelism), H hidden, V vocabulary, T tensor-parallel
degree.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from megalm.config.schema import Model
from megalm.core.embedding import VocabParallelEmbedding
from megalm.core.masked_lm_head import MaskedLMHead
from megalm.core.norm import make_norm
from megalm.core.tensor_parallel import TensorParallel


class OutputHead(nn.Module):
    """The final norm, BERT's dense layer where the architecture has it, the rows of the output projection, and heads.

    Args:
        model: architecture.
        vocab_size: true vocabulary, without padding.
        tensor_parallel: how weights and activations are split over tensor-parallel ranks.
        holds_words: False: the rows are the input embedding's own, on this rank.
        heads: the objective's own layers, by name.
    """

    def __init__(
        self,
        model: Model,
        vocab_size: int,
        *,
        tensor_parallel: TensorParallel,
        holds_words: bool,
        heads: Mapping[str, nn.Module],
    ) -> None:
        super().__init__()
        # A post-norm block ends with a norm already.
        self.final_norm = make_norm(model, tensor_parallel) if model.residual != "post_norm" else None
        self.masked_lm = None
        if model.head == "masked_lm":
            self.masked_lm = MaskedLMHead(model, vocab_size, tensor_parallel=tensor_parallel)
        # Tied rows have one name on every rank: they are a copy of the first stage's.
        self.embedding = self.head = None
        if holds_words:
            words = VocabParallelEmbedding(
                vocab_size,
                model.hidden_size,
                tensor_parallel=tensor_parallel,
                std=model.init_std,
                pad_multiple=model.vocab_pad_multiple,
            )
            self.embedding, self.head = (words, None) if model.tie_embeddings else (None, words)
        self.heads = nn.ModuleDict(heads)

    def forward(self, x: Tensor) -> Tensor:
        """[B, S, H], or [B, S/T, H] under sequence parallelism ▶ the same shape: what logits are computed of."""
        x = x if self.final_norm is None else self.final_norm(x)
        return x if self.masked_lm is None else self.masked_lm(x)

    @property
    def words(self) -> VocabParallelEmbedding | None:
        """The rows that logits are computed with; None: they are the input embedding's."""
        return self.head if self.embedding is None else self.embedding

    @property
    def bias(self) -> nn.Parameter | None:
        """Added to the logits, a number per row of the output projection; None: there is none."""
        return None if self.masked_lm is None else self.masked_lm.bias
