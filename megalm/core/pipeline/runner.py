"""Executes a schedule on one pipeline rank.

The runner knows stages only as functions, so it serves any model: a stage maps a few named tensors to as many for the
next stage, the last one to the terms of the objective.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from copy import copy
from dataclasses import dataclass
from functools import cache
from typing import Generic, Protocol, TypeVar

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

from megalm.core.pipeline.clock import Clock, HostClock, PassTimer, make_clock
from megalm.core.pipeline.order import Exchange, issues
from megalm.core.pipeline.p2p import Mailbox, Tensors, TensorSpec, posts_receives_early
from megalm.core.pipeline.schedule import SCHEDULES, Action, Kind, Shape, Tick, forward_only, plan
from megalm.core.weight_gradients import WeightGradients
from megalm.mesh.groups import ParallelContext

MicroBatch = TypeVar("MicroBatch")
MicroBatchIn = TypeVar("MicroBatchIn", contravariant=True)


class Stages(Protocol[MicroBatchIn]):
    """What the runner needs of the stages of a rank."""

    def __call__(self, stage: int, received: Tensors | None, micro_batch: MicroBatchIn, /) -> Tensors:
        """Run one stage.

        Args:
            stage: its number in the whole pipeline.
            received: what the stage before returned, by name; None on the first stage, which reads the micro-batch.
            micro_batch: this micro-batch's tokens, labels and mask.

        Returns:
            The tensors that travel between stages, by name; on the last stage scalars, the terms whose sum is to be
            minimised (those without a gradient are only reported).
        """


class Gradients(Protocol):
    """Receives the gradients of a pass, and is told when those of a stage are complete.

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
        terms: what the last stage returned, in micro-batch order, detached; empty on other ranks.
        timer: timing of the pass.
    """

    terms: list[Tensors]
    timer: PassTimer

    @property
    def bubble_fraction(self) -> float:
        """Fraction of the pass that this rank spent waiting.

        Cheap, and never waits: on CUDA it is that of a pass before where the device has not finished this one; see
        ``clock.py``.
        """
        return self.timer.timing().bubble_fraction


class TickObserver(Protocol):
    """Is told when a tick begins and ends: to count what happens in it."""

    def before(self, tick: Tick) -> None:
        """A tick begins."""

    def after(self, tick: Tick) -> None:
        """Its work is issued, and its transfers are."""


class PipelineRunner(Generic[MicroBatch]):
    """Runs forward and backward of all micro-batches of a step in the order that a schedule prescribes.

    Args:
        stages: this rank's stages.
        context: this rank's place and groups.
        schedule: a key of ``SCHEDULES``.
        between_stages: what travels between stages, by name.
        early_receives: ``parallel.early_receives``.
        weight_gradients: where the stages' layers leave products that the schedule postpones.
        clock: times passes; None: that of the context's device.
    """

    def __init__(
        self,
        stages: Stages[MicroBatch],
        context: ParallelContext,
        *,
        schedule: str,
        between_stages: Mapping[str, TensorSpec],
        early_receives: bool | None = None,
        weight_gradients: WeightGradients | None = None,
        clock: Clock | None = None,
    ) -> None:
        self.stages = stages
        self._context = context
        self.early = posts_receives_early(context, early_receives)
        self.between_stages = between_stages
        self._weight_gradients = weight_gradients or WeightGradients()
        self._clock = clock or make_clock(context.device)
        topology, rank = context.topology, context.coordinates.pp
        self._last_stage = topology.num_stages - 1

        @cache
        def ticks(micro_batches: int, training: bool) -> tuple[Tick, ...]:
            shape = Shape(topology.pp, micro_batches, topology.virtual_stages)
            return plan(SCHEDULES[schedule] if training else forward_only, shape)[rank]

        self._ticks: Callable[[int, bool], tuple[Tick, ...]] = ticks

    def train(
        self,
        micro_batches: Sequence[MicroBatch],
        gradients: Gradients | None = None,
        *,
        loss_scale: Tensor | float = 1.0,
        observer: TickObserver | None = None,
    ) -> PipelineResult:
        """Forward and backward of every micro-batch.

        Args:
            micro_batches: what the stages read, in order.
            gradients: where gradients go; None: they accumulate in the parameters' ``grad``.
            loss_scale: factor of the objective in backward; reported losses are without it.
            observer: is told of every tick.
        """
        ticks, gradients = self.ticks(len(micro_batches)), gradients or PlainGradients()
        return _Pass(self, micro_batches, gradients, loss_scale, self._clock.start(), observer).run(ticks)

    @torch.no_grad()
    def evaluate(self, micro_batches: Sequence[MicroBatch]) -> PipelineResult:
        """Forward of every micro-batch, without gradients."""
        # Nobody asks how long it waits; and a clock of events, asked too early, tells of the training step before.
        unread = HostClock().start()
        return _Pass(self, micro_batches, PlainGradients(), 1.0, unread).run(self._ticks(len(micro_batches), False))

    def with_parts(self, *, ticks: tuple[Tick, ...], stages: Stages[MicroBatch]) -> PipelineRunner[MicroBatch]:
        """The same runner with another plan for training, and other stages: to look at a part of its work."""
        other = copy(self)
        other.stages = stages
        other._ticks = lambda micro_batches, training: ticks if training else self._ticks(micro_batches, training)
        return other

    def ticks(self, micro_batches: int) -> tuple[Tick, ...]:
        """What this rank does in a training pass, tick by tick."""
        return self._ticks(micro_batches, True)


class _Pass(Generic[MicroBatch]):
    """The state of one pass over the micro-batches."""

    def __init__(
        self,
        runner: PipelineRunner[MicroBatch],
        micro_batches: Sequence[MicroBatch],
        gradients: Gradients,
        loss_scale: Tensor | float,
        timer: PassTimer,
        observer: TickObserver | None = None,
    ) -> None:
        self._timer = timer
        self._observer = observer
        self._runner = runner
        self._micro_batches = micro_batches
        self._gradients = gradients
        self._loss_scale = loss_scale
        self._mailbox = Mailbox(runner._context, runner.between_stages)
        # (stage, micro-batch) ▶ stage inputs and where backward enters. The outputs themselves are not kept: once sent,
        # only what their own backward saved stays in memory.
        self._live: dict[tuple[int, int], tuple[Tensors | None, dict[str, GradientEdge]]] = {}
        self._terms: dict[int, Tensors] = {}
        self._last_work: dict[int, Action] = {}

    def run(self, ticks: tuple[Tick, ...]) -> PipelineResult:
        self._last_work = {tick.action.stage: tick.action for tick in ticks if tick.action}
        for tick in ticks:
            if self._observer is not None:
                self._observer.before(tick)
            self._tick(tick)
            if self._observer is not None:
                self._observer.after(tick)
        self._mailbox.flush()
        self._timer.pass_ends()
        return PipelineResult([self._terms[m] for m in sorted(self._terms)], self._timer)

    def _tick(self, tick: Tick) -> None:
        result: Tensors | None = None
        for issue in issues(tick, early=self._runner.early):
            if isinstance(issue, Exchange):
                self._mailbox.exchange(issue, result)
            else:
                result = self._work(issue)

    def _work(self, action: Action) -> Tensors | None:
        received = self._receive(action)
        self._timer.work_begins()
        result = self._perform(action, received, last=self._last_work[action.stage] == action)
        self._timer.work_ends()
        return result

    def _receive(self, action: Action) -> Tensors | None:
        """The activations or gradients that an action needs from another stage, if it needs any."""
        if action.kind is Kind.WEIGHT_GRADIENT:
            return None
        starts_here = action.stage == (0 if action.kind is Kind.FORWARD else self._runner._last_stage)
        if starts_here:
            return None
        return self._mailbox.take(
            is_gradient=action.kind.sends_gradient, stage=action.stage, micro_batch=action.micro_batch
        )

    def _perform(self, action: Action, received: Tensors | None, *, last: bool) -> Tensors | None:
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

    def _forward(self, action: Action, received: Tensors | None) -> Tensors:
        training = torch.is_grad_enabled()
        if received is not None and training:
            for tensor in received.values():
                tensor.requires_grad_()
        outputs = self._runner.stages(action.stage, received, self._micro_batches[action.micro_batch])
        detached = {name: output.detach() for name, output in outputs.items()}
        if action.stage == self._runner._last_stage:
            self._terms[action.micro_batch] = detached
        if training:
            edges = {name: get_gradient_edge(output) for name, output in outputs.items() if output.requires_grad}
            self._live[action.stage, action.micro_batch] = received, edges
        return detached

    def _backward(self, action: Action, gradients: Tensors | None) -> Tensors | None:
        received, edges = self._live.pop((action.stage, action.micro_batch))
        if gradients is None:
            terms = self._terms[action.micro_batch]
            gradients = {name: torch.ones_like(terms[name]) * self._loss_scale for name in edges}
        torch.autograd.backward(list(edges.values()), [gradients[name] for name in edges])
        if received is None:
            return None
        result = {
            name: torch.zeros_like(tensor) if tensor.grad is None else tensor.grad for name, tensor in received.items()
        }
        for tensor in received.values():
            tensor.grad = None  # postponed weight gradients may keep the tensor: not what is sent back of it, too
        return result
