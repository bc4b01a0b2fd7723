"""How long a schedule takes with given durations of work and transfers, and the fraction of it that ranks stand idle.

A replay follows what each rank issues (:mod:`megalm.core.pipeline.order`) under the rules of CUDA streams and NCCL.
Work runs in order on one stream; each communicator has a stream of its own, on which exchanges run in order. An
exchange begins when the work that was issued before it has ended, and takes the time of a transfer from the moment when
all of its partners have begun theirs. Work begins when what it consumes has arrived. The host issues ahead of the
device, so it takes no time. Transfers share no bandwidth.

Source of the ideal bubbles: Narayanan et al. 2021, section 2.2; Qi et al. 2024, table 2. No torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from megalm.core.pipeline.order import Exchange, Issue, Link, assert_paired, orders
from megalm.core.pipeline.schedule import Action, Kind, Schedule, ScheduleError, Shape, Transfer, plan


@dataclass(frozen=True)
class Durations:
    """Time that each part of the work of one stage takes, in any unit.

    Attributes:
        forward: T_F.
        input_gradient: T_B of Qi et al. 2024.
        weight_gradient: T_W.
    """

    forward: float = 1.0
    input_gradient: float = 1.0
    weight_gradient: float = 1.0

    def of(self, kind: Kind) -> float:
        """Duration of one action."""
        return self.by_kind[kind]

    @property
    def by_kind(self) -> dict[Kind, float]:
        """Duration of each kind of action."""
        return {
            Kind.FORWARD: self.forward,
            Kind.BACKWARD: self.input_gradient + self.weight_gradient,
            Kind.INPUT_GRADIENT: self.input_gradient,
            Kind.WEIGHT_GRADIENT: self.weight_gradient,
        }


@dataclass(frozen=True)
class Replay:
    """What a replay found, in the unit of the durations.

    Attributes:
        busy: time that each pipeline rank works.
        total: time at which the last rank has finished its work.
    """

    busy: tuple[float, ...]
    total: float

    @property
    def bubble_fraction(self) -> float:
        """Idle fraction of the step, averaged over ranks: 1 − busy time / (p · time of the last rank to finish)."""
        return 1.0 - sum(self.busy) / (len(self.busy) * self.total)


def bubble_fraction(
    schedule: Schedule,
    shape: Shape,
    durations: Durations | Sequence[Durations] | None = None,
    *,
    transfer: float = 0.0,
    early: bool = True,
) -> float:
    """Idle fraction of a step under a schedule; by default the ideal one, where transfers take no time.

    With all durations equal it is, for whole rounds of micro-batches and m of at least p: GPipe and 1F1B
    3(p − 1) / (3m + 3(p − 1)); interleaved that with (p − 1)/v for p − 1 (Narayanan et al. 2021, section 2.2); ZB-H1
    (p − 1) / (3m + p − 1) (Qi et al. 2024, table 2).

    It takes time in proportion to the number of actions: for 16 ranks of three stages and 192 micro-batches 0.3 s,
    half of which is the plan; for 64 ranks of two stages and 512 micro-batches 2.5 s.

    Args:
        schedule: gives each rank's actions.
        shape: size of the pipeline's work.
        durations: of every stage, or one per stage.
        transfer: time of one transfer between two ranks.
        early: whether receives are posted before the work of their tick, or grouped after it.

    Raises:
        ScheduleError: the schedule deadlocks, or is no schedule of this work.
    """
    return replay(orders(plan(schedule, shape), early=early), shape, durations, transfer=transfer).bubble_fraction


def replay(
    of_ranks: Sequence[Sequence[Issue]],
    shape: Shape,
    durations: Durations | Sequence[Durations] | None = None,
    *,
    transfer: float = 0.0,
) -> Replay:
    """Follow what the ranks issue, to the end.

    It is also the proof that an order does not deadlock. It is stricter than a device: a rank issues nothing more while
    work waits for a transfer, or an exchange for the one before it on its communicator, as if all streams of a device
    shared one hardware queue (``CUDA_DEVICE_MAX_CONNECTIONS=1``). What passes here passes wherever less blocks.

    Args:
        of_ranks: what each pipeline rank issues, in order.
        shape: size of the pipeline's work.
        durations: of every stage, or one per stage; None: 1 each.
        transfer: time of one exchange.

    Raises:
        ScheduleError: the ranks wait for each other in a circle, or what is sent is not what is received.
    """
    assert_paired(of_ranks)
    ranks = _Ranks(of_ranks, shape, durations or Durations(), transfer)
    while ranks.advance():
        pass
    return ranks.result()


class _Ranks:
    """Where each rank stands."""

    def __init__(
        self,
        of_ranks: Sequence[Sequence[Issue]],
        shape: Shape,
        durations: Durations | Sequence[Durations],
        transfer: float,
    ) -> None:
        stages = [durations] * shape.num_stages if isinstance(durations, Durations) else durations
        if len(stages) != shape.num_stages:
            raise ValueError(f"durations of {len(stages)} stages are given, the pipeline has {shape.num_stages}")
        self._durations = [stage.by_kind for stage in stages]
        self._of_ranks = of_ranks
        self._transfer = transfer
        self._last_stage = shape.num_stages - 1
        self._position = [0] * len(of_ranks)
        self._clock = [0.0] * len(of_ranks)
        self._busy = [0.0] * len(of_ranks)
        # By rank: the exchange that is last on each communicator's stream.
        self._streams: list[dict[Link | None, _Running]] = [{} for _ in of_ranks]
        # (is it a gradient, consuming stage, micro-batch) ▶ the exchange that brings it.
        self._arriving: list[dict[tuple[bool, int, int], _Running]] = [{} for _ in of_ranks]
        # Transfers of which one end alone has come.
        self._begun: dict[Transfer, _Running] = {}

    def advance(self) -> bool:
        """Let every rank issue what it can; whether any could."""
        before = list(self._position)
        for rank, order in enumerate(self._of_ranks):
            while self._position[rank] < len(order):
                issue = order[self._position[rank]]
                issued = self._exchange(rank, issue) if isinstance(issue, Exchange) else self._work(rank, issue)
                if not issued:
                    break
                self._position[rank] += 1
        return before != self._position

    def result(self) -> Replay:
        """What was found, once no rank can advance."""
        ends = list(zip(self._of_ranks, self._position, strict=True))
        if any(position < len(order) for order, position in ends):
            at = [_spoken(order[position]) if position < len(order) else "has ended" for order, position in ends]
            waits = "; ".join(f"pipeline rank {rank}: {issue}" for rank, issue in enumerate(at))
            raise ScheduleError(f"the order of transfers deadlocks: every rank waits ({waits})")
        return Replay(tuple(self._busy), max(self._clock))

    def _work(self, rank: int, action: Action) -> bool:
        start = self._clock[rank]
        if self._consumes_from_another_rank(action):
            key = action.kind.sends_gradient, action.stage, action.micro_batch
            if key not in self._arriving[rank]:
                raise ScheduleError(f"pipeline rank {rank} computes {action} before it posts the receive of its input")
            end = self._arriving[rank][key].end
            if end is None:
                return False
            del self._arriving[rank][key]
            start = max(start, end)
        duration = self._durations[action.stage][action.kind]
        self._clock[rank] = start + duration
        self._busy[rank] += duration
        return True

    def _consumes_from_another_rank(self, action: Action) -> bool:
        if action.kind is Kind.WEIGHT_GRADIENT or len(self._of_ranks) == 1:
            return False
        return action.stage != (self._last_stage if action.kind.sends_gradient else 0)

    def _exchange(self, rank: int, exchange: Exchange) -> bool:
        transfers = [transfer for transfer in exchange.transfers if transfer.source != transfer.target]
        if not transfers:
            return True
        before = self._streams[rank].get(exchange.link)
        if before is not None and before.end is None:
            return False
        start = self._clock[rank] if before is None else max(self._clock[rank], before.end or 0.0)
        self._streams[rank][exchange.link] = running = _Running(start, self._transfer)
        for transfer in transfers:
            if transfer.target == rank:
                self._arriving[rank][transfer.is_gradient, transfer.stage, transfer.micro_batch] = running
            if other := self._begun.pop(transfer, None):
                running.meet(other)
            else:
                running.missing += 1
                self._begun[transfer] = running
        return True


class _Running:
    """An exchange that a rank has issued, and which ends when all its partners have come."""

    __slots__ = ("_latest", "_transfer", "missing", "start")

    def __init__(self, start: float, transfer: float) -> None:
        self.start = start
        self.missing = 0
        self._latest = start
        self._transfer = transfer

    @property
    def end(self) -> float | None:
        """When it ends; None: partners are missing."""
        return None if self.missing else self._latest + self._transfer

    def meet(self, other: _Running) -> None:
        """Take the partner's start into account, here and there."""
        other.missing -= 1
        self._latest = max(self._latest, other.start)
        other._latest = max(other._latest, self.start)


def _spoken(issue: Issue) -> str:
    if isinstance(issue, Action):
        return str(issue)
    return ", ".join(f"transfer {t.source}▶{t.target} for stage {t.stage}" for t in issue.transfers)
