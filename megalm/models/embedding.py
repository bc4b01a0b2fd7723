"""The beginning of a Transformer: words, positions and token types ▶ hidden vectors.

Shapes: B batch, S sequence (this rank's share under context parallelism), H hidden, T tensor-parallel degree.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from megalm.config.schema import Model
from megalm.core.dropout import Dropout
from megalm.core.embedding import VocabParallelEmbedding
from megalm.core.norm import make_norm
from megalm.core.place import Place
from megalm.core.position import LearnedPosition
from megalm.core.tensor_parallel import TensorParallel
from megalm.core.token_type import TokenTypeEmbedding
from megalm.models.micro_batch import MicroBatch


class InputEmbedding(nn.Module):
    """The sum of a word's, a position's and a token type's vector, as far as the architecture has them.

    Args:
        model: architecture.
        vocab_size: true vocabulary, without padding.
        tensor_parallel: how weights and activations are split over tensor-parallel ranks.
        seed: of dropout masks.
    """

    def __init__(self, model: Model, vocab_size: int, *, tensor_parallel: TensorParallel, seed: int) -> None:
        super().__init__()
        self.tensor_parallel = tensor_parallel
        hidden, std, partial = model.hidden_size, model.init_std, tensor_parallel.splits_sequence
        self.embedding = VocabParallelEmbedding(
            vocab_size, hidden, tensor_parallel=tensor_parallel, std=std, pad_multiple=model.vocab_pad_multiple
        )
        self.position = self.token_type = self.embedding_norm = None
        if model.position == "learned":
            self.position = LearnedPosition(
                model.sequence_length, hidden, std=std, offset=model.position_offset, partial=partial
            )
        if model.token_types:
            self.token_type = TokenTypeEmbedding(model.token_types, hidden, std=std, partial=partial)
        if model.embedding_norm:
            self.embedding_norm = make_norm(model, tensor_parallel)
        self.embedding_dropout = Dropout(model.dropout, seed=seed, layer=-1, site="embedding")

    def forward(self, micro_batch: MicroBatch, place: Place) -> Tensor:
        """Token ids [B, S] ▶ [B, S, H], or [B, S/T, H] under sequence parallelism."""
        x: Tensor = self.embedding(micro_batch.tokens)
        positions = self.tensor_parallel.own_tokens(place.positions)
        if self.position is not None:
            x = x + self.position(self._own_part(place.within_documents))
        if self.token_type is not None:
            types = micro_batch.token_types
            types = torch.zeros_like(micro_batch.tokens) if types is None else types
            x = x + self.token_type(self._own_part(types))
        if self.embedding_norm is not None:
            x = self.embedding_norm(x)
        embedded: Tensor = self.embedding_dropout(x, place, positions)
        return embedded

    def _own_part(self, per_token: Tensor) -> Tensor:
        """[S] or [B, S] of all tokens ▶ those of this rank under sequence parallelism."""
        own_tokens = self.tensor_parallel.own_tokens
        return own_tokens(per_token.T).T if per_token.ndim == 2 else own_tokens(per_token)
