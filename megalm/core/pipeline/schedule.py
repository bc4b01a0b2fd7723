"""Pipeline schedules as data: pure generators of actions, and the simulation that pairs every send with a receive.

A schedule gives each pipeline rank a list of :class:`Action`. :func:`plan` replays all ranks together in *ticks* (in a
tick, each rank performs its next action if what it needs has arrived, and what it produced is transferred at the end of
the tick), which proves that no order of blocking transfers can deadlock, and yields for each rank the transfers that
belong to each tick. Both sides of a transfer name the same tick, so a runner may group the transfers of a tick.

Sources: GPipe: Huang et al. 2019. 1F1B: Narayanan et al. 2019, 2021 (PipeDream-Flush).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum


class Kind(Enum):
    """What an action computes for one micro-batch on one stage."""

    FORWARD = "F"
    BACKWARD = "B"


@dataclass(frozen=True, order=True)
class Action:
    """One unit of work of a rank."""

    kind: Kind
    stage: int
    micro_batch: int

    def __str__(self) -> str:
        return f"{self.kind.value}{self.stage}.{self.micro_batch}"


@dataclass(frozen=True)
class Transfer:
    """A tensor on its way: the activation (FORWARD) or gradient (BACKWARD) that stage ``stage`` needs.

    Attributes:
        kind: of the action that will consume it.
        stage: stage that will consume it.
        micro_batch: micro-batch it belongs to.
        source: pipeline rank that produced it.
        target: pipeline rank that consumes it.
    """

    kind: Kind
    stage: int
    micro_batch: int
    source: int
    target: int


@dataclass(frozen=True)
class Tick:
    """What one rank does in one tick: at most one action, then transfers out and in."""

    action: Action | None
    sends: tuple[Transfer, ...]
    receives: tuple[Transfer, ...]


Schedule = Callable[[int, int, int], list[Action]]
"""(pipeline rank, pipeline degree, micro-batches) ▶ that rank's actions in order."""


def gpipe(rank: int, degree: int, micro_batches: int) -> list[Action]:
    """All forwards, then all backwards in reverse: simple, and holds every micro-batch's activations."""
    del degree
    forwards = [Action(Kind.FORWARD, rank, m) for m in range(micro_batches)]
    return forwards + [Action(Kind.BACKWARD, rank, m) for m in reversed(range(micro_batches))]


def one_forward_one_backward(rank: int, degree: int, micro_batches: int) -> list[Action]:
    """1F1B: warm up with as many forwards as stages follow, alternate, drain; holds at most ``degree − rank``."""
    warm_up = min(degree - rank - 1, micro_batches)
    actions = [Action(Kind.FORWARD, rank, m) for m in range(warm_up)]
    for m in range(micro_batches - warm_up):
        actions += [Action(Kind.FORWARD, rank, warm_up + m), Action(Kind.BACKWARD, rank, m)]
    return actions + [Action(Kind.BACKWARD, rank, m) for m in range(micro_batches - warm_up, micro_batches)]


def forward_only(rank: int, degree: int, micro_batches: int) -> list[Action]:
    """Evaluation: every micro-batch once, no backward."""
    del degree
    return [Action(Kind.FORWARD, rank, m) for m in range(micro_batches)]


SCHEDULES: dict[str, Schedule] = {"gpipe": gpipe, "1f1b": one_forward_one_backward}
"""Training schedules by the name that ``parallel.schedule`` takes."""


class ScheduleError(ValueError):
    """A schedule that deadlocks, skips work or does it twice."""


def plan(schedule: Schedule, degree: int, micro_batches: int) -> list[tuple[Tick, ...]]:
    """Replay a schedule and return, for each pipeline rank, its ticks.

    All ranks have the same number of ticks. Ticks in which a rank neither acts nor transfers are kept, so that tick
    numbers mean the same on every rank.

    Raises:
        ScheduleError: the schedule deadlocks, or a rank's actions are not each of its work exactly once.
    """
    queues = [schedule(rank, degree, micro_batches) for rank in range(degree)]
    for rank, queue in enumerate(queues):
        if len(set(queue)) != len(queue):
            raise ScheduleError(f"pipeline rank {rank} repeats an action")
    position = [0] * degree
    done: set[Action] = set()
    ticks: list[list[Tick]] = [[] for _ in range(degree)]
    while any(position[r] < len(queues[r]) for r in range(degree)):
        actions = [_next_if_ready(queues[r], position[r], done, degree) for r in range(degree)]
        if not any(actions):
            waiting = ", ".join(str(q[p]) for q, p in zip(queues, position, strict=True) if p < len(q))
            raise ScheduleError(f"the schedule deadlocks: every rank waits ({waiting})")
        transfers = [t for action in actions if action and (t := _transfer_after(action, degree))]
        for rank, action in enumerate(actions):
            if action:
                position[rank] += 1
                done.add(action)
            ticks[rank].append(
                Tick(
                    action=action,
                    sends=tuple(t for t in transfers if t.source == rank),
                    receives=tuple(t for t in transfers if t.target == rank),
                )
            )
    return [tuple(rank_ticks) for rank_ticks in ticks]


def peak_live_activations(actions: list[Action]) -> int:
    """Most forwards whose backward is still to come: what a rank's activation memory is proportional to."""
    live = peak = 0
    for action in actions:
        live += 1 if action.kind is Kind.FORWARD else -1
        peak = max(peak, live)
    return peak


def bubble_fraction(schedule: Schedule, degree: int, micro_batches: int) -> float:
    """Idle share of the ticks, averaged over ranks, if forward and backward take one tick each.

    For GPipe and 1F1B this is (p − 1) / (m + p − 1) (Narayanan et al. 2021, section 2.2, as a share of the whole).
    """
    ticks = plan(schedule, degree, micro_batches)
    busy = sum(tick.action is not None for rank_ticks in ticks for tick in rank_ticks)
    return 1.0 - busy / (degree * len(ticks[0]))


def _next_if_ready(queue: list[Action], position: int, done: set[Action], degree: int) -> Action | None:
    if position == len(queue):
        return None
    action = queue[position]
    return action if all(need in done for need in _needs(action, degree)) else None


def _needs(action: Action, num_stages: int) -> list[Action]:
    """Actions whose results this one consumes."""
    if action.kind is Kind.FORWARD:
        return [Action(Kind.FORWARD, action.stage - 1, action.micro_batch)] if action.stage else []
    needs = [Action(Kind.FORWARD, action.stage, action.micro_batch)]
    if action.stage < num_stages - 1:
        needs.append(Action(Kind.BACKWARD, action.stage + 1, action.micro_batch))
    return needs


def _transfer_after(action: Action, degree: int) -> Transfer | None:
    """What an action's result is sent as, if any stage waits for it."""
    target = action.stage + (1 if action.kind is Kind.FORWARD else -1)
    if not 0 <= target < degree:
        return None
    return Transfer(action.kind, target, action.micro_batch, source=action.stage, target=target)
