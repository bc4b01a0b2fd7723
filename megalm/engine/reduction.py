"""Ways to sum a bucket of gradients over the replicas, so that each replica has the sum of the piece that it owns.

    ====================== ========================================== =================================================
    way                    where                                      messages, sums
    ====================== ========================================== =================================================
    :class:`ReduceScatter` NCCL                                       one collective; NCCL's order of sums, in fp32
    :class:`ToOwners`      gloo: its reduce-scatter is an all-reduce  one reduction per replica, in fp32
                           and takes 1.6 times as long at 4 replicas
    :class:`Exchange16Bit` ``engine.reduce_dtype=bf16``, on either    one all-to-all of half the bytes; each replica
                                                                      adds the pieces that it received, in fp32
    :class:`AllReduce`     ZeRO-0, where every replica owns all       one collective
    ====================== ========================================== =================================================

What "fp32 sums" means for 16-bit messages: a reduce-scatter in bf16 would round after *each* of the R - 1 additions on
the way around the ring. Here each replica's gradient, summed over micro-batches in fp32, is rounded to bf16 once (an
error of at most 2⁻⁸ of it; that of the piece which a replica owns itself is not rounded at all), and nothing after.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from megalm.core.collectives import Pending, Work, start_all_reduce, start_all_to_all, start_reduce_scatter_in_place
from megalm.mesh.groups import Group


class Reduction(Protocol):
    """One way to sum buckets over replicas."""

    def start(self, values: Tensor, replicas: Group) -> Pending:
        """Start the sum of ``values`` [R·n] over R replicas; it may destroy what they hold.

        Returns:
            What gives this replica's piece of the sum, [n], a view of ``values``.
        """


class ReduceScatter:
    """One reduce-scatter."""

    def start(self, values: Tensor, replicas: Group) -> Pending:
        """See :class:`Reduction`."""
        return start_reduce_scatter_in_place(values, replicas)


class ToOwners:
    """One reduction to each owner."""

    def start(self, values: Tensor, replicas: Group) -> Pending:
        """See :class:`Reduction`."""
        pieces = values.chunk(replicas.size)
        works = [
            dist.reduce(piece, dst=rank, group=replicas.handle, async_op=True)
            for piece, rank in zip(pieces, replicas.ranks, strict=True)
        ]
        return Pending(_All(works), pieces[replicas.index])


class Exchange16Bit:
    """Pieces are exchanged in bf16, and added in fp32 by those that own them."""

    def start(self, values: Tensor, replicas: Group) -> Pending:
        """See :class:`Reduction`."""
        own = values.chunk(replicas.size)[replicas.index]

        def add_up(received: Tensor) -> Tensor:
            parts = received.view(replicas.size, -1)
            parts[replicas.index].zero_()
            return own.add_(parts.sum(dim=0, dtype=values.dtype))

        return start_all_to_all(values.to(torch.bfloat16), replicas, add_up)


class AllReduce:
    """One all-reduce: every replica owns all."""

    def start(self, values: Tensor, replicas: Group) -> Pending:
        """See :class:`Reduction`."""
        return start_all_reduce(values, replicas)


def reduction_to_pieces(transport: str, reduce_dtype: str) -> Reduction:
    """The way for buckets of which each replica owns a piece.

    Args:
        transport: of the context.
        reduce_dtype: ``engine.reduce_dtype``.
    """
    if reduce_dtype == "bf16":
        return Exchange16Bit()
    return ReduceScatter() if transport == "nccl" else ToOwners()


class _All:
    """Several collectives under way."""

    def __init__(self, works: Sequence[Work | None]) -> None:
        self._works = works

    def wait(self) -> None:
        """Until all are done."""
        for work in self._works:
            assert work is not None, "an asynchronous collective returns its work"
            work.wait()
