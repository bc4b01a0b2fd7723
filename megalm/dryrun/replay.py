"""A step of any number of micro-batches from the trace of three.

A micro-batch's forward on a stage does what another's does, and so does its backward, but for the first one (which
begins the sums of gradients) and the last one (which sends them off). So the runner is given a plan in which only the
first, the second and the last micro-batch are left; each piece of its work is recorded; and the whole plan is replayed
with the records. Of each piece of work is known

* what it computes and sends: added up as often as the plan has it;
* by how much memory grows from its beginning to its end, and at its highest: added to what is alive when its turn
  comes, so that the peak is that of the whole plan.

What travels between stages is counted apart, from the plan: a buffer is there from when its receive is posted until the
work that takes it, and a sent tensor until the rank's next transfer.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import Enum

import torch
from torch import Tensor, nn

from megalm.core.pipeline.order import Exchange, issues
from megalm.core.pipeline.p2p import Tensors, TensorSpec
from megalm.core.pipeline.runner import Gradients, PipelineResult, PipelineRunner, Stages
from megalm.core.pipeline.schedule import Action, Kind, Tick, Transfer
from megalm.dryrun.communication import TRANSFER_KINDS, Message
from megalm.dryrun.ledger import ACTIVATIONS, TRANSFERS, Ledger, Usage
from megalm.dryrun.report import Moment
from megalm.dryrun.tracer import Record, Tracer
from megalm.mesh.groups import ParallelContext
from megalm.models.micro_batch import MicroBatch

_FEW = 3
"""Micro-batches that are executed of any number."""


class Turn(Enum):
    """Micro-batches whose work is alike."""

    FIRST = "first"
    STEADY = "steady"
    LAST = "last"

    @classmethod
    def of(cls, micro_batch: int, count: int) -> Turn:
        """Of one of ``count`` micro-batches."""
        if micro_batch == 0:
            return cls.FIRST
        return cls.LAST if micro_batch == count - 1 else cls.STEADY


WorkKey = tuple[Kind, int, Turn]
"""(kind of action, stage, turn): work that does the same."""


@dataclass(frozen=True)
class Effect:
    """What one piece of work does.

    Attributes:
        record: what it computes and sends.
        growth: bytes by kind at its end, less those at its beginning.
        peak: bytes by kind at its highest total, less those at its beginning.
    """

    record: Record
    growth: Usage
    peak: Usage


@dataclass
class Trace:
    """What the runner did in a pass.

    Attributes:
        ticks: of the whole plan.
        count: micro-batches of the whole plan.
        between_stages: what travels in a transfer.
        before: memory when the pass began.
        traced: ticks that were executed.
        effects: of each piece of work that was executed.
        between: what happened between pieces of work, transfers left out.
        transfers: (whether this rank sends, rank at the other end) ▶ messages of one transfer.
    """

    ticks: tuple[Tick, ...]
    count: int
    between_stages: Mapping[str, TensorSpec]
    before: Usage
    traced: int
    effects: dict[WorkKey, Effect] = field(default_factory=dict)
    between: Record = field(default_factory=Record)
    transfers: dict[tuple[bool, int], tuple[Message, ...]] = field(default_factory=dict)

    def key(self, action: Action) -> WorkKey:
        """What an action of the plan is alike to."""
        return action.kind, action.stage, Turn.of(action.micro_batch, self.count)


class TracedRunner:
    """Stands in the place of an engine's runner: executes a part of its plan, and records it.

    Args:
        runner: the engine's.
        tracer: that sees the operations; it has a ledger.
        whole: execute every micro-batch, which shows that three are enough.

    Attributes:
        trace: of the last training pass. The ledger's peak is that of what came after it.
    """

    def __init__(self, runner: PipelineRunner[MicroBatch], tracer: Tracer, *, whole: bool = False) -> None:
        self._runner = runner
        self._tracer = tracer
        self._whole = whole
        self.trace: Trace | None = None

    def train(
        self, micro_batches: Sequence[MicroBatch], gradients: Gradients, *, loss_scale: Tensor | float = 1.0
    ) -> PipelineResult:
        """As :meth:`PipelineRunner.train`, of three micro-batches."""
        ledger = self._tracer.ledger
        assert ledger is not None
        count = len(micro_batches)
        chosen = set(range(count)) if self._whole or count <= _FEW else {0, 1, count - 1}
        ticks = self._runner.ticks(count)
        kept = tuple(_only(chosen, ticks))
        self.trace = trace = Trace(ticks, count, self._runner.between_stages, ledger.usage, len(kept))
        with self._tracer.recording() as trace.between:
            windows = _Windows(self._tracer, ledger, trace, gradients)
            runner = self._runner.with_parts(ticks=kept, stages=windows.around(self._runner.stages))
            ticks_seen = _Ticks(windows, trace, tensors=len(trace.between_stages))
            result = runner.train(micro_batches, windows, loss_scale=loss_scale, observer=ticks_seen)
        result = replace(result, terms=self._completed(result.terms, count))
        ledger.restart_peak()
        return result

    def _completed(self, terms: list[Tensors], count: int) -> list[Tensors]:
        """The terms of every micro-batch: of those that were left out as large as the others'."""
        if not terms:
            return terms
        with self._tracer.recording():  # and forgotten
            more = [
                {name: torch.empty_like(value) for name, value in terms[0].items()} for _ in range(count - len(terms))
            ]
        return [*terms, *more]


