"""A replica's batch ▶ the micro-batches of one rank: one copy to the device, of which micro-batches are views.

Shapes: B rows of this replica, b of a micro-batch, S sequence length, C context-parallel degree.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from megalm.core.attention.context_parallel import ContextParallel
from megalm.core.device_kind import device_kind
from megalm.core.documents import Documents, document_lengths
from megalm.core.host import to_device
from megalm.core.place import Place
from megalm.data.stream.batch import Batch
from megalm.engine.global_mean import count_units, unit_weight
from megalm.engine.packed_batch import PackedBatch, layout_of, pack
from megalm.mesh.groups import ParallelContext
from megalm.models.micro_batch import MicroBatch


def training_micro_batches(
    batch: Batch | PackedBatch, micro_batch_size: int, context: ParallelContext, cp: ContextParallel
) -> tuple[list[MicroBatch], Tensor]:
    """Split a batch, and weigh each loss so that the mean over replicas is the mean of the global batch.

    All context-parallel ranks of a replica have the same rows and keep their share of each. Dropout masks depend on the
    rows' global numbers. Collective over ``context.replica_group``; the host waits for nothing.

    Args:
        batch: whole sequences, [B, S], of the host or on the context's device.
        micro_batch_size: b, which divides B.
        context: this rank's place and groups.
        cp: which part of each sequence this rank holds.

    Returns:
        B / b micro-batches of [b, S/C] on the context's device; and what carries loss in the global batch, over all
        replicas, a scalar of the device. If nothing does, every weight is 0, and so are loss and gradients.
    """
    packed = on_device(batch, context.device) if isinstance(batch, Batch) else batch
    units = count_units(packed.units, context)
    weight = unit_weight(units, context.replica_group)
    return _split(packed, micro_batch_size, cp, weight, dropout=True), units


def evaluation_micro_batch(batch: Batch | PackedBatch, device: torch.device, cp: ContextParallel) -> MicroBatch:
    """This rank's share of a whole batch, each loss weighed by the mask alone, without dropout."""
    packed = on_device(batch, device) if isinstance(batch, Batch) else batch
    (whole,) = _split(packed, packed.rows, cp, None, dropout=False)
    return whole


def on_device(batch: Batch, device: torch.device) -> PackedBatch:
    """A batch of the host on a device, by one copy that the host does not wait for."""
    layout = layout_of(batch)
    return layout.views(to_device(pack(batch, device, layout), device), len(batch.tokens))


def _split(
    packed: PackedBatch, rows: int, cp: ContextParallel, weight: Tensor | None, *, dropout: bool
) -> list[MicroBatch]:
    """Micro-batches of ``rows`` rows each; ``weight`` is that of a unit's loss, None: 1."""
    whole, size = packed.arrays, cp.group.size
    tokens = whole["tokens"]
    positions = cp.positions(tokens.shape[1], tokens.device)

    def share(values: Tensor) -> Tensor:
        return values if size == 1 else values[:, positions]  # [B, S, ...] ▶ [B, S/C, ...]

    # All context-parallel ranks compute the loss of a whole row, so each counts it as one of C shares.
    loss_weight = share(whole["loss_mask"]) if whole["loss_mask"].ndim > 1 else whole["loss_mask"] / size
    if weight is not None:
        loss_weight = loss_weight * weight.to(loss_weight.dtype)
    shares = {"tokens": share(tokens), "labels": share(whole["labels"]), "loss_weight": loss_weight}
    samples = whole["samples"] if dropout else None
    token_inputs = {name: share(values) for name, values in packed.group("token_inputs").items()}
    row_inputs = packed.group("row_inputs")
    documents = _documents(packed, share) if "document_numbers" in whole else None

    def micro_batch(part: slice) -> MicroBatch:
        return MicroBatch(
            **{name: values[part] for name, values in shares.items()},
            place=Place(
                positions,
                None if samples is None else samples[part],
                None if documents is None else documents.take(part),
            ),
            token_inputs={name: values[part] for name, values in token_inputs.items()},
            row_inputs={name: values[part] for name, values in row_inputs.items()},
        )

    return [micro_batch(slice(start, start + rows)) for start in range(0, len(tokens), rows)]


def _documents(packed: PackedBatch, share: Callable[[Tensor], Tensor]) -> Documents:
    """The documents of all rows. Their lengths are looked at where kernels ask for them, which is on the CPU alone."""
    numbers = packed.arrays["document_numbers"]
    lengths = document_lengths(numbers.numpy()) if device_kind(numbers) == "cpu" else ()
    return Documents(numbers, share(packed.arrays["within_documents"]), lengths)
