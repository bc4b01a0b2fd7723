"""AdamW and its parameter groups."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from megalm.config.schema import Optim
from megalm.core.sharding import DeclaredParameter


@dataclass(frozen=True)
class ParameterGroup:
    """Parameters that the optimizer and the reduction of gradients treat alike.

    Attributes:
        parameters: the members, in the order in which the model registers them.
        decays: whether weight decay applies.
        counts_everywhere: whether tensor-parallel ranks hold different elements, all of which count in the norm.
        partial: whether each tensor-parallel rank sees a part of the gradient, and the parts are to be added.
        tied: whether another pipeline rank holds a copy, and the copies' gradients are to be added.
        is_second_copy: whether this is the copy that does not count in the norm, since the first one does.
    """

    parameters: tuple[DeclaredParameter, ...]
    decays: bool
    counts_everywhere: bool
    partial: bool
    tied: bool
    is_second_copy: bool


def parameter_groups(
    parameters: Sequence[DeclaredParameter], *, tied: nn.Parameter | None, second_copy: nn.Parameter | None
) -> list[ParameterGroup]:
    """A model's parameters by what is to be done with them; no group is empty.

    Args:
        parameters: all of this rank.
        tied: the one of which another pipeline rank holds a copy.
        second_copy: the same, where the other copy is the one that owns it.
    """
    members: dict[tuple[bool, ...], list[DeclaredParameter]] = {}
    for p in parameters:
        declaration = p.declaration
        key = (
            declaration.decays,
            p.shard.is_sharded,
            declaration.partial,
            p.parameter is tied,
            p.parameter is second_copy,
        )
        members.setdefault(key, []).append(p)
    return [ParameterGroup(tuple(found), *key) for key, found in members.items()]


def make_adamw(groups: Sequence[ParameterGroup], optim: Optim) -> torch.optim.AdamW:
    """Fused AdamW (Loshchilov & Hutter 2019); matrices decay, norms and biases do not."""
    return torch.optim.AdamW(
        [
            {
                "params": [p.parameter for p in group.parameters],
                "weight_decay": optim.weight_decay if group.decays else 0.0,
            }
            for group in groups
        ],
        lr=optim.lr,
        betas=(optim.beta1, optim.beta2),
        eps=optim.epsilon,
        fused=True,
    )
