"""Differentiable collectives over a tensor-parallel group (Shoeybi et al. 2019, section 3; Korthikanti et al. 2022).

Each is a linear map on the tensors of all members together, so its backward is the adjoint map:

    ====================== ============================== ==================================
    function               forward                        backward (adjoint)
    ====================== ============================== ==================================
    copy_to_group          identity                       all-reduce       (Megatron's *f*)
    reduce_from_group      all-reduce                     identity         (Megatron's *g*)
    scatter_to_group       take own slice along ``dim``   all-gather
    gather_from_group      all-gather along ``dim``       take own slice
    gather_for_matmul      all-gather along ``dim``       reduce-scatter
    reduce_scatter         reduce-scatter along ``dim``   all-gather
    ====================== ============================== ==================================

``gather_from_group`` and ``gather_for_matmul`` differ in what follows: the first feeds computation that every member
repeats (each already has the whole gradient), the second feeds sharded weights (each has a part of the gradient, and
the parts must be added). With a group of one, all are the identity.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor

from megalm.core.groups import Group


def copy_to_group(x: Tensor, group: Group) -> Tensor:
    """Enter a column-parallel region: every member reads the same ``x``."""
    return _apply(x, group, lambda t: t, lambda g: _all_reduce(g, group))


def reduce_from_group(x: Tensor, group: Group) -> Tensor:
    """Leave a row-parallel region: add the members' partial results."""
    return _apply(x, group, lambda t: _all_reduce(t, group), lambda g: g)


def scatter_to_group(x: Tensor, group: Group, dim: int) -> Tensor:
    """Keep this member's slice of a tensor that all members hold."""
    return _apply(x, group, lambda t: _own_slice(t, group, dim), lambda g: _all_gather(g, group, dim))


def gather_from_group(x: Tensor, group: Group, dim: int) -> Tensor:
    """Assemble the full tensor for computation that every member repeats."""
    return _apply(x, group, lambda t: _all_gather(t, group, dim), lambda g: _own_slice(g, group, dim))


def gather_for_matmul(x: Tensor, group: Group, dim: int) -> Tensor:
    """Assemble the full tensor for a product with sharded weights."""
    return _apply(x, group, lambda t: _all_gather(t, group, dim), lambda g: _reduce_scatter(g, group, dim))


def reduce_scatter(x: Tensor, group: Group, dim: int) -> Tensor:
    """Add the members' partial results and keep this member's slice."""
    return _apply(x, group, lambda t: _reduce_scatter(t, group, dim), lambda g: _all_gather(g, group, dim))


class _Linear(torch.autograd.Function):
    """A linear map across ranks, given with its adjoint."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: torch.autograd.function.FunctionCtx,
        x: Tensor,
        forward: Callable[[Tensor], Tensor],
        adjoint: Callable[[Tensor], Tensor],
    ) -> Tensor:
        ctx.adjoint = adjoint  # type: ignore[attr-defined]
        y = forward(x)
        return y.view_as(y) if y is x else y

    @staticmethod
    def backward(  # type: ignore[override]
        ctx: torch.autograd.function.FunctionCtx, grad: Tensor
    ) -> tuple[Tensor, None, None]:
        return ctx.adjoint(grad), None, None  # type: ignore[attr-defined]


def _apply(x: Tensor, group: Group, forward: Callable[[Tensor], Tensor], adjoint: Callable[[Tensor], Tensor]) -> Tensor:
    if group.size == 1:
        return x
    result: Tensor = _Linear.apply(x, forward, adjoint)  # type: ignore[no-untyped-call]
    return result


def _all_reduce(x: Tensor, group: Group) -> Tensor:
    # A copy: the caller's tensor may be saved for backward, or be a gradient that autograd still hands to others.
    return group.all_reduce(x.clone(memory_format=torch.contiguous_format))


def _all_gather(x: Tensor, group: Group, dim: int) -> Tensor:
    parts = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(group.size)]
    dist.all_gather(parts, x.contiguous(), group=group.handle)
    return torch.cat(parts, dim)


def _own_slice(x: Tensor, group: Group, dim: int) -> Tensor:
    return _chunks(x, group, dim)[group.index].contiguous()


def _reduce_scatter(x: Tensor, group: Group, dim: int) -> Tensor:
    parts = [part.contiguous() for part in _chunks(x, group, dim)]
    out = torch.empty_like(parts[group.index])
    dist.reduce_scatter(out, parts, group=group.handle)
    return out


def _chunks(x: Tensor, group: Group, dim: int) -> tuple[Tensor, ...]:
    if x.shape[dim] % group.size:
        raise ValueError(f"dim {dim} of {tuple(x.shape)} does not split evenly over {group.size} ranks")
    return x.chunk(group.size, dim)
