"""Runs a Python function on gloo ranks of this machine, several items per start, with nothing printed to the console.

For proofs, benchmarks and tests, whose work is a function and not a job of the command line. Ranks are spawned, never
forked: a forked process inherits torch's threads and locks and may hang. What a rank prints is kept, and shown only if
it fails; if ranks take too long, the failure includes the stacks of all of them. Ranks alone import torch.
"""

from __future__ import annotations

import faulthandler
import gc
import multiprocessing
import os
import pickle
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, Protocol

from megalm.launch.interfaces import loopback_alone

_LOG_CHARACTERS = 4000
_GRACE_SECONDS = 1.0
"""How long the other ranks of a failed world have to write down their own failure, or their stacks."""


class RankProcess(Protocol):
    """What this module needs of the process of a rank; ``multiprocessing.Process`` has it."""

    @property
    def pid(self) -> int | None:
        """Its number."""

    @property
    def exitcode(self) -> int | None:
        """None while it runs; minus the signal that killed it."""

    def is_alive(self) -> bool:
        """Whether it runs."""

    def kill(self) -> None:
        """End it at once; nothing happens to one that has ended."""

    def join(self) -> None:
        """Wait until it has ended."""


StartRank = Callable[[Callable[..., None], tuple[Any, ...]], RankProcess]
"""(target, arguments) ▶ a process that calls ``target(*arguments)``."""


@dataclass(frozen=True)
class RankFailure:
    """Why a world of ranks did not give a result.

    Attributes:
        summary: one line.
        report: what each rank that failed had to say.
    """

    summary: str
    report: str


def run_on_ranks(
    world_size: int,
    function: Callable[[Any], Any],
    items: Sequence[Any],
    *,
    timeout_seconds: float = 300.0,
    start: StartRank | None = None,
) -> list[list[Any] | RankFailure]:
    """Call ``function(item)`` for each item, in order, on ``world_size`` ranks of an initialised gloo world.

    A failure costs its own item alone: the ranks are started anew for those after it.

    Args:
        world_size: ranks.
        function: importable, defined at the top of a module.
        items: picklable.
        timeout_seconds: longest that all items of one start may take.
        start: starts the process of a rank; None: :func:`spawn_rank`.

    Returns:
        For each item the results by rank, or why there are none.
    """
    results: list[list[Any] | RankFailure] = []
    while len(results) < len(items):
        results += _run_until_failure(world_size, function, items[len(results) :], timeout_seconds, start)
    return results


def call_on_ranks(
    world_size: int,
    function: Callable[..., Any],
    *args: Any,
    timeout_seconds: float = 300.0,
    start: StartRank | None = None,
) -> list[Any]:
    """Call ``function(*args)`` once on every rank; the results by rank. Arguments as for :func:`run_on_ranks`.

    Raises:
        RuntimeError: ranks failed or took too long, with what each of them reports.
    """
    (results,) = run_on_ranks(
        world_size, partial(_apply, function), [args], timeout_seconds=timeout_seconds, start=start
    )
    if isinstance(results, RankFailure):
        raise RuntimeError(f"{results.summary}\n{results.report}")
    return results


def _apply(function: Callable[..., Any], args: tuple[Any, ...]) -> Any:
    return function(*args)


def spawn_rank(target: Callable[..., None], arguments: tuple[Any, ...]) -> BaseProcess:
    """A new Python that calls ``target(*arguments)``; it ends with this process."""
    process = multiprocessing.get_context("spawn").Process(target=target, args=arguments, daemon=True)
    process.start()
    return process


def _run_until_failure(
    world_size: int,
    function: Callable[[Any], Any],
    items: Sequence[Any],
    timeout_seconds: float,
    start: StartRank | None,
) -> list[list[Any] | RankFailure]:
    with tempfile.TemporaryDirectory(prefix="megalm-ranks-") as name:
        folder = Path(name)
        with _one_thread_each():
            processes = [
                (start or spawn_rank)(_rank_main, (rank, world_size, name, function, list(items)))
                for rank in range(world_size)
            ]
        try:
            failure = _wait(processes, folder, timeout_seconds)
        finally:
            for process in processes:
                process.kill()
                process.join()
        results: list[list[Any] | RankFailure] = []
        for item in range(len(items)):
            files = [_result_file(folder, rank, item) for rank in range(world_size)]
            if not all(file.exists() for file in files):
                return [*results, failure or RankFailure("a rank ended without a result", "")]
            results.append([pickle.loads(file.read_bytes()) for file in files])
        return results


