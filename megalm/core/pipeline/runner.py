"""Executes a schedule on one pipeline rank.

The runner knows stages only as functions, so it serves any model: a stage maps its input to its output, the last one
maps its input to a scalar loss.

Shapes: B micro-batch, S sequence, H hidden.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Generic, Protocol, TypeVar

import torch
from torch import Tensor

from megalm.core.groups import ParallelContext
from megalm.core.pipeline.p2p import Mailbox
from megalm.core.pipeline.schedule import SCHEDULES, Action, Kind, Tick, forward_only, plan

MicroBatch = TypeVar("MicroBatch")
MicroBatchIn = TypeVar("MicroBatchIn", contravariant=True)


class Stage(Protocol[MicroBatchIn]):
    """What the runner needs of a part of a model."""

    def __call__(self, hidden: Tensor | None, micro_batch: MicroBatchIn, /) -> Tensor:
        """Run the stage.

        Args:
            hidden: output of the stage before, [B, S, H]; None on the first stage, which reads the micro-batch.
            micro_batch: this micro-batch's tokens, labels and mask.

        Returns:
            [B, S, H], or on the last stage the scalar that is to be minimised.
        """


@dataclass(frozen=True)
class PipelineResult:
    """What one pass over the micro-batches gave on this rank.

    Attributes:
        losses: the last stage's scalars in micro-batch order, detached; empty on other ranks.
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
        stage: this rank's stage.
        context: this rank's place and groups.
        schedule: a key of ``SCHEDULES``.
        activation_shape: [B, S, H] of what passes between stages.
        dtype: dtype of what passes between stages.
    """

    def __init__(
        self,
        stage: Stage[MicroBatch],
        context: ParallelContext,
        *,
        schedule: str,
        activation_shape: tuple[int, int, int],
        dtype: torch.dtype,
    ) -> None:
        self._stage = stage
        self._group = context.pp
        self._device = context.device
        self._shape = activation_shape
        self._dtype = dtype
        degree, rank = context.topology.pp, context.coordinates.pp
        self._is_first, self._is_last = rank == 0, rank == degree - 1

        @cache
        def ticks(micro_batches: int, training: bool) -> tuple[Tick, ...]:
            return plan(SCHEDULES[schedule] if training else forward_only, degree, micro_batches)[rank]

        self._ticks = ticks

    def train(
        self, micro_batches: Sequence[MicroBatch], after_backward: Callable[[], None] | None = None
    ) -> PipelineResult:
        """Forward and backward of every micro-batch; gradients accumulate in the parameters' ``grad``.

        Args:
            micro_batches: what the stages read, in order.
            after_backward: called after each backward, for gradients that are accumulated elsewhere.
        """
        return self._run(micro_batches, self._ticks(len(micro_batches), True), after_backward)

    @torch.no_grad()
    def evaluate(self, micro_batches: Sequence[MicroBatch]) -> PipelineResult:
        """Forward of every micro-batch, without gradients."""
        return self._run(micro_batches, self._ticks(len(micro_batches), False), None)

    def _run(
        self, micro_batches: Sequence[MicroBatch], ticks: tuple[Tick, ...], after_backward: Callable[[], None] | None
    ) -> PipelineResult:
        mailbox = Mailbox(self._group, self._shape, self._dtype, self._device)
        live: dict[int, tuple[Tensor | None, Tensor]] = {}  # micro-batch ▶ (stage input, stage output)
        losses: dict[int, Tensor] = {}
        started, busy_seconds = time.perf_counter(), 0.0
        for tick in ticks:
            result: Tensor | None = None
            if tick.action is not None:
                received = self._receive(mailbox, tick.action)
                before = time.perf_counter()
                if tick.action.kind is Kind.FORWARD:
                    result = self._forward(tick.action, received, micro_batches, live, losses)
                else:
                    result = self._backward(tick.action, received, live)
                    if after_backward is not None:
                        after_backward()
                busy_seconds += time.perf_counter() - before
            mailbox.exchange(result, tick.sends, tick.receives)
        mailbox.flush()
        return PipelineResult([losses[m] for m in sorted(losses)], busy_seconds, time.perf_counter() - started)

    def _receive(self, mailbox: Mailbox, action: Action) -> Tensor | None:
        """The activation or gradient that an action needs from another rank, if it needs one."""
        starts_here = self._is_first if action.kind is Kind.FORWARD else self._is_last
        return None if starts_here else mailbox.take(action.kind, action.stage, action.micro_batch)

    def _forward(
        self,
        action: Action,
        hidden: Tensor | None,
        micro_batches: Sequence[MicroBatch],
        live: dict[int, tuple[Tensor | None, Tensor]],
        losses: dict[int, Tensor],
    ) -> Tensor:
        training = torch.is_grad_enabled()
        if hidden is not None and training:
            hidden.requires_grad_()
        output = self._stage(hidden, micro_batches[action.micro_batch])
        if self._is_last:
            losses[action.micro_batch] = output.detach()
        if training:
            live[action.micro_batch] = hidden, output
        return output.detach()

    @staticmethod
    def _backward(
        action: Action, gradient: Tensor | None, live: dict[int, tuple[Tensor | None, Tensor]]
    ) -> Tensor | None:
        hidden, output = live.pop(action.micro_batch)
        torch.autograd.backward(output, gradient)
        return None if hidden is None else hidden.grad
