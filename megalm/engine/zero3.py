"""ZeRO-3 (Rajbhandari et al. 2020): the weights themselves are split over replicas, and gathered where they are used.

DeepSpeed gathers a module's weights before its forward and its backward, reduces and splits its gradients, clips them
and updates; megalm adds where a weight's fragments lie, and the norm: DeepSpeed's is a sum in fp32. It runs without
pipeline and tensor parallelism: a pipeline would gather the weights anew for every micro-batch, and DeepSpeed's hooks
know nothing of the shares that tensor-parallel ranks hold of a layer.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megalm.core.pipeline.p2p import Tensors
from megalm.core.pipeline.runner import PlainGradients
from megalm.core.sums import sum_of_squares
from megalm.engine.resume import MOMENTS
from megalm.engine.zero import ReducedGradients, ZeroOptimizer, adamw_state
from megalm.mesh.groups import ParallelContext
from megalm.models.micro_batch import MicroBatch
from megalm.models.transformer import Transformer


class Root(nn.Module):
    """A model as DeepSpeed wants it: one module that is called, for its hooks to run at the ends of a micro-batch."""

    def __init__(self, model: Transformer) -> None:
        super().__init__()
        self.model = model

    def forward(self, stage: int, received: Tensors | None, micro_batch: MicroBatch) -> Tensors:
        """As :meth:`Transformer.run`."""
        return self.model.run(stage, received, micro_batch)


class HookedGradients(PlainGradients, ReducedGradients):
    """DeepSpeed's hooks take each gradient away, reduce it and keep this replica's part."""

    def begin(self) -> None:
        """DeepSpeed starts anew after each of its steps."""

    def finish(self) -> None:
        """Reduced already."""


class Zero3AdamW(ZeroOptimizer):
    """ZeRO-3: DeepSpeed's ``DeepSpeedZeroOptimizer_Stage3`` does everything but describe itself.

    Args:
        zero: DeepSpeed's optimizer.
        context: this rank's groups.
    """

    splits_weights = True

    def __init__(self, zero: Any, context: ParallelContext) -> None:
        self.buckets = HookedGradients()
        self._zero = zero
        self._adamw = zero.optimizer
        self._adamws = [self._adamw]
        self._data = context.replica_group
        self._replica = context.replica_group.index
        self._device = context.device
        zero._get_norm_groups = self._norms
        self._places: dict[nn.Parameter, tuple[Tensor, int]] = {}
        for members, master in zip(zero.fp16_groups, zero.fp32_partitioned_groups_flat, strict=True):
            offset = 0
            for parameter in members:
                self._places[parameter] = master, offset
                offset += parameter.ds_tensor.numel()
        assert zero.gradient_accumulation_dtype == torch.float32, "micro-batches add up in fp32"

    def step(self, learning_rate: float, *, loss_scale: float) -> Tensor:
        """Clip and update; see :meth:`ZeroOptimizer.step`."""
        assert loss_scale == 1.0, "fp16 is refused with ZeRO-3"
        for group in self._adamw.param_groups:
            group["lr"] = learning_rate
        self._zero.step()
        norm = torch.as_tensor(self._zero._global_grad_norm, dtype=torch.float64, device=self._device)
        return torch.where((norm >= 0.0) & norm.isfinite(), norm, math.nan)

    def _norms(self) -> list[Tensor]:
        """The global norm, in place of DeepSpeed's norms of its groups, which it combines and clips by."""
        parts = [sum_of_squares(part) for group in self._zero.averaged_gradients.values() for part in group]
        return [self._data.all_reduce(torch.stack(parts).sum()).sqrt()]

    @torch.no_grad()
    def publish_weights(self) -> None:
        """Each replica keeps its part of the weights in the model's dtype; they are gathered where they are used."""
        for parameter, (master, offset) in self._places.items():
            part: Tensor = parameter.ds_tensor  # type: ignore[attr-defined]
            part.view(-1).copy_(master[offset : offset + part.numel()])

    def before_use(self, part: nn.Module) -> None:
        """DeepSpeed's own hooks gather what a part needs."""

    def settle_weights(self) -> None:
        """Each replica's part is there when an update returns."""

    def full_weight(self, parameter: nn.Parameter) -> Tensor:
        """All replicas' parts together; collective."""
        part: Tensor = parameter.ds_tensor  # type: ignore[attr-defined]
        group = self._zero.dp_process_group
        parts = [torch.empty_like(part) for _ in range(dist.get_world_size(group))]
        dist.all_gather(parts, part, group=group)
        shape: torch.Size = parameter.ds_shape  # type: ignore[attr-defined]
        return torch.cat(parts)[: shape.numel()].view(shape)

    def fragments(self, parameter: nn.Parameter) -> Iterator[tuple[str, int, Tensor]]:
        """This replica's part of the parameter."""
        start, stop = self._range(parameter)
        if start >= stop:
            return
        master, offset = self._places[parameter]
        state = self._adamw.state[master]
        kinds = {"weight": master.detach(), **{moment: state[moment].view(-1) for moment in MOMENTS if moment in state}}
        for kind, values in kinds.items():
            yield kind, start, values[offset : offset + stop - start]

    def weight_fragment(self, parameter: nn.Parameter) -> tuple[int, Tensor]:
        """This replica's part of a parameter as the model computes with it."""
        start, stop = self._range(parameter)
        part: Tensor = parameter.ds_tensor  # type: ignore[attr-defined]
        return start, part.view(-1)[: stop - start]

    def create_moments(self, optimizer_steps: int) -> None:
        """For every part."""
        for master, _ in self._places.values():
            self._adamw.state[master] = adamw_state(master, optimizer_steps)

    def _range(self, parameter: nn.Parameter) -> tuple[int, int]:
        """Elements of the flattened parameter that this replica keeps; the last parts are padded."""
        size, numel = parameter.ds_tensor.numel(), parameter.ds_numel  # type: ignore[attr-defined]
        return min(self._replica * size, numel), min((self._replica + 1) * size, numel)
