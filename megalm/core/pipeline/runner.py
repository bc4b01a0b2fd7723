"""Executes a schedule on one pipeline rank.

The runner knows stages only as functions, so it serves any model: a stage maps its input to its output, the last one
maps its input to the terms of the objective.

Shapes: B micro-batch, S sequence, H hidden, K terms of the objective.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Generic, Protocol, TypeVar

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

from megalm.core.pipeline.p2p import Mailbox
from megalm.core.pipeline.schedule import SCHEDULES, Action, Kind, Shape, Tick, forward_only, plan
from megalm.core.weight_gradients import WeightGradients
from megalm.mesh.groups import ParallelContext

MicroBatch = TypeVar("MicroBatch")
MicroBatchIn = TypeVar("MicroBatchIn", contravariant=True)


class Stages(Protocol[MicroBatchIn]):
    """What the runner needs of the stages of a rank."""

    def __call__(self, stage: int, hidden: Tensor | None, micro_batch: MicroBatchIn, /) -> Tensor:
        """Run one stage.

        Args:
            stage: its number in the whole pipeline.
            hidden: output of the stage before, [B, S, H]; None on the first stage, which reads the micro-batch.
            micro_batch: this micro-batch's tokens, labels and mask.

        Returns:
            [B, S, H], or on the last stage [K], the terms whose sum is to be minimised.
        """


class Gradients(Protocol):
    """Where the gradients of a pass go, and who wants to know when a stage's are complete.

    Autograd adds to each parameter's ``grad``, whose hooks may move it elsewhere; products that a schedule postponed
    come through :meth:`add`.
    """

    def before(self, stage: int, *, last: bool) -> None:
        """Work that gives gradients of a stage begins; after the ``last`` such work no more will come in this pass."""

    def add(self, parameter: nn.Parameter, gradient: Tensor) -> None:
        """Add a contribution to a parameter's gradient."""

    def after(self, stage: int, *, last: bool) -> None:
        """The work that :meth:`before` announced is done."""


class PlainGradients:
    """Leaves gradients in the parameters' ``grad``."""

    def before(self, stage: int, *, last: bool) -> None:
        """Nothing to prepare."""

    def add(self, parameter: nn.Parameter, gradient: Tensor) -> None:
        """Add to ``grad``, as autograd does."""
        parameter.grad = gradient if parameter.grad is None else parameter.grad.add_(gradient)

    def after(self, stage: int, *, last: bool) -> None:
        """Nothing to finish."""


@dataclass(frozen=True)
class PipelineResult:
    """What one pass over the micro-batches gave on this rank.

    Attributes:
        losses: the last stage's terms [K] in micro-batch order, detached; empty on other ranks.
        busy_seconds: time spent computing.
        total_seconds: time from the first action to the last.
    """

    losses: list[Tensor]
    busy_seconds: float
    total_seconds: float

    @property
    def bubble_fraction(self) -> float:
        """Share of the pass in which this rank waited for others."""
        return max(0.0, 1.0 - self.busy_seconds / self.total_seconds) if self.total_seconds else 0.0


class PipelineRunner(Generic[MicroBatch]):
    """Runs forward and backward of all micro-batches of a step in the order that a schedule prescribes.

    Args:
        stages: this rank's stages.
        context: this rank's place and groups.
        schedule: a key of ``SCHEDULES``.
        activation_shape: [B, S, H] of what passes between stages.
        dtype: dtype of what passes between stages.
        weight_gradients: where the stages' layers leave products that the schedule postpones.
    """

    def __init__(
        self,
        stages: Stages[MicroBatch],
        context: ParallelContext,
        *,
        schedule: str,
        activation_shape: tuple[int, int, int],
        dtype: torch.dtype,
        weight_gradients: WeightGradients | None = None,
    ) -> None:
        self._stages = stages
        self._group = context.pp_group
        self._device = context.device
        self._shape = activation_shape
        self._dtype = dtype
        self._weight_gradients = weight_gradients or WeightGradients()
        topology, rank = context.topology, context.coordinates.pp
        self._last_stage = topology.num_stages - 1

        @cache
        def ticks(micro_batches: int, training: bool) -> tuple[Tick, ...]:
            shape = Shape(topology.pp, micro_batches, topology.virtual_stages)
            return plan(SCHEDULES[schedule] if training else forward_only, shape)[rank]

        self._ticks = ticks

    def train(
        self,
        micro_batches: Sequence[MicroBatch],
        gradients: Gradients | None = None,
        *,
        loss_scale: Tensor | float = 1.0,
    ) -> PipelineResult:
        """Forward and backward of every micro-batch.

        Args:
            micro_batches: what the stages read, in order.
            gradients: where gradients go; None: they accumulate in the parameters' ``grad``.
            loss_scale: factor of the objective in backward; reported losses are without it.
        """
        ticks = self._ticks(len(micro_batches), True)
        return _Pass(self, micro_batches, gradients or PlainGradients(), loss_scale).run(ticks)

    @torch.no_grad()
    def evaluate(self, micro_batches: Sequence[MicroBatch]) -> PipelineResult:
        """Forward of every micro-batch, without gradients."""
        return _Pass(self, micro_batches, PlainGradients(), 1.0).run(self._ticks(len(micro_batches), False))


