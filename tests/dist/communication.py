"""Is a program's communication safe where every call may block? A recorder of what ranks ask for, and a pure checker.

Gloo forgives much that hangs on NCCL. What NCCL needs is a property of the order of calls, so it is proven from
recorded traces, on any backend: :func:`record` notes every call a rank makes to ``torch.distributed``, and
:func:`check` replays the traces of all ranks under *rendezvous* semantics. A rank leaves a call only when, of

* a collective: every member of the group stands at a call on that group, alike in operation, shapes and dtypes;
* a group of point-to-point transfers (``batch_isend_irecv``): every partner has come to its own group that holds, for
  each ordered pair of ranks, the counterparts in the same order. A transfer whose partner has come is done, but the
  rank stays until all of its group's transfers are;
* transfers in one direction between two ranks, which are *posted* (a pipeline's): the posted ones before them on the
  same communicator and in the same direction are done. They are done when the partner has posted its counterpart; a
  rank that waits for them (``Work.wait``) stays until then.

Other asynchronous calls are taken to block as well. That refuses more than NCCL does, and what passes is safe however
few transfers a backend keeps under way.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import wraps
from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch.distributed import distributed_c10d as c10d

COLLECTIVES = (
    "all_reduce",
    "all_gather",
    "all_gather_into_tensor",
    "all_gather_object",
    "all_gather_single",
    "all_to_all",
    "all_to_all_single",
    "barrier",
    "broadcast",
    "broadcast_object_list",
    "gather",
    "gather_object",
    "monitored_barrier",
    "reduce",
    "reduce_scatter",
    "reduce_scatter_single",
    "reduce_scatter_tensor",
    "scatter",
    "scatter_object_list",
)


@dataclass(frozen=True)
class Payload:
    """What a call moves."""

    shape: tuple[int, ...]
    dtype: str


@dataclass(frozen=True)
class Transfer:
    """One side of a point-to-point transfer."""

    source: int
    target: int
    payload: Payload


@dataclass(frozen=True)
class Collective:
    """One rank's call of a collective.

    Attributes:
        group: global ranks of the members.
        operation: name of the function.
        payloads: tensors that go in and out; all members must name the same.
        detail: root and reduction.
        group_name: tells two groups of the same members apart, which have communicators of their own.
    """

    group: tuple[int, ...]
    operation: str
    payloads: tuple[Payload, ...] = ()
    detail: str = ""
    group_name: str = ""

    def __str__(self) -> str:
        moved = " ".join(f"{list(p.shape)}:{p.dtype}" for p in self.payloads)
        return f"{self.operation} of {list(self.group)} {self.detail} {moved}".strip()


@dataclass(frozen=True)
class Transfers:
    """One rank's group of point-to-point transfers, issued together."""

    group: tuple[int, ...]
    transfers: tuple[Transfer, ...]
    group_name: str = ""
    posted: bool = False
    """Whether the rank goes on at once; all of them go from one rank to another."""

    def __str__(self) -> str:
        moved = ", ".join(f"{t.source}▶{t.target} {list(t.payload.shape)}:{t.payload.dtype}" for t in self.transfers)
        return f"{'posted ' * self.posted}transfers of {list(self.group)}: {moved}"

    @property
    def partners(self) -> set[int]:
        """Ranks that the transfers begin or end at."""
        return {rank for t in self.transfers for rank in (t.source, t.target)}

    def between(self, source: int, target: int) -> tuple[Payload, ...]:
        """What goes from one rank to another, in order."""
        return tuple(t.payload for t in self.transfers if (t.source, t.target) == (source, target))


@dataclass(frozen=True)
class Wait:
    """One rank waits for transfers that it posted.

    Attributes:
        posted: number of the event among the rank's.
    """

    posted: int

    def __str__(self) -> str:
        return f"waits for what call {self.posted} posted"


Event = Collective | Transfers | Wait


