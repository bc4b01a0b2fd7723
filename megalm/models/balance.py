"""What embedding and head cost beside a block, for a balanced split of layers into pipeline stages. No torch.

The time of a part is estimated as its matrix work plus its memory traffic, both per token, forward and backward, put on
one scale by the machine balance of the accelerators that pipelines run on (Williams et al. 2009, "Roofline").

Shape legend: H hidden, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

from megalm.config.schema import Config, Model
from megalm.core.pipeline.partition import partition_layers
from megalm.models.counts import head_flops_per_token, layer_flops_per_token

_FLOPS_PER_BYTE = 200.0
"""bf16 peak over memory bandwidth: 156 on an A100 80 GB, 295 on an H100 SXM (``hardware.yaml`` has the peaks). A test
shows that the split of GPT-3 175B's layers is the same over this range."""

_BLOCK_BYTES_PER_HIDDEN = 34 * 3
"""A block keeps 34 bytes of activations per token and hidden element (Korthikanti et al. 2022, equation 1, without the
attention matrix); each is written, read in forward and read in backward."""

_EMBEDDING_BYTES_PER_HIDDEN = 12
"""Row read, activation written, and in backward a gradient read and added to a row, in 2 and 4 bytes."""

_HEAD_BYTES_PER_WORD = 16
"""Logits written, read and exponentiated in fp32, and their gradient written and read by two products."""


@dataclass(frozen=True)
class EdgeCosts:
    """Cost of what the first and the last stage do besides their blocks, in blocks."""

    embedding: float
    head: float


def edge_costs(model: Model, vocab_size: int) -> EdgeCosts:
    """Embedding and head in units of one block."""
    hidden = model.hidden_size
    block = layer_flops_per_token(model) / _FLOPS_PER_BYTE + _BLOCK_BYTES_PER_HIDDEN * hidden
    head = head_flops_per_token(model, vocab_size) / _FLOPS_PER_BYTE + _HEAD_BYTES_PER_WORD * vocab_size
    return EdgeCosts(_EMBEDDING_BYTES_PER_HIDDEN * hidden / block, head / block)


def split_layers(config: Config, vocab_size: int) -> list[range]:
    """The layers of each stage: as the config gives them, or balanced."""
    costs = edge_costs(config.model, vocab_size)
    return partition_layers(
        config.model.num_layers,
        config.parallel.pp * config.parallel.virtual_stages,
        embedding_cost=costs.embedding,
        head_cost=costs.head,
        sizes=config.parallel.stage_layers,
    )
