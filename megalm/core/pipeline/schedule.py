"""Pipeline schedules as data: pure generators of actions, and the simulation that pairs every send with a receive.

A schedule gives each pipeline rank a list of :class:`Action`. :func:`plan` replays all ranks together in *ticks* (in a
tick, each rank performs its next action if what it needs has arrived, and what it produced is transferred at the end of
the tick), which proves that no order of blocking transfers can deadlock, and yields for each rank the transfers that
belong to each tick. Both sides of a transfer name the same tick, so a runner may group the transfers of a tick, or post
the receives of a tick before its work (``order.py``). How long a schedule takes is in ``timing.py``.

A pipeline of p ranks has p·v stages; stage s runs on rank s mod p, so with v above 1 (*virtual stages*) a micro-batch
goes round the ranks v times.

Sources: GPipe: Huang et al. 2019. 1F1B: Narayanan et al. 2019, 2021 (PipeDream-Flush). Interleaved 1F1B: Narayanan et
al. 2021, section 2.2. ZB-H1: Qi et al. 2024, "Zero Bubble Pipeline Parallelism", section 2. No torch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum


class Kind(Enum):
    """What an action computes for one micro-batch on one stage."""

    FORWARD = "F"
    BACKWARD = "B"
    """The gradients of the stage's input and of its weights."""
    INPUT_GRADIENT = "I"
    """The input-gradient half of a backward, which the previous stage waits for."""
    WEIGHT_GRADIENT = "W"
    """The weight-gradient half of a backward, which no other stage waits for."""

    @property
    def sends_gradient(self) -> bool:
        """Whether the result goes to the stage before."""
        return self in (Kind.BACKWARD, Kind.INPUT_GRADIENT)


@dataclass(frozen=True)
class Action:
    """One unit of work of a rank."""

    kind: Kind
    stage: int
    micro_batch: int

    def __str__(self) -> str:
        return f"{self.kind.value}{self.stage}.{self.micro_batch}"


@dataclass(frozen=True)
class Transfer:
    """A transfer: the activation or gradient that stage ``stage`` needs.

    Attributes:
        is_gradient: whether it is a gradient, on its way back, or an activation, on its way forth.
        stage: stage that will consume it.
        micro_batch: micro-batch it belongs to.
        source: pipeline rank that produced it.
        target: pipeline rank that consumes it; the same as ``source`` where the next stage is on the same rank.
    """

    is_gradient: bool
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


@dataclass(frozen=True)
class Shape:
    """The size of a pipeline's work.

    Attributes:
        degree: pipeline ranks p.
        micro_batches: micro-batches per step m.
        virtual_stages: stages per rank v.
    """

    degree: int
    micro_batches: int
    virtual_stages: int = 1

    @property
    def num_stages(self) -> int:
        """Stages of all ranks."""
        return self.degree * self.virtual_stages


Schedule = Callable[[int, Shape], list[Action]]
"""(pipeline rank, size) ▶ that rank's actions in order."""


def gpipe(rank: int, shape: Shape) -> list[Action]:
    """All forwards, then all backwards in reverse: simple, and holds every micro-batch's activations."""
    forwards = forward_only(rank, shape)
    return forwards + [Action(Kind.BACKWARD, f.stage, f.micro_batch) for f in reversed(forwards)]


def one_forward_one_backward(rank: int, shape: Shape) -> list[Action]:
    """1F1B: warm up with as many forwards as stages follow, alternate, drain; holds at most ``degree − rank``."""
    _refuse_virtual_stages("1f1b", shape)
    forwards = [Action(Kind.FORWARD, rank, m) for m in range(shape.micro_batches)]
    backwards = [Action(Kind.BACKWARD, rank, m) for m in range(shape.micro_batches)]
    return _alternate(forwards, backwards, warm_up=shape.degree - rank - 1)


