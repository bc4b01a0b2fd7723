"""A replica's batch ▶ the micro-batches of one rank.

Shapes: B rows of this replica, b of a micro-batch, S sequence length, C context-parallel degree.
"""

from __future__ import annotations

from collections.abc import Mapping

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
    samples = torch.from_numpy(batch.samples).to(context.device)
    return [
        _micro_batch(batch, slice(start, start + micro_batch_size), context.device, cp, weight=weight, samples=samples)
        for start in range(0, len(batch.tokens), micro_batch_size)
    ], units


def evaluation_micro_batch(batch: Batch, device: torch.device, cp: ContextParallel) -> MicroBatch:
    """This rank's share of a whole batch, each loss weighed by the mask alone, without dropout."""
    return _micro_batch(batch, slice(None), device, cp, weight=1.0, samples=None)


def _micro_batch(
    batch: Batch, rows: slice, device: torch.device, cp: ContextParallel, *, weight: float, samples: Tensor | None
) -> MicroBatch:
    length = batch.tokens.shape[1]
    positions = cp.positions(length, device)

    def whole(values: NDArray[np.generic]) -> Tensor:
        return torch.from_numpy(values[rows]).to(device)  # [b, ...]

    def share(values: NDArray[np.generic]) -> Tensor:
        return whole(values)[:, positions]  # [b, S, ...] ▶ [b, S/C, ...]

    def shares(inputs: Mapping[str, NDArray[np.generic]]) -> dict[str, Tensor]:
        return {name: share(values) for name, values in inputs.items()}

    documents = None
    if batch.document_starts is not None:
        starts = torch.from_numpy(batch.document_starts[rows])
        documents = Documents.from_starts(starts).to(device).share(positions)
    # All context-parallel ranks compute the loss of a whole row, so each counts it as one of C shares.
    loss_mask = share(batch.loss_mask) if batch.loss_mask.ndim > 1 else whole(batch.loss_mask) / cp.group.size
    return MicroBatch(
        tokens=share(batch.tokens),
        labels=share(batch.labels),
        loss_weight=loss_mask * weight,
        place=Place(positions, None if samples is None else samples[rows], documents),
        token_inputs=shares(batch.token_inputs),
        row_inputs={name: whole(values) for name, values in batch.row_inputs.items()},
    )
