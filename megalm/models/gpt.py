"""GPT: a decoder-only Transformer (Radford et al. 2019), whole or one pipeline stage of it.

Shapes: B batch, S sequence, H hidden, V vocabulary, T tensor-parallel degree.

A stage is the same class with parts left out, so a parameter has the same name on every layout. A tied embedding is
present, under its one name, on the first and on the last stage.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from megalm.config.schema import Model
from megalm.core.block import TransformerBlock
from megalm.core.embedding import VocabParallelEmbedding
from megalm.core.groups import Group, ParallelContext
from megalm.core.loss import vocab_parallel_cross_entropy
from megalm.core.norm import make_norm
from megalm.core.pipeline.partition import partition_layers
from megalm.core.position import LearnedPosition, RotaryPosition
from megalm.core.random import initialise
from megalm.core.sharding import declared_parameters


@dataclass(frozen=True)
class MicroBatch:
    """What the stages of one micro-batch read.

    Attributes:
        tokens: input ids, [B, S] int64.
        labels: target ids, [B, S] int64.
        loss_weight: factor of each token's loss, [B, S] fp32: the mask times the run's normalisation.
    """

    tokens: Tensor
    labels: Tensor
    loss_weight: Tensor


class GPTStage(nn.Module):
    """The embedding, a range of blocks, and the head, as far as a stage has them.

    Args:
        model: architecture.
        vocab_size: true vocabulary, without padding.
        layers: blocks of this stage, by their number in the whole model.
        is_first: whether the stage embeds tokens.
        is_last: whether the stage computes logits and loss.
        group: tensor-parallel group.
        device: where parameters are made.
    """

    def __init__(
        self,
        model: Model,
        vocab_size: int,
        *,
        layers: range,
        is_first: bool,
        is_last: bool,
        group: Group,
        device: torch.device,
    ) -> None:
        super().__init__()
        self.group = group
        self.is_first, self.is_last = is_first, is_last
        self.tied = model.tie_embeddings

        def embedding() -> VocabParallelEmbedding:
            return VocabParallelEmbedding(vocab_size, model.hidden_size, group=group, std=model.init_std)

        rotary = None
        if model.position == "rotary":
            head_dim = model.hidden_size // model.num_heads
            rotary = RotaryPosition(model.sequence_length, head_dim, base=model.rotary_base, device=device)
        with device:
            self.embedding = embedding() if is_first or (is_last and self.tied) else None
            self.position = None
            if is_first and model.position == "learned":
                self.position = LearnedPosition(model.sequence_length, model.hidden_size, std=model.init_std)
            self.blocks = nn.ModuleDict(
                {str(layer): TransformerBlock(model, group=group, rotary=rotary) for layer in layers}
            )
            self.final_norm = None
            if is_last:
                self.final_norm = make_norm(model.norm, model.hidden_size, epsilon=model.norm_epsilon, bias=model.bias)
            self.head = embedding() if is_last and not self.tied else None

    def forward(self, x: Tensor) -> Tensor:
        """Token ids [B, S] on the first stage, else [B, S, H] ▶ this rank's logits on the last stage, else [B, S, H].

        Logits are [B, S, ceil(V/T)], padding columns at minus infinity.
        """
        if self.is_first:
            assert self.embedding is not None
            x = self.embedding(x)
            if self.position is not None:
                x = self.position(x)
        for block in self.blocks.values():
            x = block(x)
        if self.final_norm is not None:
            x = self.output_embedding.logits(self.final_norm(x))
        return x

    def run(self, hidden: Tensor | None, micro_batch: MicroBatch) -> Tensor:
        """The stage as the pipeline runner calls it; on the last stage the weighted sum of token losses, in nats."""
        x = self(micro_batch.tokens if hidden is None else hidden)
        if not self.is_last:
            return x
        losses = vocab_parallel_cross_entropy(x, micro_batch.labels, self.group, self.output_embedding.first_token)
        return (losses * micro_batch.loss_weight).sum()

    @property
    def output_embedding(self) -> VocabParallelEmbedding:
        """The rows that logits are computed with."""
        rows = self.embedding if self.tied else self.head
        assert rows is not None, "only the last stage computes logits"
        return rows

    def unique_parameters(self) -> int:
        """Elements that this rank alone stands for: padding, replicas and the second tied copy left out."""
        return sum(
            p.parameter.numel()
            // max(p.parameter.shape[p.shard.dim or 0], 1)
            * (p.shard.local_size if p.shard.is_sharded else p.parameter.shape[0])
            for p in declared_parameters(self)
            if (p.shard.is_sharded or self.group.index == 0) and p.parameter is not self.second_tied_copy
        )

    @property
    def second_tied_copy(self) -> nn.Parameter | None:
        """The last stage's copy of a tied embedding that the first stage owns; None where there is none."""
        if self.is_last and not self.is_first and self.tied and self.embedding is not None:
            return self.embedding.weight
        return None

    @property
    def tied_weight(self) -> nn.Parameter | None:
        """A weight of which another stage holds a copy; None where there is none."""
        if self.tied and self.is_first != self.is_last and self.embedding is not None:
            return self.embedding.weight
        return None


def build_stage(model: Model, vocab_size: int, *, context: ParallelContext, seed: int, dtype: torch.dtype) -> GPTStage:
    """This rank's stage with its initial weights, in ``dtype`` on the context's device."""
    topology = context.topology
    stage = context.coordinates.pp
    layers = partition_layers(model.num_layers, topology.num_stages, head_cost=_head_cost(model, vocab_size))[stage]
    module = GPTStage(
        model,
        vocab_size,
        layers=layers,
        is_first=stage == 0,
        is_last=stage == topology.num_stages - 1,
        group=context.tp,
        device=context.device,
    ).to(dtype)
    initialise(module, seed)
    return module


def build_full_model(
    model: Model, vocab_size: int, *, seed: int = 0, dtype: torch.dtype = torch.float32, device: str = "cpu"
) -> GPTStage:
    """The whole model in one process: ``model(tokens)`` gives logits [B, S, V]."""
    return build_stage(model, vocab_size, context=ParallelContext.single(device), seed=seed, dtype=dtype)


def _head_cost(model: Model, vocab_size: int) -> float:
    """Matrix work of the logits relative to that of one block, for balancing stages."""
    hidden, head_dim = model.hidden_size, model.hidden_size // model.num_heads
    attention = 2 * hidden * hidden + 2 * hidden * model.kv_heads * head_dim
    mlp = (3 if model.activation == "swiglu" else 2) * hidden * model.ffn_size
    return vocab_size * hidden / (attention + mlp)
