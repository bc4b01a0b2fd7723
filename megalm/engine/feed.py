"""How a rank comes by its replica's rows: it reads them itself, or one rank of the replica reads and sends them.

The ranks that hold one copy of the weights together (tp × pp, one context-parallel position) compute with the same
rows. Where each of them reads, a step opens files tp · pp times as often as it must; where one does, the others are
sent the whole batch, in one message per step: a few MiB, less than one activation of a pipeline. Sample numbers,
documents and loss weights are wanted on every stage (dropout, attention, scalars that an objective takes from blocks),
so no rank is sent less.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor

from megalm.config.support import ONE_PER_REPLICA
from megalm.core.host import to_device
from megalm.data.stream.batch import Batch
from megalm.data.stream.loader import TrainLoader
from megalm.engine.packed_batch import Layout, PackedBatch, layout_of, pack
from megalm.mesh.groups import ParallelContext


class Feed:
    """The batches of one rank, on its device.

    Args:
        context: this rank's place and groups.
        readers: ``data.readers``; with one per replica, every call is collective over the context's ``model_group``.
        example: what the objective makes of some rows; batches of other rows have the same arrays.
    """

    def __init__(self, context: ParallelContext, readers: str, example: Batch) -> None:
        self._context = context
        self._is_shared = readers == ONE_PER_REPLICA and context.model_group.size > 1
        self._layout: Layout = layout_of(example)

    @property
    def reads(self) -> bool:
        """Whether this rank reads rows; the others open no file of the data."""
        return not self._is_shared or self._context.model_group.index == 0

    def next(self, loader: TrainLoader) -> PackedBatch:
        """The next training batch of this rank's replica, which then counts as consumed.

        Raises:
            DataError: a shard is corrupt or gone; on ranks that read.
        """
        if self.reads:
            batch = loader.next()
            return self.deliver(batch, len(batch.tokens))
        return self.deliver(None, loader.skip())

    def deliver(self, batch: Batch | None, rows: int) -> PackedBatch:
        """A batch on the device.

        Args:
            batch: as it was read; None on ranks that do not read.
            rows: how many it has.
        """
        device = self._context.device
        if batch is None:
            assert not self.reads, "a rank that reads has a batch"
            buffer = torch.empty(self._layout.nbytes(rows), dtype=torch.uint8, device=device)
        else:
            buffer = to_device(pack(batch, device, self._layout), device)
        return self._layout.views(self.share(buffer), rows)

    def share(self, buffer: Tensor) -> Tensor:
        """A packed batch on the device, from the rank that has read it to those that have not; filled in place."""
        group = self._context.model_group
        if self._is_shared:
            dist.broadcast(buffer, src=group.ranks[0], group=group.handle)
        return buffer

    def deliver_all(
        self, batches: Iterator[Batch], count: int, rows: int
    ) -> Iterator[tuple[Batch | None, PackedBatch]]:
        """Some batches of the same number of rows, as they were read (None on ranks that do not read) and delivered.

        Args:
            batches: consumed on ranks that read alone.
            count: how many.
            rows: of each.
        """
        for _ in range(count):
            batch = next(batches) if self.reads else None
            yield batch, self.deliver(batch, rows)
