"""Each collective's backward is the adjoint of its forward: <A x, y> = <x, Aᵀ y>, summed over the ranks."""

from __future__ import annotations

import pytest
import torch
from harness import run_ranks

WORLD = 3
NAMES = (
    "copy_to_group",
    "reduce_from_group",
    "gather_for_matmul",
    "reduce_scatter",
)
DENSE = {
    "copy_to_group": lambda xs, r: xs[r],
    "reduce_from_group": lambda xs, r: sum(xs),
    "gather_for_matmul": lambda xs, r: torch.cat(xs, 1),
    "reduce_scatter": lambda xs, r: sum(xs).chunk(WORLD, 1)[r],
}
"""Forward of every rank ``r`` from the inputs of all."""

REPLICATED_GRADIENT = ("reduce_from_group",)
"""What follows is repeated by every rank, so each has the whole gradient already, and it must not be added again."""


def value(rank: int, salt: int, columns: int = 6) -> torch.Tensor:
    return torch.randn(2, columns, generator=torch.Generator().manual_seed(10 * salt + rank), dtype=torch.float64)


def probe(names: tuple[str, ...]) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    from megalm.core import collectives
    from megalm.mesh.groups import ParallelContext
    from megalm.mesh.topology import Topology

    context = ParallelContext.create(Topology(tp=WORLD))
    results = {}
    for name in names:
        x = value(context.rank, 1).requires_grad_()
        function = getattr(collectives, name)
        y = (
            function(x, context.tp_group)
            if name in ("copy_to_group", "reduce_from_group")
            else function(x, context.tp_group, 1)
        )
        seed = 0 if name in REPLICATED_GRADIENT else context.rank
        y.backward(value(seed, 2, y.shape[1]))
        results[name] = y.detach(), x.grad
    return results


@pytest.fixture(scope="module")
def results() -> list[dict[str, tuple[torch.Tensor, torch.Tensor]]]:
    return run_ranks(WORLD, probe, NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_forward_and_adjoint(name: str, results) -> None:
    inputs = [value(rank, 1).requires_grad_() for rank in range(WORLD)]
    outputs = [DENSE[name](inputs, rank) for rank in range(WORLD)]
    if name in REPLICATED_GRADIENT:
        outputs[0].backward(value(0, 2, outputs[0].shape[1]))  # one copy of what all ranks repeat
    elif name == "copy_to_group":
        # The input is one tensor that all ranks read: its gradient is the sum of what each read brings.
        total = sum(value(rank, 2) for rank in range(WORLD))
        for x in inputs:
            x.grad = total
    else:
        torch.autograd.backward(outputs, [value(rank, 2, outputs[rank].shape[1]) for rank in range(WORLD)])
    for rank in range(WORLD):
        y, gradient = results[rank][name]
        torch.testing.assert_close(y, outputs[rank].detach())
        torch.testing.assert_close(gradient, inputs[rank].grad)
