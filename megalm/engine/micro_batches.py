"""A replica's batch ▶ the micro-batches of one rank.

Shapes: B rows of this replica, b of a micro-batch, S sequence length, C context-parallel degree.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from megalm.core.attention.context_parallel import ContextParallel
from megalm.core.documents import Documents
from megalm.core.place import Place
from megalm.data.stream.batch import Batch
from megalm.engine.global_mean import count_units, unit_weight
from megalm.mesh.groups import ParallelContext
from megalm.models.micro_batch import MicroBatch


def training_micro_batches(
    batch: Batch, micro_batch_size: int, context: ParallelContext, cp: ContextParallel
) -> tuple[list[MicroBatch], int]:
    """Split a batch, and weigh each loss so that the mean over replicas is the mean of the global batch.

    All context-parallel ranks of a replica read the same rows and keep their share of each. Dropout masks depend on the
    rows' global numbers. Collective over ``context.replica_group``.

    Args:
        batch: whole sequences, [B, S].
        micro_batch_size: b, which divides B.
        context: this rank's place and groups.
        cp: which part of each sequence this rank holds.

    Returns:
        B / b micro-batches of [b, S/C] on the context's device; and what carries loss in the global batch, over all
        replicas. If nothing does, every weight is 0, and so are loss and gradients.
    """
    units = count_units(batch.loss_mask, context)
    weight = unit_weight(units, context.replica_group)
    return [
        _micro_batch(batch.take(slice(start, start + micro_batch_size)), context.device, cp, weight, dropout=True)
        for start in range(0, len(batch.tokens), micro_batch_size)
    ], units


def evaluation_micro_batch(batch: Batch, device: torch.device, cp: ContextParallel) -> MicroBatch:
    """This rank's share of a whole batch, each loss weighed by the mask alone, without dropout."""
    return _micro_batch(batch, device, cp, 1.0, dropout=False)


def _micro_batch(
    batch: Batch, device: torch.device, cp: ContextParallel, weight: float, *, dropout: bool
) -> MicroBatch:
    positions = cp.positions(batch.tokens.shape[1], device)

    def whole(values: NDArray[np.generic]) -> Tensor:
        return torch.from_numpy(values).to(device)

    def share(values: NDArray[np.generic]) -> Tensor:
        return whole(values)[:, positions]  # [b, S, ...] ▶ [b, S/C, ...]

    documents = None
    if batch.document_starts is not None:
        documents = Documents.from_starts(torch.from_numpy(batch.document_starts)).to(device).share(positions)
    # All context-parallel ranks compute the loss of a whole row, so each counts it as one of C shares.
    loss_mask = share(batch.loss_mask) if batch.loss_mask.ndim > 1 else whole(batch.loss_mask) / cp.group.size
    return MicroBatch(
        tokens=share(batch.tokens),
        labels=share(batch.labels),
        loss_weight=loss_mask * weight,
        place=Place(positions, whole(batch.samples) if dropout else None, documents),
        token_inputs={name: share(values) for name, values in batch.token_inputs.items()},
        row_inputs={name: whole(values) for name, values in batch.row_inputs.items()},
    )
