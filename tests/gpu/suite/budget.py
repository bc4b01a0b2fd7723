"""Parts of the suite within a budget of time: what does not fit is left out, and said."""

from __future__ import annotations

import signal
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TextIO

PASSED, FAILED, SKIPPED = "passed", "FAILED", "skipped"


class SkippedError(Exception):
    """A part cannot be tried here; the message says why."""


@dataclass(frozen=True)
class Part:
    """Something to try.

    Attributes:
        name: in words.
        seconds: longest that it may take.
        run: tries it; what it returns is shown beside its name.
    """

    name: str
    seconds: float
    run: Callable[[], str]


@dataclass(frozen=True)
class Result:
    """What came of a part.

    Attributes:
        name: of the part.
        outcome: ``passed``, ``FAILED`` or ``skipped``.
        seconds: that it took.
        detail: what was found, why it failed, or why it was skipped.
    """

    name: str
    outcome: str
    seconds: float
    detail: str

    def __str__(self) -> str:
        return f"{self.outcome:<8} {self.seconds:6.1f} s  {self.name:<34} {self.detail}"


def run_parts(
    parts: Sequence[Part], seconds: float, show: TextIO, clock: Callable[[], float] = time.monotonic
) -> list[Result]:
    """Try parts in order while time is left; each result is shown as it comes.

    Args:
        parts: what to try.
        seconds: for all of them.
        show: where a line per part is written.
        clock: seconds, monotonic.
    """
    results = []
    end = clock() + seconds
    for part in parts:
        results.append(_try(part, end - clock(), clock))
        print(results[-1], file=show, flush=True)
    return results


def _try(part: Part, left: float, clock: Callable[[], float]) -> Result:
    if left < part.seconds:
        return Result(part.name, SKIPPED, 0.0, f"{max(left, 0):.0f} s are left, it may take {part.seconds:.0f}")
    began = clock()
    try:
        with _at_most(part.seconds):
            outcome, detail = PASSED, part.run()
    except SkippedError as error:
        outcome, detail = SKIPPED, str(error)
    except Exception as error:
        lines = traceback.format_exception(error)
        outcome, detail = FAILED, f"{type(error).__name__}: {error}\n{''.join(lines[-3:])}".rstrip()
    return Result(part.name, outcome, clock() - began, detail)


@contextmanager
def _at_most(seconds: float) -> Iterator[None]:
    """Raise TimeoutError in the body when it takes longer; a call that does not return to Python is not ended."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def ring(*_: object) -> None:
        raise TimeoutError(f"longer than {seconds:.0f} s")

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0.0)
        signal.signal(signal.SIGALRM, before)
