"""What a model needs of the objective that it is trained for. The objectives themselves are in ``megalm.objectives``.

Shapes: B batch, S sequence, H hidden, T tensor-parallel degree.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from torch import Tensor, nn

from megalm.config.schema import Model
from megalm.core.tensor_parallel import TensorParallel
from megalm.models.micro_batch import MicroBatch
from megalm.models.output import Output


class Learning(Protocol):
    """The part of :class:`megalm.objectives.base.Objective` that runs inside a model; see there."""

    @property
    def unit(self) -> str:
        """What the loss is a mean over."""

    @property
    def terms(self) -> tuple[str, ...]:
        """Names of what :meth:`loss` gives."""

    @property
    def measures(self) -> tuple[str, ...]:
        """Names of what :meth:`measure` gives."""

    @property
    def carried(self) -> tuple[str, ...]:
        """Names of what :meth:`from_block` gives."""

    def make_heads(self, model: Model, *, tensor_parallel: TensorParallel) -> Mapping[str, nn.Module]:
        """Layers of the last stage besides the model's own, by name."""

    def from_block(
        self, layer: int, x: Tensor, micro_batch: MicroBatch, *, tensor_parallel: TensorParallel
    ) -> Mapping[str, Tensor]:
        """Scalars of a block's output, [B, S, H] or [B, S/T, H]; added over blocks."""

    def loss(self, output: Output, micro_batch: MicroBatch) -> Mapping[str, Tensor]:
        """Scalars whose sum is minimised."""

    def measure(self, output: Output, micro_batch: MicroBatch) -> Mapping[str, Tensor]:
        """fp64 scalars that validation adds up."""