def interleaved_one_forward_one_backward(rank: int, shape: Shape) -> list[Action]:
    """1F1B over v stages per rank: the bubble shrinks by v, for v times the transfers.

    Micro-batches go through a rank's stages in rounds of p: the first p through its first stage, the same p through its
    second, and so on. Where p does not divide m, the last round is planned in full and its missing micro-batches are
    left out, which keeps the order legal; only whole rounds reach the published bubble.
    """
    p, v = shape.degree, shape.virtual_stages
    rounds = range(-(-shape.micro_batches // p))

    def in_rounds(kind: Kind, chunks: list[int]) -> list[Action]:
        return [Action(kind, rank + chunk * p, r * p + b) for r in rounds for chunk in chunks for b in range(p)]

    forwards, backwards = in_rounds(Kind.FORWARD, list(range(v))), in_rounds(Kind.BACKWARD, list(range(v))[::-1])
    # Megatron-LM's warm-up: two forwards more for each rank nearer to the front, and all rounds but the last stage's.
    actions = _alternate(forwards, backwards, warm_up=2 * (p - rank - 1) + (v - 1) * p)
    return [action for action in actions if action.micro_batch < shape.micro_batches]


def zero_bubble_h1(rank: int, shape: Shape) -> list[Action]:
    """ZB-H1: 1F1B whose weight gradients fill the bubble, with the peak memory of 1F1B's first rank.

    Rank r postpones weight gradients until r of them are waiting, so that it holds at most p − r forwards without a
    backward and r input gradients without their weight gradient: p activations in all. What waits is computed where
    1F1B would stand idle in its drain.
    """
    _refuse_virtual_stages("zb_h1", shape)
    p, m = shape.degree, shape.micro_batches
    actions: list[Action] = []
    waiting: list[int] = []
    warm_up = min(p - rank - 1, m)
    actions += [Action(Kind.FORWARD, rank, b) for b in range(warm_up)]
    for b in range(m):
        if warm_up + b < m:
            actions.append(Action(Kind.FORWARD, rank, warm_up + b))
        actions.append(Action(Kind.INPUT_GRADIENT, rank, b))
        waiting.append(b)
        # In the drain a rank waits for the next gradient: there is time for one weight gradient after each.
        if len(waiting) > rank or warm_up + b >= m:
            actions.append(Action(Kind.WEIGHT_GRADIENT, rank, waiting.pop(0)))
    return actions + [Action(Kind.WEIGHT_GRADIENT, rank, b) for b in waiting]


def forward_only(rank: int, shape: Shape) -> list[Action]:
    """Evaluation: every micro-batch once through each stage of the rank, no backward."""
    p, v, m = shape.degree, shape.virtual_stages, shape.micro_batches
    return [
        Action(Kind.FORWARD, rank + chunk * p, micro_batch)
        for start in range(0, m, p)
        for chunk in range(v)
        for micro_batch in range(start, min(start + p, m))
    ]


SCHEDULES: dict[str, Schedule] = {
    "gpipe": gpipe,
    "1f1b": one_forward_one_backward,
    "interleaved_1f1b": interleaved_one_forward_one_backward,
    "zb_h1": zero_bubble_h1,
}
"""Training schedules by the name that ``parallel.schedule`` takes."""


def splits_backward(name: str) -> bool:
    """Whether a schedule computes the gradients of inputs and of weights apart."""
    shape = Shape(degree=1, micro_batches=1, virtual_stages=1)
    return any(action.kind is Kind.WEIGHT_GRADIENT for action in SCHEDULES[name](0, shape))


class ScheduleError(ValueError):
    """A schedule that deadlocks, skips work or does it twice."""


def plan(schedule: Schedule, shape: Shape) -> list[tuple[Tick, ...]]:
    """Replay a schedule and return, for each pipeline rank, its ticks.

    All ranks have the same number of ticks. Ticks in which a rank neither acts nor transfers are kept, so that tick
    numbers mean the same on every rank.

    Raises:
        ScheduleError: the schedule deadlocks, or a rank's actions are not each of its work exactly once.
    """
    degree = shape.degree
    queues = [schedule(rank, shape) for rank in range(degree)]
    for rank, queue in enumerate(queues):
        _assert_complete(rank, queue, shape)
    position = [0] * degree
    done: set[Action] = set()
    ticks: list[list[Tick]] = [[] for _ in range(degree)]
    while any(position[r] < len(queues[r]) for r in range(degree)):
        actions = [_next_if_ready(queues[r], position[r], done, shape) for r in range(degree)]
        if not any(actions):
            waiting = ", ".join(str(q[p]) for q, p in zip(queues, position, strict=True) if p < len(q))
            raise ScheduleError(f"the schedule deadlocks: every rank waits ({waiting})")
        transfers = [t for action in actions if action and (t := _transfer_after(action, shape))]
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
    """Maximum number of (stage, micro-batch) pairs whose activations are in memory at one time.

    They are held from the forward to the backward, or to the weight gradient where the backward is split.
    """
    live = peak = 0
    for action in actions:
        if action.kind is Kind.FORWARD:
            live += 1
        elif action.kind is not Kind.INPUT_GRADIENT:
            live -= 1
        peak = max(peak, live)
    return peak


def _refuse_virtual_stages(name: str, shape: Shape) -> None:
    if shape.virtual_stages != 1:
        raise ScheduleError(f"{name} runs one stage per rank, not {shape.virtual_stages}")


def _alternate(forwards: list[Action], backwards: list[Action], *, warm_up: int) -> list[Action]:
    """``warm_up`` forwards, then a forward and a backward in turn, then the rest of the backwards."""
    warm_up = min(warm_up, len(forwards))
    actions = forwards[:warm_up]
    for forward, backward in zip(forwards[warm_up:], backwards, strict=False):
        actions += [forward, backward]
    return actions + backwards[len(forwards) - warm_up :]


def _assert_complete(rank: int, queue: list[Action], shape: Shape) -> None:
    """Each of the rank's forwards is there once, and each backward once, whole or in its two halves; or none at all."""
    if len(set(queue)) != len(queue):
        raise ScheduleError(f"pipeline rank {rank} repeats an action")
    wanted = {(stage, m) for stage in range(rank, shape.num_stages, shape.degree) for m in range(shape.micro_batches)}
    done = {kind: {(a.stage, a.micro_batch) for a in queue if a.kind is kind} for kind in Kind}
    split = done[Kind.INPUT_GRADIENT] == done[Kind.WEIGHT_GRADIENT]
    backwards = done[Kind.BACKWARD] | done[Kind.INPUT_GRADIENT]
    if done[Kind.FORWARD] != wanted or not split or done[Kind.BACKWARD] & done[Kind.INPUT_GRADIENT]:
        raise ScheduleError(f"pipeline rank {rank} does not do each of its work exactly once")
    if backwards and backwards != wanted:
        raise ScheduleError(f"pipeline rank {rank} leaves out backwards of its work")


def _next_if_ready(queue: list[Action], position: int, done: set[Action], shape: Shape) -> Action | None:
    if position == len(queue):
        return None
    action = queue[position]
    return action if all(need in done for need in _needs(action, shape)) else None


def _needs(action: Action, shape: Shape) -> list[Action]:
    """Actions whose results this one consumes."""
    stage, micro_batch = action.stage, action.micro_batch
    if action.kind is Kind.FORWARD:
        return [Action(Kind.FORWARD, stage - 1, micro_batch)] if stage else []
    if action.kind is Kind.WEIGHT_GRADIENT:
        return [Action(Kind.INPUT_GRADIENT, stage, micro_batch)]
    needs = [Action(Kind.FORWARD, stage, micro_batch)]
    if stage < shape.num_stages - 1:
        needs.append(Action(action.kind, stage + 1, micro_batch))
    return needs


def _transfer_after(action: Action, shape: Shape) -> Transfer | None:
    """What an action's result is sent as, if any stage waits for it."""
    if action.kind is Kind.WEIGHT_GRADIENT:
        return None
    gradient = action.kind.sends_gradient
    target = action.stage + (-1 if gradient else 1)
    if not 0 <= target < shape.num_stages:
        return None
    degree = shape.degree
    return Transfer(gradient, target, action.micro_batch, source=action.stage % degree, target=target % degree)