class _Streams:
    """What ranks have posted, by communicator and direction."""

    def __init__(self) -> None:
        # (communicator, source, target) ▶ what each end has posted, in order.
        self._posted: dict[tuple[str, int, int], dict[bool, list[tuple[Payload, ...]]]] = {}
        self._places: dict[tuple[int, int], tuple[tuple[str, int, int], bool, int]] = {}

    def is_free(self, rank: int, event: Transfers) -> bool:
        """Whether all that the rank has posted there before is done."""
        key, sends = self._key(rank, event)
        ends = self._posted.get(key, {True: [], False: []})
        return len(ends[sends]) <= len(ends[not sends])

    def post(self, rank: int, number: int, event: Transfers) -> bool:
        """Note the rank's event of this number; False: the partner has posted something else."""
        key, sends = self._key(rank, event)
        ends = self._posted.setdefault(key, {True: [], False: []})
        place = len(ends[sends])
        self._places[rank, number] = key, sends, place
        payloads = tuple(t.payload for t in event.transfers)
        ends[sends].append(payloads)
        return place >= len(ends[not sends]) or ends[not sends][place] == payloads

    def is_done(self, rank: int, number: int) -> bool:
        """Whether the partner has posted the counterpart."""
        key, sends, place = self._places[rank, number]
        return place < len(self._posted[key][not sends])

    @property
    def rendezvous(self) -> int:
        """How many are done; all that were posted, or ranks are left alone with some."""
        return sum(min(len(ends[True]), len(ends[False])) for ends in self._posted.values())

    @property
    def all_done(self) -> bool:
        """Whether every posted transfer has met its counterpart."""
        return all(len(ends[True]) == len(ends[False]) for ends in self._posted.values())

    @staticmethod
    def _key(rank: int, event: Transfers) -> tuple[tuple[str, int, int], bool]:
        source, target = event.transfers[0].source, event.transfers[0].target
        return (event.group_name, source, target), rank == source


class UnsafeCommunicationError(AssertionError):
    """Ranks that do not ask for the same, or that wait for each other in a circle."""


def check(traces: Sequence[Sequence[Event]]) -> int:  # noqa: PLR0912 — one replay, read from top to bottom
    """Replay the traces of all ranks with blocking calls.

    Args:
        traces: each rank's events in order.

    Returns:
        The number of rendezvous.

    Raises:
        UnsafeCommunicationError: at a mismatch or deadlock; the message shows where every rank stands, and what it did
            just before.
    """
    position = [0] * len(traces)
    # Transfers of the group at which a rank stands now that its partner has met: they end together, one leaves first.
    met: list[set[tuple[int, int]]] = [set() for _ in traces]
    rendezvous = 0
    streams = _Streams()

    def at(rank: int) -> Event | None:
        return traces[rank][position[rank]] if position[rank] < len(traces[rank]) else None

    def leave(rank: int) -> None:
        position[rank] += 1
        met[rank] = set()

    while any(at(rank) for rank in range(len(traces))):
        progressed = False
        for rank in range(len(traces)):
            event = at(rank)
            if isinstance(event, Collective):
                others = [at(member) for member in event.group]
                same_group = [
                    isinstance(o, Collective) and (o.group, o.group_name) == (event.group, event.group_name)
                    for o in others
                ]
                if all(same_group):
                    if any(other != event for other in others):
                        raise UnsafeCommunicationError(f"members of a group differ{_where(traces, position)}")
                    for member in event.group:
                        leave(member)
                    rendezvous, progressed = rendezvous + 1, True
            elif isinstance(event, Wait):
                if streams.is_done(rank, event.posted):
                    leave(rank)
                    progressed = True
            elif isinstance(event, Transfers) and event.posted:
                if streams.is_free(rank, event):
                    if not streams.post(rank, position[rank], event):
                        (ends,) = {(t.source, t.target) for t in event.transfers}
                        raise UnsafeCommunicationError(
                            f"what goes from {ends[0]} to {ends[1]} differs on its ends{_where(traces, position)}"
                        )
                    leave(rank)
                    progressed = True
            elif isinstance(event, Transfers):
                for partner in event.partners - {rank}:
                    other = at(partner)
                    pair = rank, partner
                    if pair in met[rank] or not isinstance(other, Transfers) or other.posted:
                        continue
                    if other.group_name != event.group_name:
                        continue
                    # A partner that has met this rank's call before stands at one that is over for this rank.
                    if rank not in other.partners or pair[::-1] in met[partner]:
                        continue
                    for ends in (pair, pair[::-1]):
                        if event.between(*ends) != other.between(*ends):
                            raise UnsafeCommunicationError(
                                f"what goes from {ends[0]} to {ends[1]} differs on its ends{_where(traces, position)}"
                            )
                    met[rank].add(pair)
                    met[partner].add(pair[::-1])
                    rendezvous, progressed = rendezvous + 1, True
                if {partner for _, partner in met[rank]} == event.partners - {rank}:
                    leave(rank)
                    progressed = True
        if not progressed:
            raise UnsafeCommunicationError(f"every rank waits{_where(traces, position)}")
    if not streams.all_done:
        raise UnsafeCommunicationError("a posted transfer has no counterpart")
    return rendezvous + streams.rendezvous


def _where(traces: Sequence[Sequence[Event]], position: list[int]) -> str:
    lines = [""]
    for rank, (trace, here) in enumerate(zip(traces, position, strict=True)):
        lines.append(f"rank {rank}, call {here} of {len(trace)}:")
        lines += [f"    {event}" for event in trace[max(0, here - 3) : here]]
        lines.append(f"  ▶ {trace[here] if here < len(trace) else 'has ended'}")
    return "\n".join(lines)


