"""Where masters and moments live, and how they are updated: whole on every replica, or split over replicas.

ZeRO (Rajbhandari et al. 2020) stage 0 keeps everything everywhere; stage 1 gives each data-parallel replica an equal
piece of each bucket of parameters (``layout.py``) to keep masters and moments of and to update; stage 2 the same, with
gradients kept for that piece only. DeepSpeed makes the pieces: a bucket is one of its parameter groups. Gradients
arrive here reduced, in fp32, and updated weights are gathered by ``weights.py``.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from megalm.core.pipeline.runner import Gradients
from megalm.core.sums import sum_of_squares
from megalm.engine.global_mean import gradient_factor
from megalm.engine.gradients import GradientBuckets
from megalm.engine.layout import FlatLayout
from megalm.engine.optimizer import ParameterGroup, merge_equal_groups
from megalm.engine.resume import MOMENTS
from megalm.engine.weights import GatheredWeights, Shard
from megalm.mesh.groups import ParallelContext

NORM_EPSILON = 1e-6
"""As ``torch.nn.utils.clip_grad_norm_`` adds to the norm."""


class ReducedGradients(Gradients, Protocol):
    """Where the runner's gradients go, from the beginning of a step until they are reduced."""

    def begin(self) -> None:
        """A step begins."""

    def finish(self) -> None:
        """The schedule is done: gradients are reduced when this returns."""


class ZeroOptimizer(ABC):
    """One ZeRO stage's masters, moments and update.

    Attributes:
        buckets: where the runner's gradients go.
    """

    buckets: ReducedGradients
    splits_state: bool = True
    """Whether the replicas' fragments of what is trained are different, and together the whole."""
    splits_weights: bool = False
    """The same of the weights that the model computes with."""
    _adamws: list[torch.optim.AdamW]

    @property
    def optimizer_steps(self) -> int:
        """Updates that the moments have seen; overflowed steps are not among them."""
        for adamw in self._adamws:
            for state in adamw.state.values():
                return int(state["step"])
        return 0

    @abstractmethod
    def step(self, learning_rate: float, *, loss_scale: float) -> Tensor:
        """Clip to the global norm, and update unless that is not finite.

        Args:
            learning_rate: of this step.
            loss_scale: factor that the gradients carry.

        Returns:
            Global norm of the gradients, without their factor, before clipping; NaN if it is not finite: a scalar in
            fp64, which nobody has waited for. The same on every rank.
        """

    @abstractmethod
    def fragments(self, parameter: nn.Parameter) -> Iterator[tuple[str, int, Tensor]]:
        """What this rank holds of a trained parameter: (kind, offset in the flattened local tensor, live values)."""

    def weight_fragment(self, parameter: nn.Parameter) -> tuple[int, Tensor]:
        """(offset, values in the model's dtype) of what this rank holds of a parameter that the model computes with."""
        return 0, parameter.detach().view(-1)

    @abstractmethod
    def create_moments(self, optimizer_steps: int) -> None:
        """Make AdamW's state, which torch would make at the first step, so that it can be loaded into."""

    def full_weight(self, parameter: nn.Parameter) -> Tensor:
        """The weight that the model computes with, as this tensor-parallel rank has it; collective over replicas."""
        return parameter.detach()

    @abstractmethod
    def publish_weights(self) -> None:
        """Start to make the weights that the model computes with those of the masters; collective over replicas."""

    @abstractmethod
    def before_use(self, part: nn.Module) -> None:
        """Wait for the parameters of a part of the model, which computes next."""

    @abstractmethod
    def settle_weights(self) -> None:
        """Wait until the model's parameters hold what the last update, or :meth:`publish_weights`, made of them."""


