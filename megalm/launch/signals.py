"""Signals that ask a run to stop. No torch: handlers are installed before torch, which takes seconds, is imported.

A handler only sets a flag. The trainer agrees on it across ranks after each step, saves, and leaves: saving inside a
handler would save a half-updated state.
"""

from __future__ import annotations

import signal
from collections.abc import Callable
from types import FrameType

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
"""INT is a person; the others come from a scheduler and mean that the job will be queued again."""

INTERRUPTS_TO_KILL = 3
"""The first Ctrl-C stops a run in order; a person who presses it this often wants it gone."""


class StopRequest:
    """Whether this process has been asked to stop."""

    def __init__(self) -> None:
        self._first: str | None = None
        self._interrupts = 0
        self.received = 0
        """How many signals have come."""
        self._last_wishes: list[Callable[[], object]] = []

    @classmethod
    def install(cls) -> StopRequest:
        """Handle :data:`STOP_SIGNALS` from now on, those included that were held back while the process started."""
        request = cls()
        for number in STOP_SIGNALS:
            signal.signal(number, request._receive)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
        return request

    def pending(self) -> str | None:
        """``INT``, ``TERM``, ``USR1`` or ``USR2``, whichever came first; None if nothing has come."""
        return self._first

    def before_sudden_end(self, wish: Callable[[], object]) -> None:
        """Have something done, in a limited time, should this process be ended while its main thread is stuck."""
        self._last_wishes.append(wish)

    def fulfil_last_wishes(self) -> None:
        """Do what was asked for by :meth:`before_sudden_end`; in any thread."""
        for wish in self._last_wishes:
            wish()

    def _receive(self, number: int, frame: FrameType | None) -> None:  # noqa: ARG002 - a signal handler's signature
        self.received += 1
        if self._first is None:
            self._first = signal.Signals(number).name.removeprefix("SIG")
        if number == signal.SIGINT:
            self._interrupts += 1
            if self._interrupts == INTERRUPTS_TO_KILL - 1:
                signal.signal(signal.SIGINT, signal.SIG_DFL)  # a rank that hangs in a collective runs no handler
