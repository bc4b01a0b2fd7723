"""A layer whose weights are split over an axis that megalm does not have, and the same mathematics in plain PyTorch.

The mesh gets the axis ``ep`` as data (``Topology.inner_axes``); no part of megalm knows of it. Each word has one
expert, an MLP whose matrices are split over ``ep`` (by expert) and over tp (by inner width).

Shapes: B batch, S sequence, H hidden, E experts, F inner width, T tensor-parallel degree, P degree of ``ep``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from megalm.config.schema import Model
from megalm.config.schema import Objective as Settings
from megalm.core.collectives import (
    copy_to_group,
    gather_for_matmul,
    reduce_from_group,
    reduce_scatter,
    start_all_gather,
)
from megalm.core.parameters import Init, ParallelModule
from megalm.core.tensor_parallel import TensorParallel
from megalm.mesh.groups import ALONE, Group, ParallelContext
from megalm.mesh.slices import Cut, ShardSpec, even_range
from megalm.mesh.topology import OUTER_REPLICAS
from megalm.models.micro_batch import MicroBatch
from megalm.models.output import Output
from megalm.objectives.clm import CausalLM, next_tokens
from megalm.verify.parity import Task

EXPERTS, INNER, STD = 4, 24, 0.1


class Experts(ParallelModule):
    """Expert e of E: [B, S, H] ▶ gelu(x Uₑᵀ) Dₑᵀ; every ``ep`` rank computes its experts for the tokens of all."""

    def __init__(self, hidden: int, *, ep: Group, tensor_parallel: TensorParallel) -> None:
        super().__init__()
        self.ep, self.tp = ep, tensor_parallel.group
        self.first, last = even_range(EXPERTS, ep.index, ep.size)
        experts, inner = ((self.first, last),), (even_range(INNER, self.tp.index, self.tp.size),)
        up = ShardSpec((EXPERTS, INNER, hidden), (Cut(0, experts), Cut(1, inner)))
        down = ShardSpec((EXPERTS, hidden, INNER), (Cut(0, experts), Cut(2, inner)))
        over = {"split_over": ("ep", "tp"), "replicated_over": (OUTER_REPLICAS,)}
        self.up = self.declare("up", up, Init.normal(STD), **over)
        self.down = self.declare("down", down, Init.normal(STD), **over)
        self.steps = self.declare_buffer("steps", ShardSpec.replicated(1), Init.constant(0.0))

    def forward(self, x: Tensor, expert: Tensor) -> Tensor:
        """[B, S, H] and each token's expert [B, S] ▶ [B, S, H]."""
        expert = start_all_gather(expert, self.ep, 0).wait()  # [P·B, S]
        x = copy_to_group(gather_for_matmul(x, self.ep, 0), self.tp)  # [P·B, S, H]
        mine = F.one_hot(expert, EXPERTS)[..., self.first : self.first + len(self.up)].to(x.dtype)  # [P·B, S, E/P]
        inner = F.gelu(torch.einsum("bsh,efh->bsef", x, self.up)) * mine.unsqueeze(-1)
        y = reduce_from_group(torch.einsum("bsef,ehf->bsh", inner, self.down), self.tp)
        return reduce_scatter(y, self.ep, 0)


class WithExperts(CausalLM):
    """Next tokens from hidden vectors to which the words' experts have added."""

    carried: ClassVar[tuple[str, ...]] = ()

    def __init__(self, settings: Settings, ep: Group = ALONE) -> None:
        super().__init__(settings)
        self.ep = ep

    def make_heads(self, model: Model, *, tensor_parallel: TensorParallel) -> Mapping[str, nn.Module]:
        return {"experts": Experts(model.hidden_size, ep=self.ep, tensor_parallel=tensor_parallel)}

    def loss(self, output: Output, micro_batch: MicroBatch) -> Mapping[str, Tensor]:
        experts = output.heads["experts"]
        experts.steps += 1
        hidden = output.hidden + experts(output.hidden, micro_batch.tokens % EXPERTS)
        return super().loss(replace(output, hidden=hidden), micro_batch)


def task_of(context: ParallelContext | None) -> Task:
    """What ranks train, or one process without groups."""
    ep = ALONE if context is None else context.inner_groups[("ep",)]
    return Task(WithExperts(Settings(), ep), next_tokens, _plain_terms)


def _plain_terms(model, batch, place, settings) -> dict[str, Tensor]:
    del settings
    seen: list[Tensor] = []
    handle = model.output.final_norm.register_forward_hook(lambda *args: seen.append(args[2]))
    tokens = torch.from_numpy(batch.tokens)
    model(tokens, place)
    handle.remove()
    hidden, experts = seen[0], model.output.heads["experts"]
    added = torch.stack([F.gelu(hidden @ up.T) @ down.T for up, down in zip(experts.up, experts.down, strict=True)])
    hidden = hidden + added.gather(0, (tokens % EXPERTS).expand(hidden.shape[-1], -1, -1).movedim(0, -1)[None])[0]
    logits = (hidden @ model.output_embedding.weight.T).float()
    losses = F.cross_entropy(logits.mT, torch.from_numpy(batch.labels), reduction="none")
    mask = torch.from_numpy(batch.loss_mask).double()
    return {"loss": (losses * mask).sum() / mask.sum()}
