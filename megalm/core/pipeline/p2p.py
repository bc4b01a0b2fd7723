"""Transfers between pipeline ranks: non-blocking, waited for where the tensors are used.

What travels from stage to stage is a few named tensors whose shapes are declared beforehand and are the same between
all stages; what travels back is a gradient for each.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import prod

import torch
import torch.distributed as dist
from torch import Tensor

from megalm.core.pipeline.order import Exchange
from megalm.core.pipeline.schedule import Transfer
from megalm.errors import ConfigError
from megalm.mesh.groups import Group, ParallelContext
from megalm.mesh.transport import NCCL

Key = tuple[bool, int, int]
"""Key of a pending transfer: (is it a gradient, stage that consumes it, micro-batch)."""

Tensors = Mapping[str, Tensor]
"""Tensors that travel between stages, by name."""


@dataclass(frozen=True)
class TensorSpec:
    """Shape and dtype that a receiver allocates."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        """Bytes of its elements."""
        return prod(self.shape) * self.dtype.itemsize


class Mailbox:
    """The pending sends and receives of a pipeline rank.

    An exchange is issued as one ``batch_isend_irecv``: one tensor after another in the order in which they are
    declared, on the communicator that the exchange names. A receive is waited for only when its tensor is taken; a sent
    tensor is kept alive until its transfer has ended, and no longer. Tensors for a stage of the same rank are handed
    over as they are.

    Args:
        context: this rank's place, the pipeline's group and its links.
        specs: what travels, in the order in which it is sent.
    """

    def __init__(self, context: ParallelContext, specs: Mapping[str, TensorSpec]) -> None:
        self._context = context
        self._rank = context.coordinates.pp
        self._specs = specs
        self._arriving: dict[Key, tuple[Tensors, list[dist.Work]]] = {}
        self._sending: list[tuple[list[Tensor], list[dist.Work]]] = []

    def exchange(self, exchange: Exchange, result: Tensors | None) -> None:
        """Issue transfers; ``result`` is what this tick's action produced, None before it."""
        self._release_sent()
        group = self._context.pp_group if exchange.link is None else self._context.link(*exchange.link)
        operations: list[dist.P2POp] = []
        kept: list[Tensor] = []
        buffers: dict[Key, Tensors] = {}
        for transfer in exchange.transfers:
            if transfer.source == transfer.target:
                assert result is not None, "a tick that sends has an action that produced something"
                self._arriving[_key(transfer)] = result, []
            elif transfer.source == self._rank:
                assert result is not None, "a tick that sends has an action that produced something"
                sent = [result[name].contiguous() for name in self._specs]
                kept += sent
                operations += [self._operation(dist.isend, tensor, transfer.target, group) for tensor in sent]
            else:
                buffers[_key(transfer)] = arriving = self._empty()
                operations += [
                    self._operation(dist.irecv, tensor, transfer.source, group) for tensor in arriving.values()
                ]
        if not operations:
            return
        works = dist.batch_isend_irecv(operations)
        # NCCL returns one work for the whole group, gloo one per operation, in the order of the operations: of an
        # exchange that sends and receives, what it sends comes first.
        grouped = len(works) != len(operations)
        if kept:
            self._sending.append((kept, works if grouped else works[: len(kept)]))
        each = len(self._specs)
        for number, (key, tensors) in enumerate(buffers.items()):
            first = len(kept) + number * each
            self._arriving[key] = tensors, works if grouped else works[first : first + each]

    def take(self, *, is_gradient: bool, stage: int, micro_batch: int) -> Tensors:
        """The tensors that an action consumes, waiting for them if need be; the mailbox forgets them."""
        arrived, works = self._arriving.pop((is_gradient, stage, micro_batch))
        for work in works:
            work.wait()
        return arrived

    def flush(self) -> None:
        """Wait until every tensor sent has left."""
        for _, works in self._sending:
            for work in works:
                work.wait()
        self._sending.clear()

    def _operation(self, operation: Callable[..., object], tensor: Tensor, peer: int, group: Group) -> dist.P2POp:
        return dist.P2POp(operation, tensor, self._context.pp_group.ranks[peer], group.handle)

    def _empty(self) -> dict[str, Tensor]:
        return {
            name: torch.empty(spec.shape, dtype=spec.dtype, device=self._context.device)
            for name, spec in self._specs.items()
        }

    def _release_sent(self) -> None:
        self._sending = [(kept, works) for kept, works in self._sending if not all(w.is_completed() for w in works)]


def posts_receives_early(context: ParallelContext, wanted: bool | None) -> bool:
    """Whether receives are posted before the work of their tick.

    They need a communicator per directed pair of neighbours. Gloo matches transfers by their ends, so the pipeline's
    group is as good there; NCCL has them where the context has links.

    Args:
        context: this rank's groups.
        wanted: ``parallel.early_receives``; None: on gloo. NCCL's order is proven on gloo alone until now.

    Raises:
        ConfigError: they are wanted on NCCL in a layout that has no links.
    """
    on_nccl = context.transport == NCCL
    if wanted and on_nccl and context.topology.pp > 1 and not context.links:
        raise ConfigError([f"parallel.early_receives=true: {context.topology} has no communicators for it; false"])
    return not on_nccl if wanted is None else wanted


def _key(transfer: Transfer) -> Key:
    return transfer.is_gradient, transfer.stage, transfer.micro_batch
