"""Transformer blocks: self-attention and MLP, each added to the residual stream.

Shapes: B batch, S sequence (this rank's share under context parallelism), H hidden, T tensor-parallel degree.
Under sequence parallelism every [B, S, H] here is [B, S/T, H].
"""

from __future__ import annotations

import math
from abc import abstractmethod

from torch import Tensor, nn

from megalm.config.schema import Model
from megalm.core.attention.context_parallel import ContextParallel
from megalm.core.attention.self_attention import SelfAttention
from megalm.core.dropout import Dropout
from megalm.core.mlp import make_mlp
from megalm.core.norm import make_norm
from megalm.core.place import Place
from megalm.core.position import RotaryPosition
from megalm.core.tensor_parallel import TensorParallel


class TransformerBlock(nn.Module):
    """The parts of a block; subclasses say how they are wired.

    Weights start at ``init_std``, the two projections into the residual stream at ``init_std / sqrt(2·num_layers)``, so
    that its variance does not grow with depth (GPT-2). What a sublayer adds to the stream passes through dropout.

    Args:
        model: architecture.
        layer: number of this block in the whole model.
        tensor_parallel: how weights and activations are split over tensor-parallel ranks.
        context_parallel: how the sequence is split over context-parallel ranks.
        rotary: rotary positions, shared by all blocks; None where positions are learned.
        seed: of dropout masks.
        recompute_core: whether backward computes the attention core again.
        fused_attention: see :class:`megalm.core.attention.attend.AttentionCore`.
    """

    def __init__(
        self,
        model: Model,
        layer: int,
        *,
        tensor_parallel: TensorParallel,
        context_parallel: ContextParallel,
        rotary: RotaryPosition | None,
        seed: int,
        recompute_core: bool = False,
        fused_attention: bool = False,
    ) -> None:
        super().__init__()
        self.tensor_parallel = tensor_parallel
        projection_std = model.init_std / math.sqrt(2 * model.num_layers)
        self.attention_norm = make_norm(model, tensor_parallel)
        self.attention = SelfAttention(
            model,
            layer,
            tensor_parallel=tensor_parallel,
            context_parallel=context_parallel,
            rotary=rotary,
            projection_std=projection_std,
            seed=seed,
            recompute_core=recompute_core,
            fused=fused_attention,
        )
        self.attention_dropout = Dropout(model.dropout, seed=seed, layer=layer, site="attention")
        self.mlp_norm = make_norm(model, tensor_parallel)
        self.mlp = make_mlp(
            model.activation,
            model.hidden_size,
            model.ffn_size,
            tensor_parallel=tensor_parallel,
            std=model.init_std,
            projection_std=projection_std,
            bias=model.bias,
        )
        self.mlp_dropout = Dropout(model.dropout, seed=seed, layer=layer, site="mlp")

    @abstractmethod
    def forward(self, x: Tensor, place: Place) -> Tensor:
        """[B, S, H] ▶ [B, S, H]."""

    def attend(self, x: Tensor, place: Place) -> Tensor:
        """The attention sublayer's output: [B, S, H] ▶ [B, S, H]."""
        return self._dropped(self.attention(x, place), self.attention_dropout, place)

    def transform(self, x: Tensor, place: Place) -> Tensor:
        """The MLP sublayer's output: [B, S, H] ▶ [B, S, H]."""
        return self._dropped(self.mlp(x), self.mlp_dropout, place)

    def _dropped(self, x: Tensor, dropout: Dropout, place: Place) -> Tensor:
        """After dropout; without any, nothing is computed, so that a compiled block has no graph for it."""
        if not dropout.drops(place):
            return x
        y: Tensor = dropout(x, place, self.tensor_parallel.own_tokens(place.positions))
        return y


class PreNormBlock(TransformerBlock):
    """``x + attention(norm x)``, then ``x + mlp(norm x)`` (Radford et al. 2019, GPT-2)."""

    def forward(self, x: Tensor, place: Place) -> Tensor:
        """[B, S, H] ▶ [B, S, H]."""
        x = x + self.attend(self.attention_norm(x), place)
        return x + self.transform(self.mlp_norm(x), place)


class PostNormBlock(TransformerBlock):
    """``norm(x + attention x)``, then ``norm(x + mlp x)`` (Vaswani et al. 2017; BERT)."""

    def forward(self, x: Tensor, place: Place) -> Tensor:
        """[B, S, H] ▶ [B, S, H]."""
        x = self.attention_norm(x + self.attend(x, place))
        y: Tensor = self.mlp_norm(x + self.transform(x, place))
        return y


class ParallelBlock(TransformerBlock):
    """``x + attention(norm x) + mlp(norm x)``, each with a norm of its own (Black et al. 2022, GPT-NeoX)."""

    def forward(self, x: Tensor, place: Place) -> Tensor:
        """[B, S, H] ▶ [B, S, H]."""
        return x + self.attend(self.attention_norm(x), place) + self.transform(self.mlp_norm(x), place)


BLOCKS: dict[str, type[TransformerBlock]] = {
    "pre_norm": PreNormBlock,
    "post_norm": PostNormBlock,
    "parallel": ParallelBlock,
}
"""Wirings by the name that ``model.residual`` takes."""
