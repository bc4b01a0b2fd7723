"""Context parallelism: each sequence is split over ranks, and attention covers the whole sequence.

Shapes: B batch, S whole sequence, C context-parallel degree, s = S/C a rank's share, N query heads, K key/value heads,
D head dim.

*Ulysses* (Jacobs et al. 2023) trades shares: an all-to-all turns [all heads, a share of the sequence] into [a share of
the heads, the whole sequence] before the core, and back after it. Its degree is bounded by the number of heads.

*Ring* attention (Liu et al. 2023) leaves queries where they are; keys and values travel once round the ranks while each
computes with what it has (see ``ring.py``). Under a causal mask late tokens have more to see, so each rank holds two
chunks of the sequence, one from either end, which gives all of them the same work.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import gcd

import torch
import torch.distributed as dist
from torch import Tensor

from megalm.core.attention.attend import AttentionCore
from megalm.core.attention.ring import Chunks, ring_attention
from megalm.core.place import Place
from megalm.mesh.groups import ALONE, Group


@dataclass(frozen=True)
class ContextParallel:
    """How a sequence is split over ranks, and how attention over the whole sequence is computed.

    Attributes:
        group: the context-parallel group, of degree C.
        method: ``ulysses`` or ``ring``.
    """

    group: Group = ALONE
    method: str = "ulysses"

    def positions(self, sequence_length: int, device: torch.device | str = "cpu") -> Tensor:
        """[S/C] int64: the positions of the whole sequence that this rank holds, ascending.

        A contiguous share for Ulysses; for the ring, of 2C chunks those with the numbers r and 2C − 1 − r.
        """
        everything = torch.arange(sequence_length, device=device)
        if self.method == "ring" and self.group.size > 1:
            return torch.cat([everything.chunk(2 * self.group.size)[c] for c in self._chunks.of(self.group.index)])
        return everything.chunk(self.group.size)[self.group.index]

    def attend(
        self, core: AttentionCore, query: Tensor, key: Tensor, value: Tensor, heads: Tensor, place: Place
    ) -> Tensor:
        """The attention core over whole sequences.

        Args:
            core: masks and dropout of the layer.
            query: this rank's queries, [B, N, s, D].
            key: this rank's keys, [B, K, s, D].
            value: this rank's values, [B, K, s, D].
            heads: [N], the numbers of the query heads in the whole model.
            place: positions and samples of this rank's tokens.

        Returns:
            [B, N, s, D] for this rank's queries.
        """
        mask = place.window_masks.get(core.window)
        if self.group.size == 1:
            return core(query, key, value, heads, place.samples, place.documents, mask)  # type: ignore[no-any-return]
        if self.method == "ring":
            assert place.documents is None, "refused by config.rules.data.documents_are_seen_whole"
            return ring_attention(core, query, key, value, heads, place.samples, self._chunks, self.group)
        key, value = (_repeat_heads(t, self.group.size) for t in (key, value))
        query, key, value = (_AllToAll.over(t, self.group, give=1, take=2) for t in (query, key, value))
        own_heads = heads.chunk(self.group.size)[self.group.index]
        mixed = core(query, key, value, own_heads, place.samples, place.documents, mask)  # [B, N/C, S, D]
        return _AllToAll.over(mixed, self.group, give=2, take=1)

    @property
    def _chunks(self) -> Chunks:
        return Chunks(self.group.size)


def _repeat_heads(x: Tensor, degree: int) -> Tensor:
    """Key/value heads [B, K, s, D] repeated, each in place, until the degree divides their number."""
    times = degree // gcd(x.shape[1], degree)
    return x if times == 1 else x.repeat_interleave(times, dim=1)


class _AllToAll(torch.autograd.Function):
    """Give each rank its part along one dim, put together what all gave along another; the adjoint is the reverse."""

    @classmethod
    def over(cls, x: Tensor, group: Group, *, give: int, take: int) -> Tensor:
        """``x`` with dim ``give`` C times smaller and dim ``take`` C times larger."""
        apply: Callable[..., Tensor] = cls.apply
        return apply(x, group, give, take)

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: torch.autograd.function.FunctionCtx, x: Tensor, group: Group, give: int, take: int
    ) -> Tensor:
        ctx.group, ctx.give, ctx.take = group, give, take  # type: ignore[attr-defined]
        return _all_to_all(x, group, give, take)

    @staticmethod
    def backward(  # type: ignore[override]
        ctx: torch.autograd.function.FunctionCtx, gradient: Tensor
    ) -> tuple[Tensor, None, None, None]:
        return _all_to_all(gradient, ctx.group, ctx.take, ctx.give), None, None, None  # type: ignore[attr-defined]


def _all_to_all(x: Tensor, group: Group, give: int, take: int) -> Tensor:
    outgoing = torch.stack(x.chunk(group.size, dim=give))  # [C, …], part j for member j
    incoming = torch.empty_like(outgoing)
    dist.all_to_all_single(incoming, outgoing, group=group.handle)
    return torch.cat(incoming.unbind(), dim=take)
