"""Starts ranks on this machine when no launcher has, and stays with them until all have ended. No torch.

Each rank leads a session of its own, so a Ctrl-C reaches the launcher alone, which passes it on exactly once. Signals
are blocked while a rank starts and handled when it has its handlers: none is lost, none kills a half-started rank.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from megalm.errors import ExitCode
from megalm.launch.interfaces import loopback_alone
from megalm.launch.isolation import child_environment
from megalm.launch.logs import log_path
from megalm.launch.signals import INTERRUPTS_TO_KILL, STOP_SIGNALS
from megalm.launch.store import free_port_listener

_ORDERLY = (ExitCode.DONE, ExitCode.REQUEUE, ExitCode.INTERRUPTED)
"""Exit codes after which the other ranks are on their way out too, with things to finish."""

_EXPLAINED = (ExitCode.BAD_CONFIG, ExitCode.BAD_DATA, ExitCode.DIVERGED)
"""Exit codes of ranks that have told the user why in a line of their own."""

KEEPS_MEMORY = {
    "MALLOC_MMAP_THRESHOLD_": str(4 * 2**30),
    "MALLOC_TRIM_THRESHOLD_": str(4 * 2**30),
    "MALLOC_TOP_PAD_": str(64 * 2**20),
}
"""glibc's malloc (mallopt(3)) by default gives every freed tensor above 32 MiB, and the free end of the heap, back to
the kernel, so that a step begins by touching each page of its activations anew: a tenth to a fifth of a CPU step. With
these a rank keeps what one step needed for the next; its resident memory stays at its peak. A user's own values win."""

WORKER_MODULE = "megalm.launch.worker"

_POLL_SECONDS = 0.05
_GRACE_SECONDS = 5.0
"""What is left of a run has this long, after one rank failed, to write what it knows."""


@dataclass(frozen=True)
class LocalJob:
    """Ranks to start on this machine.

    Attributes:
        world_size: how many.
        threads_per_rank: OMP threads of each.
        run_dir: where their logs are.
        plan: what rank 0 reads from its standard input and tells the others: an ``Assignment``.
        module: what each rank runs, as ``python -m``.
        inherited: open files that ranks keep open: the lock of the run's folder is free when all of them have ended.
        output: descriptor that they print to; None: this process's standard output.
    """

    world_size: int
    threads_per_rank: int
    run_dir: Path
    plan: str
    module: str = WORKER_MODULE
    inherited: tuple[int, ...] = ()
    output: int | None = None


def run_local(job: LocalJob, say: Callable[[str], None]) -> int:
    """Run a job to its end.

    Args:
        job: what to start.
        say: shows a line to the user.

    Returns:
        0 when all ranks ended well, or else the exit code of the rank that failed first (128 + N where signal N did).
    """
    ranks = LocalRanks(say)
    with _forwarding(ranks.forward):
        with _blocked_signals():
            ranks.start(job)
        return ranks.wait(job.run_dir)


def exec_rank(
    module: str,
    arguments: Sequence[str],
    environment: dict[str, str],
    *,
    reads_plan: bool,
    descriptors: tuple[int, ...],
    output: int | None = None,
) -> subprocess.Popen[str]:
    """Start one rank, in a session of its own.

    Args:
        module: what it runs, as ``python -m``.
        arguments: of the module.
        environment: all of it.
        reads_plan: whether its standard input is a pipe from this process.
        descriptors: open files that it keeps.
        output: descriptor that it prints to; None: this process's standard output.
    """
    return subprocess.Popen(
        [sys.executable, "-m", module, *arguments],
        stdin=subprocess.PIPE if reads_plan else subprocess.DEVNULL,
        stdout=output,
        env=environment,
        pass_fds=descriptors,
        start_new_session=True,
        text=True,
    )


