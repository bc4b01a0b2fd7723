"""Transfers between pipeline ranks: grouped, non-blocking, waited for where the tensor is used.

Shapes: B micro-batch, S sequence, H hidden; every activation and every gradient between stages is [B, S, H], with the
share of S that a rank holds under context and sequence parallelism.
"""

from __future__ import annotations

import time

import torch
import torch.distributed as dist
from torch import Tensor

from megalm.core.pipeline.schedule import Transfer
from megalm.mesh.groups import Group

Key = tuple[bool, int, int]
"""(is it a gradient, stage that consumes it, micro-batch) of a tensor on its way."""


class Mailbox:
    """What a pipeline rank has sent and has been promised.

    The transfers of one tick are issued together (``batch_isend_irecv``), which is what makes an order with sends in
    both directions safe on NCCL. A receive is waited for only when its tensor is taken; a sent tensor is kept alive
    until its transfer has ended, and no longer. A tensor for a stage of the same rank is handed over as it is.
    """

    def __init__(self, group: Group, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
        self._group = group
        self._shape = shape
        self._dtype = dtype
        self._device = device
        self._arriving: dict[Key, tuple[Tensor, list[dist.Work]]] = {}
        self._sending: list[tuple[list[Tensor], list[dist.Work]]] = []
        self.wait_seconds = 0.0

    def exchange(self, result: Tensor | None, sends: tuple[Transfer, ...], receives: tuple[Transfer, ...]) -> None:
        """Issue the transfers of one tick; ``result`` is what this tick's action produced."""
        self._release_sent()
        operations: list[dist.P2POp] = []
        kept: list[Tensor] = []
        for transfer in sends:
            assert result is not None, "a tick that sends has an action that produced something"
            if transfer.source == transfer.target:
                self._arriving[_key(transfer)] = result, []
                continue
            tensor = result.contiguous()
            kept.append(tensor)
            operations.append(dist.P2POp(dist.isend, tensor, self._group.ranks[transfer.target], self._group.handle))
        buffers: dict[Key, Tensor] = {}
        for transfer in receives:
            if transfer.source == transfer.target:
                continue
            buffer = torch.empty(self._shape, dtype=self._dtype, device=self._device)
            buffers[_key(transfer)] = buffer
            operations.append(dist.P2POp(dist.irecv, buffer, self._group.ranks[transfer.source], self._group.handle))
        if not operations:
            return
        works = dist.batch_isend_irecv(operations)
        # NCCL returns one work for the whole group, gloo one per operation, in the order of the operations.
        grouped = len(works) != len(operations)
        if kept:
            self._sending.append((kept, works if grouped else works[: len(kept)]))
        for offset, (key, buffer) in enumerate(buffers.items()):
            self._arriving[key] = buffer, works if grouped else [works[len(kept) + offset]]

    def take(self, *, is_gradient: bool, stage: int, micro_batch: int) -> Tensor:
        """The tensor that an action consumes, waiting for it if need be; the mailbox forgets it."""
        buffer, works = self._arriving.pop((is_gradient, stage, micro_batch))
        self._wait(works)
        return buffer

    def flush(self) -> None:
        """Wait until every tensor sent has left."""
        for _, works in self._sending:
            self._wait(works)
        self._sending.clear()

    def _release_sent(self) -> None:
        self._sending = [(kept, works) for kept, works in self._sending if not all(w.is_completed() for w in works)]

    def _wait(self, works: list[dist.Work]) -> None:
        start = time.perf_counter()
        for work in works:
            work.wait()
        self.wait_seconds += time.perf_counter() - start


def _key(transfer: Transfer) -> Key:
    return transfer.is_gradient, transfer.stage, transfer.micro_batch
