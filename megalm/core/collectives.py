"""Asynchronous and differentiable collectives over a group (Shoeybi et al. 2019; Korthikanti et al. 2022).

The ``start_*`` functions issue a collective and return a :class:`Pending` at once, for layers that compute meanwhile.
They work on one buffer. Ranks are concatenated along dim 0 by the backends, so along a later dim the gathered buffer is
copied once, unless every dim before it has one element: a micro-batch of one sequence gathers [1, S/T, H] without a
copy.

The others are differentiable. Each is a linear map on the tensors of all members together, so its backward is the
adjoint map:

    ====================== ============================== ==================================
    function               forward                        backward (adjoint)
    ====================== ============================== ==================================
    copy_to_group          identity                       all-reduce       (Megatron's *f*)
    reduce_from_group      all-reduce                     identity         (Megatron's *g*)
    gather_for_matmul      all-gather along ``dim``       reduce-scatter
    reduce_scatter         reduce-scatter along ``dim``   all-gather
    ====================== ============================== ==================================

With a group of one, all are the identity.

Shapes: T size of the group.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from megalm.mesh.groups import Group


class Work(Protocol):
    """What of ``dist.Work`` a :class:`Pending` needs."""

    def wait(self) -> object:
        """Until it is done."""


class Pending:
    """A collective under way.

    Args:
        work: what to wait for; None: it is done.
        result: the tensor that the collective fills.
        operand: what it reads; kept alive until then.
        finish: turns the result into what :meth:`wait` returns.
    """

    def __init__(
        self,
        work: Work | None,
        result: Tensor,
        operand: Tensor | None = None,
        finish: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        self._work = work
        self._result = result
        self._operand = operand
        self._finish = finish

    def wait(self) -> Tensor:
        """The result, once it is there (on CUDA: in the order of the current stream)."""
        if self._work is not None:
            self._work.wait()
            self._work = self._operand = None
        return self._result if self._finish is None else self._finish(self._result)


def start_all_reduce(x: Tensor, group: Group) -> Pending:
    """Add the members' tensors into ``x``, in place."""
    if group.size == 1:
        return Pending(None, x)
    return Pending(dist.all_reduce(x, group=group.handle, async_op=True), x)


def start_all_gather(x: Tensor, group: Group, dim: int) -> Pending:
    """Concatenate the members' tensors along ``dim``: [.., n, ..] ▶ [.., T·n, ..]."""
    if group.size == 1:
        return Pending(None, x)
    parts = x.new_empty((group.size, *x.shape))
    x = x.contiguous()
    work = _all_gather_single(parts.flatten(0, 1), x, group)
    return Pending(work, parts, x, lambda parts: parts.movedim(0, dim).flatten(dim, dim + 1))


def start_reduce_scatter(x: Tensor, group: Group, dim: int) -> Pending:
    """Add the members' tensors and keep this member's share along ``dim``: [.., n, ..] ▶ [.., n/T, ..]."""
    if group.size == 1:
        return Pending(None, x)
    parts = _by_member(x, group, dim).contiguous()
    out = x.new_empty(parts.shape[1:])
    work = _reduce_scatter_single(out, parts.flatten(0, 1), group)
    return Pending(work, out, parts)


def start_reduce_scatter_in_place(x: Tensor, group: Group) -> Pending:
    """Add the members' tensors [T·n] and put this member's piece of the sum, [n], where it lies in ``x``."""
    piece = x.chunk(group.size)[group.index]
    return Pending(None if group.size == 1 else _reduce_scatter_single(piece, x, group), piece)


def start_all_gather_in_place(x: Tensor, group: Group) -> Pending:
    """Fill ``x`` [T·n] with the members' pieces [n]; this member's lies in it already."""
    piece = x.chunk(group.size)[group.index]
    return Pending(None if group.size == 1 else _all_gather_single(x, piece, group), x)


def start_all_to_all(x: Tensor, group: Group, finish: Callable[[Tensor], Tensor]) -> Pending:
    """Send the t-th piece of ``x`` [T·n] to member t; ``finish`` is given the pieces that came, in members' order."""
    received = torch.empty_like(x)
    return Pending(dist.all_to_all_single(received, x, group=group.handle, async_op=True), received, x, finish)


def copy_to_group(x: Tensor, group: Group) -> Tensor:
    """Enter a column-parallel region: every member reads the same ``x``."""
    return _apply(x, group, lambda t: t, lambda g: _all_reduce(g, group))


def reduce_from_group(x: Tensor, group: Group) -> Tensor:
    """Leave a row-parallel region: add the members' partial results."""
    return _apply(x, group, lambda t: _all_reduce(t, group), lambda g: g)


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
    return start_all_reduce(x.clone(memory_format=torch.contiguous_format), group).wait()


def _all_gather(x: Tensor, group: Group, dim: int) -> Tensor:
    return start_all_gather(x, group, dim).wait()


def _reduce_scatter(x: Tensor, group: Group, dim: int) -> Tensor:
    return start_reduce_scatter(x, group, dim).wait()


def _by_member(x: Tensor, group: Group, dim: int) -> Tensor:
    """[.., n, ..] ▶ a view [T, .., n/T, ..]."""
    if x.shape[dim] % group.size:
        raise ValueError(f"dim {dim} of {tuple(x.shape)} does not split evenly over {group.size} ranks")
    members: Tensor = x.unflatten(dim, (group.size, -1)).movedim(dim, 0)
    return members


def _all_gather_single(out: Tensor, x: Tensor, group: Group) -> dist.Work:
    # torch 2.13 renamed both collectives; the old names warn there.
    gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    work: dist.Work = gather(out, x, group=group.handle, async_op=True)
    return work


def _reduce_scatter_single(out: Tensor, x: Tensor, group: Group) -> dist.Work:
    scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
    work: dist.Work = scatter(out, x, group=group.handle, async_op=True)
    return work
