"""The mean over the global batch, where each replica holds a part of it: the rule, and all that depends on it.

A loss is a mean over units (tokens, sequences or pairs; see ``objectives.base``), of which the global batch has N. Each
of the R replicas (data-parallel × context-parallel ranks) adds up the losses of its own units. A unit weighs R / N, not
1 / N, so that the *mean* over replicas is the global mean: DeepSpeed's ZeRO-3 takes the mean of the replicas'
gradients, and in fp16 a sum that carries R is further from underflow. From this follow the three functions below; no
other file knows the factor R.

ZeRO-0 to 2 add the replicas' gradients, so they are divided by R before the norm is taken; a reported loss likewise.
"""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import Tensor

from megalm.mesh.groups import Group, ParallelContext

Number = TypeVar("Number", float, Tensor)


def count_units(own: Tensor, context: ParallelContext) -> Tensor:
    """N, the units of the global batch, a scalar of the device; collective over ``context.replica_group``.

    All context-parallel ranks of a data-parallel replica read the same rows, so each unit is counted by all of them.

    Args:
        own: the units of this rank's rows, a scalar in fp64; not changed.
        context: this rank's groups.
    """
    total = context.replica_group.all_reduce(own.clone())
    return torch.div(total.round(), context.cp_group.size, rounding_mode="floor")


def unit_weight(units: Tensor, replicas: Group) -> Tensor:
    """R / N: what a unit's loss is multiplied by. A batch without units has no loss that it could weigh."""
    return replicas.size / units.clamp(min=1.0)


def gradient_factor(replicas: Group, loss_scale: float) -> float:
    """What the sum of all replicas' gradients is multiplied by, to be the gradient of the global mean.

    Args:
        replicas: the R ranks.
        loss_scale: factor that the loss had in backward besides; 1 but for fp16.
    """
    return 1.0 / (replicas.size * loss_scale)


def share_of_mean(loss_sum: Number, replicas: Group) -> Number:
    """A replica's part of the global mean, from its weighted sum; the parts of all replicas add up to the mean."""
    return loss_sum / replicas.size
