"""A replica's batch ▶ the micro-batches of one rank.

Shapes: B rows of this replica, b of a micro-batch, S sequence length, C context-parallel degree.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megalm.core.attention.context_parallel import ContextParallel
from megalm.core.documents import Documents
from megalm.core.place import Place
from megalm.data.stream.loader import Batch
from megalm.mesh.groups import ParallelContext
from megalm.models.transformer import MicroBatch


def training_micro_batches(
    batch: Batch, micro_batch_size: int, context: ParallelContext, cp: ContextParallel, *, eos_id: int | None = None
) -> tuple[list[MicroBatch], int]:
    """Split a batch; weigh each token so that the mean of the data-parallel ranks' gradients is the global mean's.

    All context-parallel ranks of a replica read the same rows, count all of their tokens, and keep their share of each.
    Dropout masks are keyed by the rows' global numbers. Collective over ``context.replica_group``.

    Args:
        batch: whole sequences, [B, S].
        micro_batch_size: b, which divides B.
        context: this rank's place and groups.
        cp: which part of each sequence this rank holds.
        eos_id: ends a document, with which attention and positions begin anew; None: rows are one document each.

    Returns:
        B / b micro-batches of [b, S/C] on the context's device; and the loss tokens of the global batch, over all
        replicas. Without any, every weight is 0, and so are loss and gradients.
    """
    device, data = context.device, context.replica_group
    counted = batch.loss_mask.sum(dtype=torch.float64).to(device)
    loss_tokens = round(float(data.all_reduce(counted))) // context.cp_group.size
    weight = batch.loss_mask * (data.size / max(loss_tokens, 1))
    positions = torch.arange(batch.tokens.shape[1], device=device)
    micro_batches = [
        MicroBatch(
            tokens.to(device),
            labels.to(device),
            weights.to(device),
            Place(positions, samples.to(device), _documents(tokens, eos_id, device)),
        ).share_of(cp)
        for tokens, labels, weights, samples in zip(
            batch.tokens.split(micro_batch_size),
            batch.labels.split(micro_batch_size),
            weight.split(micro_batch_size),
            torch.from_numpy(batch.samples).split(micro_batch_size),
            strict=True,
        )
    ]
    return micro_batches, loss_tokens


def validation_micro_batch(
    batch: Batch, context: ParallelContext, cp: ContextParallel, *, eos_id: int | None = None
) -> MicroBatch:
    """This rank's share of a batch, each token weighed by the mask alone, without dropout."""
    device = context.device
    place = evaluation_place(batch.tokens, eos_id, device)
    return MicroBatch(batch.tokens.to(device), batch.labels.to(device), batch.loss_mask.to(device), place).share_of(cp)


def evaluation_place(tokens: Tensor, eos_id: int | None, device: torch.device) -> Place:
    """Where the tokens [B, S] of whole rows lie, without dropout."""
    return Place(torch.arange(tokens.shape[1], device=device), documents=_documents(tokens, eos_id, device))


def _documents(tokens: Tensor, eos_id: int | None, device: torch.device) -> Documents | None:
    return None if eos_id is None else Documents.from_tokens(tokens, eos_id).to(device)