class FlatZeroOptimizer(ZeroOptimizer):
    """ZeRO-0 to 2: weights are whole on every replica, and gradients arrive in flat buckets.

    Args:
        adamws: torch's fused AdamW over the masters, one for each set of replicas.
        layouts: the flat gradient buffers, one per parameter group of ``adamws``.
        buckets: the gradients.
        context: this rank's groups.
        clip: largest global gradient norm; 0: no clipping.
    """

    buckets: GradientBuckets

    def __init__(
        self,
        adamws: Sequence[torch.optim.AdamW],
        layouts: Sequence[FlatLayout],
        buckets: GradientBuckets,
        context: ParallelContext,
        clip: float,
    ) -> None:
        self._adamws = list(adamws)
        self._layouts = list(layouts)
        self._context = context
        self._clip = clip
        self.buckets = buckets

    def step(self, learning_rate: float, *, loss_scale: float) -> Tensor:
        """See :meth:`ZeroOptimizer.step`; branch-free."""
        factor = gradient_factor(self._context.replica_group, loss_scale)
        norm = self._squared_norm().sqrt() * factor
        overflow = ~norm.isfinite()
        shrink = (self._clip / (norm + NORM_EPSILON)).clamp(max=1.0) if self._clip else torch.ones_like(norm)
        self._update(learning_rate, 1.0 / (shrink * factor), overflow)
        return torch.where(overflow, math.nan, norm)

    @abstractmethod
    def _update(self, learning_rate: float, divisor: Tensor, overflow: Tensor) -> None:
        """AdamW with gradients divided by ``divisor``; nothing where ``overflow``."""

    def _squared_norm(self) -> Tensor:
        """Over every trained parameter, each element counted once; fp64, so that no layout rounds otherwise."""
        squares = torch.zeros((), dtype=torch.float64, device=self._context.device)
        for layout, owned in zip(self._layouts, self.buckets.owned(), strict=True):
            group = layout.group
            if group.is_owned and (self.splits_state or group.replicas.index == 0):
                squares += sum_of_squares(*layout.of_words(owned))
        return self._context.world_group.all_reduce(squares)

    def _fused_step(self, learning_rate: float, divisor: Tensor, overflow: Tensor) -> None:
        """One kernel divides, skips on overflow and updates, as under ``torch.amp.GradScaler``."""
        for adamw in self._adamws:
            device = adamw.param_groups[0]["params"][0].device
            adamw.grad_scale = divisor.to(device, torch.float32)  # type: ignore[attr-defined]
            adamw.found_inf = overflow.to(device, torch.float32)  # type: ignore[attr-defined]
            for group in adamw.param_groups:
                group["lr"] = learning_rate
            adamw.step()

    def _state(self, master: Tensor) -> dict[str, Any]:
        """AdamW's of a master; empty before the first step."""
        return next((adamw.state[master] for adamw in self._adamws if master in adamw.state), {})

    def _make_state(self, optimizer_steps: int) -> None:
        for adamw in self._adamws:
            for group in adamw.param_groups:
                for master in group["params"]:
                    adamw.state[master] = adamw_state(master, optimizer_steps)

    def _moments(self, master: Tensor) -> Iterator[tuple[str, Tensor]]:
        state = self._state(master)
        for moment in MOMENTS:
            if moment in state:
                yield moment, state[moment].view(-1)


class ReplicatedAdamW(FlatZeroOptimizer):
    """ZeRO-0: every replica updates everything. fp32 weights are their own masters."""

    splits_state = False

    @classmethod
    def over(
        cls,
        buckets: Sequence[ParameterGroup],
        adamw: torch.optim.AdamW,
        make_buckets: Callable[[list[FlatLayout]], GradientBuckets],
        context: ParallelContext,
        clip: float,
    ) -> ReplicatedAdamW:
        """Over a model's own parameters."""
        layouts = [FlatLayout.replicated(bucket) for bucket in buckets]
        return cls([adamw], layouts, make_buckets(layouts), context, clip)

    def fragments(self, parameter: nn.Parameter) -> Iterator[tuple[str, int, Tensor]]:
        """The whole parameter."""
        yield "weight", 0, parameter.detach().view(-1)
        for kind, values in self._moments(parameter):
            yield kind, 0, values

    def create_moments(self, optimizer_steps: int) -> None:
        """For every parameter."""
        self._make_state(optimizer_steps)

    def publish_weights(self) -> None:
        """They are their own masters."""

    def before_use(self, part: nn.Module) -> None:
        """They are there."""

    def settle_weights(self) -> None:
        """They are there."""

    def _update(self, learning_rate: float, divisor: Tensor, overflow: Tensor) -> None:
        for layout in self._layouts:
            for p in layout.group.parameters:
                p.parameter.grad = self.buckets.view(p.parameter)
        self._fused_step(learning_rate, divisor, overflow)
        for layout in self._layouts:
            for p in layout.group.parameters:
                p.parameter.grad = None


