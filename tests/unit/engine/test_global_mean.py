"""The replicas' weighted losses and gradients add up to those of the mean over the global batch, in every format."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from megalm.engine.global_mean import count_units, gradient_factor, share_of_mean, unit_weight
from megalm.mesh.groups import Group, ParallelContext


@pytest.mark.parametrize("loss_scale", [1.0, 2.0**16])
@pytest.mark.parametrize("replicas", [1, 2, 3, 8])
def test_weight_and_factors_cancel(replicas: int, loss_scale: float) -> None:
    group = Group(tuple(range(replicas)), 0)
    units, losses = 7 * replicas + 1, np.random.default_rng(0).random(7 * replicas + 1)
    weighted = [
        float(unit_weight(torch.tensor(units, dtype=torch.float64), group)) * losses[replica::replicas].sum()
        for replica in range(replicas)
    ]
    assert sum(share_of_mean(own, group) for own in weighted) == pytest.approx(losses.mean())
    gradient = sum(loss_scale * own for own in weighted)
    assert gradient * gradient_factor(group, loss_scale) == pytest.approx(losses.mean())


def test_a_batch_in_which_nothing_counts_has_finite_weights() -> None:
    context = replace(ParallelContext.single())
    units = count_units(torch.zeros((), dtype=torch.float64), context)
    assert units == 0
    assert unit_weight(units, context.replica_group) == 1.0
