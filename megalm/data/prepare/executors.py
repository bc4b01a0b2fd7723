"""Where blocks are worked on: this process, processes of this machine, or the ranks of an MPI job."""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

from megalm.errors import DataError

Item = TypeVar("Item")
Result = TypeVar("Result")
_AHEAD = 3
"""Tasks in flight per worker: enough that none waits, few enough to hold in memory."""


@dataclass(frozen=True)
class Workers:
    """Runs a function over many items.

    Attributes:
        executor: None: in this process.
        count: how many run at once.
    """

    executor: Executor | None
    count: int

    def map(self, function: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
        """Results in the order of the items; only a few items are held at a time.

        Raises:
            DataError: a worker was killed.
        """
        if self.executor is None:
            yield from map(function, items)
            return
        in_flight: deque[Future[Result]] = deque()
        try:
            for item in items:
                in_flight.append(self.executor.submit(function, item))
                if len(in_flight) > _AHEAD * self.count:
                    yield in_flight.popleft().result()
            while in_flight:
                yield in_flight.popleft().result()
        except BrokenProcessPool:
            raise DataError(
                f"--workers {self.count}: a worker process was killed, most likely for memory; use fewer workers. "
                "The same command goes on where this one ended"
            ) from None
        finally:
            for future in in_flight:
                future.cancel()


@contextmanager
def local_workers(count: int) -> Iterator[Workers]:
    """``count`` processes of this machine; of one, this process."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one process per core; threads inside each would only compete
    if count <= 1:
        yield Workers(None, 1)
        return
    # Spawned, not forked: forked children inherit the library's threads.
    # An executor, not a multiprocessing.Pool: when a worker is killed (out of memory), a Pool waits for ever.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(count, context, initializer=_ignore_interrupts) as executor:
        try:
            yield Workers(executor, count)
        except BaseException:
            executor.shutdown(wait=False, cancel_futures=True)
            raise


@contextmanager
def mpi_workers() -> Iterator[Workers | None]:
    """The other ranks of an MPI job (mpirun, ``srun --mpi=pmix``); None on those ranks themselves, once all is done.

    Raises:
        DataError: MPI cannot be loaded, or there is only one rank.
    """
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    try:
        from mpi4py import MPI
        from mpi4py.futures import MPICommExecutor
    except (ImportError, RuntimeError) as error:
        raise DataError(
            f"--executor mpi: MPI cannot be loaded ({error}); load an MPI module, or leave it out"
        ) from None
    if MPI.COMM_WORLD.size < 2:
        raise DataError("--executor mpi: this is the only rank; start it with mpirun -n N or srun --mpi=pmix")
    with MPICommExecutor(MPI.COMM_WORLD, root=0) as pool:
        executor: Any = pool
        yield None if executor is None else Workers(executor, MPI.COMM_WORLD.size - 1)


def _ignore_interrupts() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent alone reports it
