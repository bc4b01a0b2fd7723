"""Transfers between pipeline ranks: grouped, non-blocking, waited for where the tensors are used.

What travels from stage to stage is a few named tensors whose shapes are declared beforehand and are the same between
all stages; what travels back is a gradient for each.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from megalm.core.pipeline.schedule import Transfer
from megalm.mesh.groups import Group

Key = tuple[bool, int, int]
"""Key of a pending transfer: (is it a gradient, stage that consumes it, micro-batch)."""

Tensors = Mapping[str, Tensor]
"""Tensors that travel between stages, by name."""


@dataclass(frozen=True)
class TensorSpec:
    """Shape and dtype that a receiver allocates."""

    shape: tuple[int, ...]
    dtype: torch.dtype


class Mailbox:
    """The pending sends and receives of a pipeline rank.

    The transfers of one tick are issued together (``batch_isend_irecv``), which is what makes an order with sends in
    both directions safe on NCCL. A receive is waited for only when its tensor is taken; a sent tensor is kept alive
    until its transfer has ended, and no longer. Tensors for a stage of the same rank are handed over as they are.

    Args:
        group: the pipeline ranks.
        specs: what travels, in the order in which it is sent.
        device: where tensors arrive.
    """

    def __init__(self, group: Group, specs: Mapping[str, TensorSpec], device: torch.device) -> None:
        self._group = group
        self._specs = specs
        self._device = device
        self._arriving: dict[Key, tuple[Tensors, list[dist.Work]]] = {}
        self._sending: list[tuple[list[Tensor], list[dist.Work]]] = []

    def exchange(self, result: Tensors | None, sends: tuple[Transfer, ...], receives: tuple[Transfer, ...]) -> None:
        """Issue the transfers of one tick; ``result`` is what this tick's action produced."""
        self._release_sent()
        operations: list[dist.P2POp] = []
        kept: list[Tensor] = []
        for transfer in sends:
            assert result is not None, "a tick that sends has an action that produced something"
            if transfer.source == transfer.target:
                self._arriving[_key(transfer)] = result, []
                continue
            target = self._group.ranks[transfer.target]
            for name in self._specs:
                tensor = result[name].contiguous()
                kept.append(tensor)
                operations.append(dist.P2POp(dist.isend, tensor, target, self._group.handle))
        buffers: dict[Key, Tensors] = {}
        for transfer in receives:
            if transfer.source == transfer.target:
                continue
            source = self._group.ranks[transfer.source]
            buffers[_key(transfer)] = arriving = self._empty()
            operations += [dist.P2POp(dist.irecv, tensor, source, self._group.handle) for tensor in arriving.values()]
        if not operations:
            return
        works = dist.batch_isend_irecv(operations)
        # NCCL returns one work for the whole group, gloo one per operation, in the order of the operations.
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

    def _empty(self) -> dict[str, Tensor]:
        return {
            name: torch.empty(spec.shape, dtype=spec.dtype, device=self._device) for name, spec in self._specs.items()
        }

    def _release_sent(self) -> None:
        self._sending = [(kept, works) for kept, works in self._sending if not all(w.is_completed() for w in works)]


def _key(transfer: Transfer) -> Key:
    return transfer.is_gradient, transfer.stage, transfer.micro_batch