class LocalRanks:
    """The processes of a job.

    Args:
        say: shows a line to the user.
    """

    def __init__(self, say: Callable[[str], None]) -> None:
        self._say = say
        self._processes: list[subprocess.Popen[str]] = []
        self._interrupts = 0

    def start(self, job: LocalJob) -> None:
        """Start every rank; rank 0 inherits a listening socket, so that no other process can take its port."""
        listener = free_port_listener()
        port = listener.getsockname()[1]
        environment = child_environment({**KEEPS_MEMORY, **os.environ, "OMP_NUM_THREADS": str(job.threads_per_rank)})
        environment.update(loopback_alone(environment))
        for rank in range(job.world_size):
            arguments = [f"{rank}", f"{job.world_size}", f"{port}", f"{os.getpid()}"]
            own = (listener.fileno(),) if rank == 0 else ()
            self._processes.append(
                exec_rank(
                    job.module,
                    [*arguments, *map(str, own)],
                    environment,
                    reads_plan=rank == 0,
                    descriptors=(*job.inherited, *own),
                    output=job.output,
                )
            )
        listener.close()
        stdin = self._processes[0].stdin
        assert stdin is not None
        with contextlib.suppress(BrokenPipeError), stdin:  # a rank that died at once is noticed below
            stdin.write(job.plan)

    def forward(self, number: int) -> None:
        """Pass a signal on; the third interrupt ends the ranks at once."""
        if number == signal.SIGINT:
            self._interrupts += 1
            if self._interrupts >= INTERRUPTS_TO_KILL:
                self._say("ended without saving")
                self.kill()
                return
            again = "once more" if self._interrupts == INTERRUPTS_TO_KILL - 1 else "twice more"
            self._say(f"stopping after this step, then saving; Ctrl-C {again} ends at once, without saving")
        else:
            self._say(f"SIG{signal.Signals(number).name.removeprefix('SIG')}: stopping after this step, then saving")
        for process in self._running():
            process.send_signal(number)

    def wait(self, run_dir: Path) -> int:
        """Wait until all ranks have ended; a rank that fails takes the others with it."""
        try:
            failed = self._wait_for_end_or_failure()
            if failed is None:
                return max((process.returncode for process in self._processes), default=0)
            if self._interrupts >= INTERRUPTS_TO_KILL:
                return ExitCode.INTERRUPTED
            code = self._processes[failed].returncode
            if code not in _EXPLAINED:
                self._say(f"rank {failed} {_in_words(code)}; its log: {log_path(run_dir, failed)}")
            self._wait_until(time.monotonic() + _GRACE_SECONDS)
            return code if code >= 0 else 128 - code
        finally:
            self.kill()

    def _wait_for_end_or_failure(self) -> int | None:
        """The first rank that fails; None when all have ended well."""
        while True:
            running = self._running()  # before looking for failures, so that none is missed
            for rank, process in enumerate(self._processes):
                if process.returncode is not None and process.returncode not in _ORDERLY:
                    return rank
            if not running:
                return None
            time.sleep(_POLL_SECONDS)

    def _wait_until(self, deadline: float) -> None:
        while self._running() and time.monotonic() < deadline:
            time.sleep(_POLL_SECONDS)

    def _running(self) -> list[subprocess.Popen[str]]:
        return [process for process in self._processes if process.poll() is None]

    def first_failure(self) -> str | None:
        """What became of the first rank that has failed, in words; None: all run, or have ended well."""
        self._running()
        for rank, process in enumerate(self._processes):
            if process.returncode is not None and process.returncode not in _ORDERLY:
                return f"rank {rank} {_in_words(process.returncode)}"
        return None

    def wait_until_ended(self, seconds: float) -> None:
        """Wait for all ranks to end by themselves, so long at most."""
        self._wait_until(time.monotonic() + seconds)

    def kill(self) -> None:
        """End what still runs, and what it has started."""
        for process in self._running():
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
        for process in self._processes:
            process.wait()


def _in_words(code: int) -> str:
    if code == -signal.SIGKILL:
        return "was killed (SIGKILL): somebody's kill, or the machine ran out of memory"
    return f"was killed by {signal.Signals(-code).name}" if code < 0 else f"failed with exit code {code}"


@contextlib.contextmanager
def _forwarding(forward: Callable[[int], None]) -> Iterator[None]:
    """Signals to this process go to ``forward``; a terminal that hangs up is no reason to stop, nor for its ranks."""

    def handle(number: int, frame: FrameType | None) -> None:  # noqa: ARG001 - a signal handler's signature
        forward(number)

    before = {number: signal.signal(number, handle) for number in STOP_SIGNALS}
    before[signal.SIGHUP] = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # which processes started meanwhile inherit
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def _blocked_signals() -> Iterator[None]:
    """Hold stop signals back; processes started meanwhile inherit that until they install their handlers."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
