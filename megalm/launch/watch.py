"""Ends a rank whose peer has failed, where nothing else would: its collective may wait for that peer for ever.

gloo notices a lost peer at once, by its closed connection. NCCL's kernels wait until the timeout of the collective, ten
minutes or more, on every GPU of the job. A rank that fails therefore records it in the store, and a thread of every
other rank looks there, about once a second. Where the main thread is not on its way out already, the thread aborts
NCCL's communicators, which ends the collective with an error; if that does not help either (the main thread may be
anywhere), the thread gives a checkpoint that is being written its time, and ends the process. The exit code is the
failed rank's, as that of a rank that has heard of it in any other way. No torch.

What the store cannot tell: a rank that was killed without a word. Launchers notice that; so does every peer with a
connection to it, which then records the loss for the others.
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable
from typing import Any, Protocol

from megalm.launch.discovery import RankInfo

_LOOKS_PER_SECOND = 2000
"""Most that all ranks together ask the store for: the interval grows with their number."""

GRACE_SECONDS = 2.0
"""How long the main thread has to notice by itself, or to end after the communicators were aborted."""

ABORT_SECONDS = 10.0
"""Longest that aborting may take; NCCL's own may wait for the network."""

Failure = tuple[int, int]
"""(rank, exit code) of the rank that failed first."""


class FailureBoard(Protocol):
    """Where failures are recorded."""

    def known_failure(self) -> Failure | None:
        """The first one; None: none is known. The loss of the store itself is one."""


def interval_seconds(world_size: int) -> float:
    """How long a rank sleeps between two looks: 1 s up to 2,000 ranks, 8 s for 16,384."""
    return max(1.0, world_size / _LOOKS_PER_SECOND)


class FailureWatch:
    """Looks for a failure of another rank; see the module's description.

    Args:
        rank: this rank.
        board: where failures are recorded, asked by the thread alone.
        abort: ends collectives that are under way, with an error in the threads that wait for them; whether there was
            something to end. Called in a thread of its own.
        last_wish: what is done before the process is ended, in a limited time.
        log: takes a line.
        leave: ends the process with an exit code.
        interval: seconds between two looks; None: by the number of ranks.
        grace: see :data:`GRACE_SECONDS`.
    """

    def __init__(
        self,
        rank: RankInfo,
        board: FailureBoard,
        *,
        abort: Callable[[], bool],
        last_wish: Callable[[], None],
        log: Callable[[str], None],
        leave: Callable[[int], Any] = os._exit,
        interval: float | None = None,
        grace: float = GRACE_SECONDS,
    ) -> None:
        self._rank, self._board = rank, board
        self._abort, self._last_wish, self._log, self._leave = abort, last_wish, log, leave
        self._interval = interval_seconds(rank.world_size) if interval is None else interval
        self._grace = grace
        self._leaving = threading.Event()
        self._thread = threading.Thread(target=self._run, name="failure-watch", daemon=True)

    def start(self) -> None:
        """Begin to look."""
        if self._rank.world_size > 1:
            self._thread.start()

    def stop(self) -> None:
        """The main thread is on its way out, and ends the process itself."""
        self._leaving.set()

    @property
    def seconds_to_learn(self) -> float:
        """How long it takes at most until every rank has looked, and its main thread has been ended."""
        return self._interval + self._grace

    def _run(self) -> None:
        first = self._interval * (self._rank.rank % 1000) / 1000  # not all ranks at the same moment
        pause = first
        while not self._leaving.wait(pause):
            failure = self._board.known_failure()
            if failure is not None:
                if failure[0] != self._rank.rank:
                    self._end(*failure)
                return
            pause = self._interval

    def _end(self, failed: int, code: int) -> None:
        """End this process, or see the main thread end it."""
        if self._leaving.wait(self._grace):
            return
        if self._has_aborted() and self._leaving.wait(self._grace):
            return
        try:
            self._last_wish()
        except Exception as error:
            self._log(f"{type(error).__name__}: {error}\n")
        self._log(f"rank {failed} failed (exit code {code}), and this rank waits in vain: it ends, too\n")
        sys.stdout.flush()
        sys.stderr.flush()
        self._leave(code)

    def _has_aborted(self) -> bool:
        """Abort, for a limited time; False: there was nothing to abort."""
        outcome = [True]

        def run() -> None:
            try:
                outcome[0] = self._abort()
            except Exception as error:  # whatever state NCCL is in, the process ends
                self._log(f"communicators: {type(error).__name__}: {error}\n")

        thread = threading.Thread(target=run, name="abort", daemon=True)
        thread.start()
        thread.join(ABORT_SECONDS)
        return outcome[0]