class _Pass(Generic[MicroBatch]):
    """The state of one pass over the micro-batches."""

    def __init__(
        self,
        runner: PipelineRunner[MicroBatch],
        micro_batches: Sequence[MicroBatch],
        gradients: Gradients,
        loss_scale: Tensor | float,
    ) -> None:
        self._runner = runner
        self._micro_batches = micro_batches
        self._gradients = gradients
        self._loss_scale = loss_scale
        self._mailbox = Mailbox(runner._group, runner._shape, runner._dtype, runner._device)
        # (stage, micro-batch) ▶ stage input and where backward enters. The output itself is not kept: once sent, only
        # what its own backward saved stays in memory.
        self._live: dict[tuple[int, int], tuple[Tensor | None, GradientEdge]] = {}
        self._losses: dict[int, Tensor] = {}

    def run(self, ticks: tuple[Tick, ...]) -> PipelineResult:
        last_work = {tick.action.stage: tick.action for tick in ticks if tick.action}
        started, busy_seconds = time.perf_counter(), 0.0
        for tick in ticks:
            result: Tensor | None = None
            if tick.action is not None:
                received = self._receive(tick.action)
                before = time.perf_counter()
                result = self._perform(tick.action, received, last=last_work[tick.action.stage] == tick.action)
                busy_seconds += time.perf_counter() - before
                del received
            self._mailbox.exchange(result, tick.sends, tick.receives)
        self._mailbox.flush()
        losses = [self._losses[m] for m in sorted(self._losses)]
        return PipelineResult(losses, busy_seconds, time.perf_counter() - started)

    def _receive(self, action: Action) -> Tensor | None:
        """The activation or gradient that an action needs from another stage, if it needs one."""
        if action.kind is Kind.WEIGHT_GRADIENT:
            return None
        starts_here = action.stage == (0 if action.kind is Kind.FORWARD else self._runner._last_stage)
        if starts_here:
            return None
        return self._mailbox.take(
            is_gradient=action.kind.sends_gradient, stage=action.stage, micro_batch=action.micro_batch
        )

    def _perform(self, action: Action, received: Tensor | None, *, last: bool) -> Tensor | None:
        if action.kind is Kind.FORWARD:
            return self._forward(action, received)
        self._gradients.before(action.stage, last=last)
        result = None
        key = action.stage, action.micro_batch
        if action.kind is Kind.BACKWARD:
            result = self._backward(action, received)
        elif action.kind is Kind.INPUT_GRADIENT:
            with self._runner._weight_gradients.record(key):
                result = self._backward(action, received)
        else:
            with torch.no_grad():
                for parameter, gradient in self._runner._weight_gradients.compute(key):
                    self._gradients.add(parameter, gradient)
        self._gradients.after(action.stage, last=last)
        return result

    def _forward(self, action: Action, hidden: Tensor | None) -> Tensor:
        training = torch.is_grad_enabled()
        if hidden is not None and training:
            hidden.requires_grad_()
        output = self._runner._stages(action.stage, hidden, self._micro_batches[action.micro_batch])
        if action.stage == self._runner._last_stage:
            self._losses[action.micro_batch] = output.detach()
        if training:
            self._live[action.stage, action.micro_batch] = hidden, get_gradient_edge(output)
        return output.detach()

    def _backward(self, action: Action, gradient: Tensor | None) -> Tensor | None:
        hidden, edge = self._live.pop((action.stage, action.micro_batch))
        if gradient is None:
            terms = self._losses[action.micro_batch]
            gradient = torch.ones_like(terms) * self._loss_scale
        torch.autograd.backward(edge, gradient)
        return None if hidden is None else hidden.grad
