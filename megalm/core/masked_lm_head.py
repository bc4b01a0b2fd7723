"""BERT's head (Devlin et al. 2019): what comes between the last block and the output embedding, and a bias per word.

Shapes: B batch, S sequence, H hidden, V vocabulary, T tensor-parallel degree.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from megalm.config.schema import Model
from megalm.core.linear import HandsOverWeightGradients, column_linear
from megalm.core.norm import make_norm
from megalm.core.parameters import Init
from megalm.core.tensor_parallel import TensorParallel
from megalm.core.weight_gradients import WeightGradients
from megalm.mesh.slices import ShardSpec, padded_range


class MaskedLMHead(HandsOverWeightGradients):
    """A dense layer, GELU and a norm, replicated over tensor-parallel ranks, and the bias, split as the vocabulary is.

    The dense layer is as small as one projection of one block: split, it would cost two collectives.

    Args:
        model: architecture.
        vocab_size: true vocabulary, without padding.
        tensor_parallel: how weights and activations are split over tensor-parallel ranks.
    """

    def __init__(self, model: Model, vocab_size: int, *, tensor_parallel: TensorParallel) -> None:
        super().__init__()
        hidden, partial = model.hidden_size, tensor_parallel.splits_sequence
        self.weight = self.declare(
            "weight", ShardSpec.replicated(hidden, hidden), Init.normal(model.init_std), partial=partial
        )
        self.dense_bias = self.declare("dense_bias", ShardSpec.replicated(hidden), Init.constant(0.0), partial=partial)
        self.approximate = "none" if model.activation == "gelu_erf" else "tanh"
        self.norm = make_norm(model, tensor_parallel)
        group = tensor_parallel.group
        words, padding = padded_range(vocab_size, group.index, group.size, model.vocab_pad_multiple)
        shard = ShardSpec.along((vocab_size,), 0, (words,), padding)
        self.bias = self.declare("bias", shard, Init.constant(0.0), per_word=True)
        self._linear = column_linear(TensorParallel())

    def hand_over(self, weight_gradients: WeightGradients) -> None:
        """Leave it to ``weight_gradients`` what becomes of the dense layer's."""
        self._linear = column_linear(TensorParallel(), weight_gradients)

    def forward(self, x: Tensor) -> Tensor:
        """[B, S, H] ▶ [B, S, H], or [B, S/T, H] ▶ [B, S/T, H] under sequence parallelism."""
        y: Tensor = self.norm(F.gelu(self._linear(x, self.weight, self.dense_bias), approximate=self.approximate))
        return y