@contextmanager
def _one_thread_each() -> Iterator[None]:
    """Many ranks share few cores; read by OpenMP when a process that starts inside loads it."""
    before = os.environ.get("OMP_NUM_THREADS")
    os.environ["OMP_NUM_THREADS"] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ["OMP_NUM_THREADS"]
        else:
            os.environ["OMP_NUM_THREADS"] = before


def _wait(processes: Sequence[RankProcess], folder: Path, timeout_seconds: float) -> RankFailure | None:
    """Until all ranks have ended, one has failed, or time is up."""
    deadline = time.monotonic() + timeout_seconds
    while any(process.is_alive() for process in processes):
        time.sleep(0.02)
        if any(process.exitcode not in (None, 0) for process in processes):
            time.sleep(_GRACE_SECONDS)
            break
        if time.monotonic() > deadline:
            for process in processes:
                if process.is_alive() and process.pid is not None:
                    os.kill(process.pid, signal.SIGUSR2)
            time.sleep(_GRACE_SECONDS)
            return RankFailure(f"no result after {timeout_seconds:.0f} s", _report(folder, len(processes)))
    codes = [process.exitcode for process in processes]
    if not any(codes):
        return None
    errors = {rank: file for rank in range(len(codes)) if (file := folder / f"error-{rank}").exists()}
    report = _report(folder, len(processes))
    silent = [rank for rank, code in enumerate(codes) if code and rank not in errors]
    if silent:  # killed, or crashed outside Python: whatever the others say came of it
        return RankFailure(f"rank {silent[0]} ended with exit code {codes[silent[0]]}", report)
    # The one that failed first; the others lost their connection to it.
    rank = min(errors, key=lambda rank: errors[rank].stat().st_mtime_ns)
    line = errors[rank].read_text(encoding="utf-8").strip().splitlines()[-1]
    return RankFailure(f"rank {rank}: {line}", report)


def _report(folder: Path, world_size: int) -> str:
    parts = []
    for rank in range(world_size):
        for kind in ("error", "stack", "log"):
            file = folder / f"{kind}-{rank}"
            text = file.read_text(encoding="utf-8", errors="replace").strip() if file.exists() else ""
            if text:
                parts.append(f"--- rank {rank}: {kind} ---\n{text[-_LOG_CHARACTERS:]}")
    return "\n".join(parts)


def _result_file(folder: Path, rank: int, item: int) -> Path:
    return folder / f"result-{rank}-{item}"


def _rank_main(rank: int, world_size: int, name: str, function: Callable[[Any], Any], items: list[Any]) -> None:
    folder = Path(name)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole terminal; the parent ends its ranks
    log = os.open(folder / f"log-{rank}", os.O_WRONLY | os.O_CREAT)
    os.dup2(log, 1)
    os.dup2(log, 2)
    stack = (folder / f"stack-{rank}").open("w")
    faulthandler.register(signal.SIGUSR2, file=stack, all_threads=True)
    os.environ["DS_ACCELERATOR"] = "cpu"
    os.environ.update(loopback_alone(os.environ))
    try:
        import torch
        import torch.distributed as dist

        torch.set_num_threads(1)
        store = dist.FileStore(str(folder / "store"), world_size)
        for number, item in enumerate(items):
            with _world(dist.PrefixStore(str(number), store), rank, world_size):
                result = pickle.dumps(function(item))
                partial = folder / f"partial-{rank}"
                partial.write_bytes(result)
                partial.rename(_result_file(folder, rank, number))
        code = 0
    except BaseException:
        (folder / f"error-{rank}").write_text(traceback.format_exc(), encoding="utf-8")
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # no rank waits in a collective for one that failed, and gloo's threads end with the process


@contextmanager
def _world(store: Any, rank: int, world_size: int) -> Iterator[None]:
    """A gloo world for one item, whose groups end with it unless something still refers to them.

    Each group of gloo has a thread that wakes a hundred times a second, and two more: with those of twenty layouts a
    rank spent two fifths of its time on them.
    """
    import torch.distributed as dist

    dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size, timeout=timedelta(seconds=120))
    yield
    dist.barrier()
    dist.destroy_process_group()
    gc.collect()  # an engine and its groups refer to each other
