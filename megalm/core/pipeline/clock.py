"""How long a rank works and waits in a pass over its micro-batches.

On the CPU the host's clock says it. On CUDA the host only issues work, so events on the stream of the computation say
it, and are read when they have happened: nothing waits for them. Who reads a pass right after it was issued is told of
the one before; who reads it a step later is told of the pass itself.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch


@dataclass(frozen=True)
class Timing:
    """What of a pass was work.

    Attributes:
        busy_seconds: time spent computing.
        total_seconds: time from the first action to the last.
    """

    busy_seconds: float = 0.0
    total_seconds: float = 0.0

    @property
    def waiting_seconds(self) -> float:
        """Time spent waiting for other ranks, and between actions."""
        return max(0.0, self.total_seconds - self.busy_seconds)

    @property
    def bubble_fraction(self) -> float:
        """Fraction of the pass that was not work; 0 where nothing is known yet."""
        return self.waiting_seconds / self.total_seconds if self.total_seconds else 0.0


class PassTimer(Protocol):
    """Times one pass; made when it begins."""

    def work_begins(self) -> None:
        """What follows is work."""

    def work_ends(self) -> None:
        """The work since :meth:`work_begins` is done, or issued."""

    def pass_ends(self) -> None:
        """All of the pass is done, or issued."""

    def timing(self) -> Timing:
        """This pass, or the latest before it that is known; never waits. After :meth:`pass_ends`."""


class Clock(Protocol):
    """Times passes."""

    def start(self) -> PassTimer:
        """A pass begins."""


class HostClock:
    """Times what the host does itself."""

    def start(self) -> PassTimer:
        """A pass begins."""
        return _HostTimer()


class _HostTimer:
    def __init__(self) -> None:
        self._started = self._since = time.perf_counter()
        self._busy = self._total = 0.0

    def work_begins(self) -> None:
        self._since = time.perf_counter()

    def work_ends(self) -> None:
        self._busy += time.perf_counter() - self._since

    def pass_ends(self) -> None:
        self._total = time.perf_counter() - self._started

    def timing(self) -> Timing:
        return Timing(self._busy, self._total)


class Event(Protocol):
    """A mark in the stream of a device, such as ``torch.cuda.Event(enable_timing=True)``."""

    def record(self) -> None:
        """Put the mark after what has been issued."""

    def query(self) -> bool:
        """Whether the device has come to it; does not wait."""

    def elapsed_time(self, end_event: Any, /) -> float:
        """Milliseconds from this mark to a later one; both have been reached."""


class EventClock:
    """Times what a device does, by events on its current stream.

    Args:
        make_event: makes one; events are used again after they have been read.
    """

    def __init__(self, make_event: Callable[[], Event]) -> None:
        self._make_event = make_event
        self._free: list[Event] = []
        self._newest: _EventTimer | None = None
        self._passes = 0
        self._known: tuple[int, Timing] = (0, Timing())

    def start(self) -> PassTimer:
        """A pass begins; the one before it is read if the device has finished it."""
        if self._newest is not None:
            self._newest.timing()
        self._passes += 1
        self._newest = _EventTimer(self, self._passes)
        return self._newest

    def mark(self) -> Event:
        """An event here and now."""
        event = self._free.pop() if self._free else self._make_event()
        event.record()
        return event

    def learn(self, number: int, timing: Timing, events: list[Event]) -> None:
        """A pass has been read; its events are free."""
        self._free += events
        if number > self._known[0]:
            self._known = number, timing

    @property
    def latest(self) -> Timing:
        """The latest pass that has been read."""
        return self._known[1]


class _EventTimer:
    def __init__(self, clock: EventClock, number: int) -> None:
        self._clock = clock
        self._number = number
        self._events = [clock.mark()]
        self._timing: Timing | None = None
        self._is_over = False

    def work_begins(self) -> None:
        self._events.append(self._clock.mark())

    def work_ends(self) -> None:
        self._events.append(self._clock.mark())

    def pass_ends(self) -> None:
        self._events.append(self._clock.mark())
        self._is_over = True

    def timing(self) -> Timing:
        if self._timing is None and self._is_over and self._events[-1].query():
            first, *work, last = self._events
            busy = sum(begin.elapsed_time(end) for begin, end in zip(work[::2], work[1::2], strict=True))
            self._timing = Timing(1e-3 * busy, 1e-3 * first.elapsed_time(last))
            self._clock.learn(self._number, self._timing, self._events)
            self._events = []
        return self._clock.latest if self._timing is None else self._timing


def make_clock(device: torch.device) -> Clock:
    """The clock of a device. It is asked what it is, not what it stands for: a dry run's has no events."""
    if device.type == "cuda":
        return EventClock(lambda: torch.cuda.Event(enable_timing=True))
    return HostClock()