def _only(chosen: set[int], ticks: Sequence[Tick]) -> Iterator[Tick]:
    """What of a plan belongs to some micro-batches; ticks of which nothing is left are left out."""

    def of_chosen(transfers: tuple[Transfer, ...]) -> tuple[Transfer, ...]:
        return tuple(transfer for transfer in transfers if transfer.micro_batch in chosen)

    for tick in ticks:
        action = tick.action if tick.action is not None and tick.action.micro_batch in chosen else None
        left = Tick(action, of_chosen(tick.sends), of_chosen(tick.receives))
        if left.action is not None or left.sends or left.receives:
            yield left


class _Windows:
    """Records each piece of work apart: between call and return of a stage, and between ``before`` and ``after``.

    Args:
        tracer, ledger: see :class:`TracedRunner`.
        trace: is filled.
        gradients: where the gradients go.
    """

    def __init__(self, tracer: Tracer, ledger: Ledger, trace: Trace, gradients: Gradients) -> None:
        self.tick: Tick | None = None
        self._tracer, self._ledger, self._trace = tracer, ledger, trace
        self._gradients = gradients
        self._opened: tuple[Record, Usage] | None = None

    def around(self, stages: Stages[MicroBatch]) -> Stages[MicroBatch]:
        """The stages, each call of which is a piece of work."""

        def call(stage: int, received: Tensors | None, micro_batch: MicroBatch, /) -> Tensors:
            # What was received is kept for backward from here on.
            self._ledger.note_all((received or {}).values(), ACTIVATIONS)
            self._open()
            result = stages(stage, received, micro_batch)
            self._close()
            return result

        return call

    def before(self, stage: int, *, last: bool) -> None:
        """See :class:`megalm.core.pipeline.runner.Gradients`."""
        self._open()
        self._gradients.before(stage, last=last)

    def add(self, parameter: nn.Parameter, gradient: Tensor) -> None:
        """See :class:`megalm.core.pipeline.runner.Gradients`."""
        self._gradients.add(parameter, gradient)

    def after(self, stage: int, *, last: bool) -> None:
        """See :class:`megalm.core.pipeline.runner.Gradients`."""
        self._gradients.after(stage, last=last)
        self._close()

    def _open(self) -> None:
        self._opened = self._tracer.record, self._ledger.usage
        self._tracer.record = Record()
        self._ledger.restart_peak()

    def _close(self) -> None:
        assert self._opened is not None and self.tick is not None and self.tick.action is not None
        between, before = self._opened
        record, self._tracer.record, self._opened = self._tracer.record, between, None
        growth, peak = self._ledger.usage.minus(before), self._ledger.peak.minus(before)
        self._trace.effects[self._trace.key(self.tick.action)] = Effect(record, growth, peak)


class _Ticks:
    """Tells :class:`_Windows` which tick it is, and learns of what messages a transfer consists.

    Args:
        windows: is told.
        trace: is filled.
        tensors: how many travel in one transfer.
    """

    def __init__(self, windows: _Windows, trace: Trace, tensors: int) -> None:
        self._windows, self._trace, self._tensors = windows, trace, tensors

    def before(self, tick: Tick) -> None:
        """See :class:`megalm.core.pipeline.runner.TickObserver`."""
        self._windows.tick = tick

    def after(self, tick: Tick) -> None:  # noqa: ARG002 - the runner's signature
        """See :class:`megalm.core.pipeline.runner.TickObserver`."""
        found: dict[tuple[bool, int], list[Message]] = {}
        messages = self._trace.between.messages
        for message in messages:
            if message.kind in TRANSFER_KINDS:
                assert message.peer is not None
                found.setdefault((message.kind == "send", message.peer), []).append(message)
        messages[:] = [message for message in messages if message.kind not in TRANSFER_KINDS]
        for key, of_peer in found.items():
            self._trace.transfers.setdefault(key, tuple(of_peer[: self._tensors]))


