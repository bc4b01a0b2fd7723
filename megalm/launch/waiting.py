"""Waiting for other ranks: said after a while, and ended at once by a signal. No torch.

The store's C++ calls run no Python while they wait, so no signal handler: such a call goes to a thread, and this one
looks after signals and tells the user what it waits for. One call stays one request, however long it takes.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import TypeVar

from megalm.errors import ExitCode, MegalmError
from megalm.launch.discovery import SRUN, RankInfo, variables_of
from megalm.launch.signals import StopRequest

Result = TypeVar("Result")

_POLL_SECONDS = 0.1
_FIRST_LINE_SECONDS = 5.0
_FIRST_LINE_OF_MANY_SECONDS = 60.0
_FEW = 8
"""Ranks that say after 5 s what they wait for; a thousand that wait for a slow rank 0 would fill the console."""


class StoppedError(MegalmError):
    """A signal ended this rank while it waited for others: nothing had begun, so there is nothing to save."""

    def __init__(self, name: str, launcher: str) -> None:
        # SLURM queues a job again that it has stopped: with INTERRUPTED, slurm/train.sbatch would end it for good.
        is_schedulers = name in ("USR1", "USR2") or (name == "TERM" and launcher == SRUN)
        self.exit_code = ExitCode.REQUEUE if is_schedulers else ExitCode.INTERRUPTED
        super().__init__(f"stopped by SIG{name} while waiting for other ranks; nothing was begun")


@dataclass(frozen=True)
class Patience:
    """How a rank waits.

    Attributes:
        rank: this rank.
        stop: signals that it has received; None: nobody looks.
        say: shows a line to the user.
        environ: where the launcher's variables are.
        ignored: signals, of those received, that end no wait.
    """

    rank: RankInfo
    stop: StopRequest | None = None
    say: Callable[[str], None] = lambda _: None
    environ: Mapping[str, str] = field(default_factory=lambda: os.environ)
    ignored: int = 0

    def anew(self) -> Patience:
        """The same, deaf to signals that have come already: those have had their effect."""
        return replace(self, ignored=0 if self.stop is None else self.stop.received)

    def check(self) -> None:
        """Raise :class:`StoppedError` if a signal has come."""
        if self.stop is not None and self.stop.received > self.ignored:
            raise StoppedError(self.stop.pending() or "", self.rank.launcher)

    def reminder(self, what: Callable[[], str]) -> Callable[[], None]:
        """A function to call often: says what is waited for after 5 s, and again at growing intervals."""
        first = _FIRST_LINE_SECONDS if self.rank.rank < _FEW else _FIRST_LINE_OF_MANY_SECONDS
        began, due = time.monotonic(), [first]

        def remind() -> None:
            if time.monotonic() - began >= due[0]:
                due[0] *= 2
                self.say(f"waiting for {what()} ({how_to_be_alone(self.environ)})")

        return remind

    def call(self, function: Callable[[], Result], what: Callable[[], str] | None = None) -> Result:
        """The result of a call that may wait for other ranks, in a thread; its exceptions are raised here.

        Args:
            function: the call.
            what: what it waits for, in words; None: nothing is said of it.

        Raises:
            StoppedError: a signal came first; the call is left alone, and nothing else may be asked of its store.
        """
        outcome: list[Result] = []
        errors: list[BaseException] = []

        def run() -> None:
            try:
                outcome.append(function())
            except BaseException as error:
                errors.append(error)

        remind = None if what is None else self.reminder(what)
        thread = threading.Thread(target=run, name="waiting", daemon=True)
        thread.start()
        while True:
            thread.join(_POLL_SECONDS)  # a signal's handler runs meanwhile
            if not thread.is_alive():
                break
            self.check()
            if remind is not None:
                remind()
        if errors:
            raise errors[0]
        return outcome[0]

    def missing(self, count: int) -> str:
        """``1 of 2 ranks at HOST:PORT``."""
        return f"{count} of {self.rank.world_size} ranks at {self.rank.master_addr}:{self.rank.master_port}"


def how_to_be_alone(environ: Mapping[str, str]) -> str:
    """What makes this process one rank of several, and how to go without."""
    if "TORCHELASTIC_RUN_ID" in environ:  # set by a torchrun that is alive, not left over
        return "torchrun has started this rank; its --nproc-per-node and --nnodes say how many there are"
    told, unset = variables_of(environ)
    off = " ".join(f"-u {name}" for name in unset)
    return f"{told} are set in this shell; `env {off} megalm train …` starts own ranks"
