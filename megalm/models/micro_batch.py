"""What the stages of one micro-batch read.

Shapes: B rows of the micro-batch, S sequence (this rank's share under context parallelism).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

from megalm.core.place import Place


@dataclass(frozen=True)
class MicroBatch:
    """One context-parallel rank's share of the sequences of a micro-batch, on its device.

    Attributes:
        tokens: input ids, [B, S] int64.
        labels: target ids, [B, S] int64.
        loss_weight: factor of each loss, fp32: the mask times the normalisation over the global batch. [B, S] if tokens
            have losses. [B] if rows have, or groups of rows (then at the first row of each group, else 0): every
            context-parallel rank computes these, and weighs them by its share of the sequence.
        place: where the tokens lie in their sequences; None: whole sequences from their start, without dropout.
        token_types: rows of the token-type embedding, [B, S] int64; None: all of type 0.
        token_inputs: what else an objective's loss reads, with a value per token: [B, S, ...] by name.
        row_inputs: the same with a value per row: [B, ...] by name.
    """

    tokens: Tensor
    labels: Tensor
    loss_weight: Tensor
    place: Place | None = None
    token_types: Tensor | None = None
    token_inputs: Mapping[str, Tensor] = field(default_factory=dict)
    row_inputs: Mapping[str, Tensor] = field(default_factory=dict)