@dataclass
class Replayed:
    """A whole pass, from a trace.

    Attributes:
        record: work, reads and overlaps; its messages are in ``messages``.
        messages: how often each was issued.
        moments: memory, tick by tick.
    """

    record: Record
    messages: Counter[Message]
    moments: list[Moment]

    @property
    def peak(self) -> Usage:
        """Memory at the highest total of the pass."""
        return max(
            (Usage(dict(moment.peak)) for moment in self.moments), key=lambda usage: usage.total, default=Usage()
        )


def replay(trace: Trace, context: ParallelContext, *, early: bool) -> Replayed:
    """The whole pass of which a part was traced.

    Args:
        trace: of the part.
        context: of the rank.
        early: whether receives are posted before the work of their tick, see ``core.pipeline.order``.
    """
    memory = _Memory(trace, context)
    times = Counter(trace.key(tick.action) for tick in trace.ticks if tick.action is not None)
    record, messages = Record(), Counter(trace.between.messages)
    record.add_times(trace.between, 1)
    for key, count in times.items():
        effect = trace.effects[key]
        record.add_times(effect.record, count)
        for message in effect.record.messages:
            messages[message] += count
    moments = [memory.through(number, tick, early=early) for number, tick in enumerate(trace.ticks)]
    return Replayed(record, messages + memory.messages, moments)


class _Memory:
    """What is alive, from one issue of a plan to the next.

    Attributes:
        messages: of the transfers so far.
    """

    def __init__(self, trace: Trace, context: ParallelContext) -> None:
        self.messages: Counter[Message] = Counter()
        self._trace = trace
        self._ranks, self._rank = context.pp_group.ranks, context.pp_group.index
        self._last_stage = context.topology.num_stages - 1
        self._live = trace.before
        self._leaving = 0

    def through(self, number: int, tick: Tick, *, early: bool) -> Moment:
        """Go through one tick."""
        peak = self._live
        for issue in issues(tick, early=early):
            highest = self._exchange(issue) if isinstance(issue, Exchange) else self._work(issue)
            if highest.total > peak.total:
                peak = highest
        return Moment(number, dict(self._live.by_kind), dict(peak.by_kind))

    def _exchange(self, exchange: Exchange) -> Usage:
        """What was sent before is released; new buffers are made, and results are on their way."""
        self._move(TRANSFERS, None, self._leaving)
        self._leaving = 0
        for transfer in exchange.transfers:
            if transfer.source == transfer.target:
                continue
            sends = transfer.source == self._rank
            messages = self._trace.transfers[sends, self._ranks[transfer.target if sends else transfer.source]]
            self.messages.update(messages)
            nbytes = _nbytes(messages)
            self._move(ACTIVATIONS if sends else None, TRANSFERS, nbytes)
            self._leaving += nbytes * sends
        return self._live

    def _work(self, action: Action) -> Usage:
        effect, arrived = self._trace.effects[self._trace.key(action)], self._arrived(action)
        if action.kind is Kind.FORWARD:
            self._move(TRANSFERS, ACTIVATIONS, arrived)
        highest = self._live.plus(effect.peak)
        self._live = self._live.plus(effect.growth)
        if action.kind is not Kind.FORWARD:
            self._move(TRANSFERS, None, arrived)
        return highest

    def _arrived(self, action: Action) -> int:
        """Bytes that an action takes from another rank."""
        starts_here = action.stage == (0 if action.kind is Kind.FORWARD else self._last_stage)
        source = (action.stage + (-1 if action.kind is Kind.FORWARD else 1)) % len(self._ranks)
        if action.kind is Kind.WEIGHT_GRADIENT or starts_here or source == self._rank:
            return 0
        return _nbytes(self._trace.transfers[False, self._ranks[source]])

    def _move(self, before: str | None, after: str | None, nbytes: int) -> None:
        moved = {kind: sign * nbytes for kind, sign in ((before, -1), (after, 1)) if kind is not None}
        self._live = self._live.plus(Usage(moved))


def _nbytes(messages: Sequence[Message]) -> int:
    return sum(Ledger.rounded(message.nbytes) for message in messages)