@contextmanager
def record() -> Iterator[list[Event]]:
    """Note every call of this process to ``torch.distributed``, whoever makes it, and let it pass.

    Functions are replaced in the modules that define and re-export them; code that took one of them into a name of its
    own before is not seen, which megalm's and DeepSpeed's does not.
    """
    events: list[Event] = []
    depth = [0]  # some of these functions are made of others, which are no calls of the program's own
    replaced: list[tuple[Any, str, Any]] = []

    def install(name: str, describe: Callable[[tuple, dict], Event | None], give: Callable = lambda x: x) -> None:
        original = getattr(c10d, name, None)
        if original is None:
            return

        @wraps(original)
        def noted(*args: Any, **kwargs: Any) -> Any:
            if depth[0] == 0 and (event := describe(args, kwargs)) is not None:
                events.append(event)
            depth[0] += 1
            try:
                result = original(*args, **kwargs)
            finally:
                depth[0] -= 1
            return give(result)

        for module in (c10d, dist):
            if getattr(module, name, None) is original:
                replaced.append((module, name, original))
                setattr(module, name, noted)

    for name in COLLECTIVES:
        if hasattr(c10d, name):
            signature = inspect.signature(getattr(c10d, name))
            install(name, lambda a, k, name=name, signature=signature: _collective(name, signature.bind(*a, **k)))
    # P2POp compares its operation with isend and irecv by identity: both modules get the same replacement.
    install("batch_isend_irecv", lambda a, k: _transfers(a[0] if a else k["p2p_op_list"]), _noting_waits(events))
    for name in ("send", "recv", "isend", "irecv"):
        signature = inspect.signature(getattr(c10d, name))
        install(name, lambda a, k, name=name, signature=signature: _single(name, signature.bind(*a, **k).arguments))
    try:
        yield events
    finally:
        for module, name, original in replaced:
            setattr(module, name, original)


def _noting_waits(events: list[Event]) -> Callable[[list[dist.Work]], list[Any]]:
    """Works that note when they are waited for, where what they stand for was posted."""

    def give(works: list[dist.Work]) -> list[Any]:
        last = events[-1]
        return [_NotedWork(w, events, len(events) - 1) for w in works] if last.posted else works  # type: ignore[union-attr]

    return give


@dataclass(frozen=True)
class _NotedWork:
    work: dist.Work
    events: list[Event]
    number: int

    def wait(self) -> None:
        if self.events[-1] != Wait(self.number):  # of several tensors that travel together
            self.events.append(Wait(self.number))
        self.work.wait()

    def is_completed(self) -> bool:
        return self.work.is_completed()


def _members(group: dist.ProcessGroup | None) -> tuple[tuple[int, ...], str]:
    handle = group if group is not None else dist.group.WORLD
    ranks = tuple(dist.get_process_group_ranks(handle))
    return ranks, handle.group_name


def _payloads(values: Any) -> tuple[Payload, ...]:
    if isinstance(values, Tensor):
        return (Payload(tuple(values.shape), str(values.dtype).removeprefix("torch.")),)
    if isinstance(values, (list, tuple)):
        return tuple(payload for value in values for payload in _payloads(value))
    return ()


def _collective(name: str, bound: Any) -> Event | None:
    arguments = bound.arguments
    ranks, group_name = _members(arguments.get("group"))
    if len(ranks) == 1:
        return None
    detail = [f"{key}={arguments[key]}" for key in ("src", "dst", "group_src", "group_dst", "op") if key in arguments]
    # Of a rooted collective only the root names the whole list; all_to_all's splits may differ between members.
    uniform = name not in ("gather", "scatter", "all_to_all", "all_to_all_single") and "object" not in name
    payloads = _payloads(list(arguments.values())) if uniform else ()
    return Collective(ranks, name, payloads, " ".join(detail), group_name)


def _transfers(operations: Sequence[dist.P2POp]) -> Event | None:
    ranks, group_name = _members(operations[0].group)
    me = dist.get_rank()
    transfers = []
    for operation in operations:
        ends = (me, operation.peer) if operation.op is dist.isend else (operation.peer, me)
        transfers.append(Transfer(*ends, _payloads(operation.tensor)[0]))
    posted = len({(t.source, t.target) for t in transfers}) == 1
    return Transfers(ranks, tuple(transfers), group_name, posted)


def _single(name: str, arguments: dict[str, Any]) -> Event:
    ranks, group_name = _members(arguments.get("group"))
    me, sends = dist.get_rank(), name.endswith("send")
    peer = arguments.get("dst" if sends else "src")
    assert peer is not None, "a transfer names its partner by global rank"
    ends = (me, peer) if sends else (peer, me)
    return Transfers(ranks, (Transfer(*ends, _payloads(arguments["tensor"])[0]),), group_name)
