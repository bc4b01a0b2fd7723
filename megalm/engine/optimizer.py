"""AdamW and its parameter groups."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from megalm.config.schema import Optim
from megalm.core.parameters import DeclaredTensor
from megalm.mesh.groups import Group, ParallelContext


@dataclass(frozen=True)
class ParameterGroup:
    """Parameters that the optimizer and the reduction of gradients treat alike.

    Attributes:
        parameters: the members, in the order in which the model registers them.
        decays: whether weight decay applies.
        replicas: ranks that hold the same slices and see different tokens; ZeRO splits the optimizer's state over them.
        parts: ranks each of which sees a part of the gradients, which are to be added; None: there are none such.
        copies: ranks of other pipeline stages that hold copies, and all their replicas; None: there are no copies.
        is_owned: whether this rank stands for the slices among all that hold them but its replicas.
    """

    parameters: tuple[DeclaredTensor, ...]
    decays: bool
    replicas: Group
    parts: Group | None
    copies: Group | None
    is_owned: bool

    @property
    def is_complete(self) -> bool:
        """Whether a reduction over the replicas is all that its gradients need."""
        return self.parts is None and self.copies is None


def parameter_groups(parameters: Sequence[DeclaredTensor], context: ParallelContext) -> list[ParameterGroup]:
    """What is trained of a rank's parameters, by what is to be done with it; no group is empty.

    Groups with the same replicas follow each other.
    """
    members: dict[tuple[str, ...], dict[tuple[bool, ...], list[DeclaredTensor]]] = {}
    for p in parameters:
        r = p.record
        if r.trainable:
            owned = context.owns(r, among_replicas=False)
            is_split = context.tp_group.size > 1 and "tp" in r.split_over
            key = (r.decays, is_split, bool(r.partial_over), bool(r.copies), owned)
            members.setdefault(r.replicated_over, {}).setdefault(key, []).append(p)
    return [
        ParameterGroup(
            tuple(found),
            decays,
            replicas=context.replicas_of(found[0].record),
            parts=context.tp_group if partial else None,
            copies=context.tied_group if copied else None,
            is_owned=owned,
        )
        for same_replicas in members.values()
        for (decays, _, partial, copied, owned), found in same_replicas.items()
    ]


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


def merge_equal_groups(adamw: torch.optim.AdamW) -> None:
    """Make one group of all that are treated alike, which the fused kernel then updates together.

    Args:
        adamw: of :func:`make_adamw`, whose groups differ in weight decay alone.
    """
    merged: dict[float, dict[str, Any]] = {}
    for group in adamw.param_groups:
        known = merged.setdefault(group["weight_decay"], group)
        if known is not group:
            known["params"] = [*known["params"], *group["params"]]
    adamw.param_groups[:] = merged.values()