class PartitionedAdamW(FlatZeroOptimizer):
    """ZeRO-1 and 2: each replica updates its pieces of the masters that DeepSpeed's ZeRO optimizers hold.

    Args:
        adamws: torch's fused AdamW over the masters, one for each set of replicas.
        shards: this replica's parts of the buckets.
        buckets: the gradients.
        weights: gathers what is updated.
        context, clip: as for :class:`FlatZeroOptimizer`.
    """

    def __init__(
        self,
        adamws: Sequence[torch.optim.AdamW],
        shards: Sequence[Shard],
        buckets: GradientBuckets,
        weights: GatheredWeights,
        context: ParallelContext,
        clip: float,
    ) -> None:
        super().__init__(adamws, [shard.layout for shard in shards], buckets, context, clip)
        self._shards = list(shards)
        self._weights = weights
        self._places = {parameter: (shard, start) for shard in shards for parameter, start in shard.layout.places()}

    @classmethod
    def over(
        cls,
        zeros: Sequence[tuple[Any, Sequence[ParameterGroup]]],
        parts: Sequence[tuple[nn.Module, Sequence[nn.Parameter]]],
        make_buckets: Callable[[list[FlatLayout]], GradientBuckets],
        context: ParallelContext,
        clip: float,
    ) -> PartitionedAdamW:
        """Around DeepSpeed's optimizers, with the buckets that are the parameter groups of each.

        Their own hooks are taken off: gradients are reduced by ``GradientBuckets``.

        Args:
            zeros: DeepSpeed's ``DeepSpeedZeroOptimizer``, one for each set of replicas.
            parts: as of ``Transformer.parts``.
            make_buckets: makes the gradients' buckets of these layouts.
            context: this rank's groups.
            clip: largest global gradient norm; 0: no clipping.
        """
        shards = [shard for zero, groups in zeros for shard in _take_over(zero, groups)]
        for zero, _ in zeros:
            merge_equal_groups(zero.optimizer)
        layouts = [shard.layout for shard in shards]
        adamws = [zero.optimizer for zero, _ in zeros]
        return cls(adamws, shards, make_buckets(layouts), GatheredWeights(shards, parts), context, clip)

    def fragments(self, parameter: nn.Parameter) -> Iterator[tuple[str, int, Tensor]]:
        """The part of the parameter that lies in this replica's piece of its bucket."""
        shard, first = self._places[parameter]
        low, high = shard.layout.owned_here
        start, stop = max(first, low), min(first + parameter.numel(), high)
        if start >= stop:
            return
        for kind, values in (("weight", shard.master.detach()), *self._moments(shard.master)):
            yield kind, start - first, values[start - low : stop - low]

    def create_moments(self, optimizer_steps: int) -> None:
        """For every piece."""
        self._make_state(optimizer_steps)

    def weight_fragment(self, parameter: nn.Parameter) -> tuple[int, Tensor]:
        """See :meth:`ZeroOptimizer.weight_fragment`."""
        self.settle_weights()
        return super().weight_fragment(parameter)

    def full_weight(self, parameter: nn.Parameter) -> Tensor:
        """See :meth:`ZeroOptimizer.full_weight`."""
        self.settle_weights()
        return super().full_weight(parameter)

    def publish_weights(self) -> None:
        """One all-gather per bucket, under way when this returns."""
        self._weights.publish()

    def before_use(self, part: nn.Module) -> None:
        """See :meth:`ZeroOptimizer.before_use`."""
        self._weights.before_use(part)

    def settle_weights(self) -> None:
        """See :meth:`ZeroOptimizer.settle_weights`."""
        self._weights.settle()

    def _update(self, learning_rate: float, divisor: Tensor, overflow: Tensor) -> None:
        for shard, gradient in zip(self._shards, self.buckets.owned(), strict=True):
            shard.master.grad = gradient.to(shard.master.device)  # host memory where the optimizer is offloaded
        self._fused_step(learning_rate, divisor, overflow)
        for shard in self._shards:
            shard.master.grad = None
        self.publish_weights()


def _take_over(zero: Any, groups: Sequence[ParameterGroup]) -> Iterator[Shard]:
    """What a DeepSpeed optimizer has made of each of its parameter groups; it reduces and gathers nothing itself."""
    for hook in zero._grad_acc_hooks:
        hook.remove()
    zero._grad_acc_hooks = []
    # A view for each replica and group, which only its own step would need.
    zero.parallel_partitioned_bit16_groups = []
    flat_groups = zip(
        groups,
        zero.bit16_groups_flat,
        zero.single_partition_of_fp32_groups,
        zero.round_robin_bit16_groups,
        strict=True,
    )
    for group, flat, master, members in flat_groups:
        layout = FlatLayout(group, flat.numel(), master.numel())
        ours = [parameter for parameter, _ in layout.places()]
        assert all(a is b for a, b in zip(ours, members, strict=True)), "DeepSpeed keeps the order"
        assert layout.partition is not None and layout.partition * group.replicas.size == layout.numel, "equal pieces"
        yield Shard(layout, flat, master)


def adamw_state(values: Tensor, steps: int) -> dict[str, Tensor]:
    """Moments of zero that have seen ``steps`` updates, as torch's AdamW keeps them."""
    moments = {moment: torch.zeros_like(values, dtype=torch.float32) for moment in MOMENTS}
    return {"step": torch.tensor(float(steps), dtype=torch.float32, device=values.device), **moments}
