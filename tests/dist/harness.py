"""Runs a function on spawned gloo ranks, many checks per spawn.

Ranks are spawned, never forked: a forked process inherits torch's threads and locks and may hang. Each world finds its
own free port by binding to port 0. If the ranks take too long, the stacks of all of them are printed before they are
ended.
"""

from __future__ import annotations

import faulthandler
import os
import pickle
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch.multiprocessing as mp


def run_ranks(world_size: int, function: Callable[..., Any], *args: Any, timeout_seconds: float = 180.0) -> list[Any]:
    """Call ``function(*args)`` on ``world_size`` ranks of an initialised gloo world; returns the results by rank.

    ``function`` must be importable (defined at the top of a module). The first failing rank's traceback is raised.
    """
    with tempfile.TemporaryDirectory() as folder:
        context = mp.get_context("spawn")
        old_path = os.environ.get("PYTHONPATH")
        os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(Path(__file__).parent), old_path]))
        try:
            processes = [
                context.Process(target=_rank_main, args=(r, world_size, folder, function, args))
                for r in range(world_size)
            ]
            for process in processes:
                process.start()
        finally:
            if old_path is None:
                del os.environ["PYTHONPATH"]
            else:
                os.environ["PYTHONPATH"] = old_path
        _wait(processes, Path(folder), timeout_seconds)
        return [pickle.loads((Path(folder) / f"result-{rank}").read_bytes()) for rank in range(world_size)]


def _wait(processes: list[Any], folder: Path, timeout_seconds: float) -> None:
    deadline = time.monotonic() + timeout_seconds
    failed = timed_out = False
    while any(process.is_alive() for process in processes):
        time.sleep(0.02)
        failed = any(process.exitcode not in (None, 0) for process in processes)
        timed_out = time.monotonic() > deadline
        if failed or timed_out:
            if timed_out:
                _request_stacks(processes)
            for process in processes:
                process.kill()
            break
    for process in processes:
        process.join()
    failed = failed or any(process.exitcode != 0 for process in processes)
    if failed or timed_out:
        errors = "\n".join(
            f"--- rank {rank} ---\n{text}"
            for rank in range(len(processes))
            for name in (f"error-{rank}", f"stack-{rank}")
            if (folder / name).exists() and (text := (folder / name).read_text())
        )
        reason = f"timed out after {timeout_seconds:.0f} s" if timed_out else "failed"
        codes = [process.exitcode for process in processes]
        raise AssertionError(f"ranks {reason}, exit codes {codes}\n{errors}")


def _request_stacks(processes: list[Any]) -> None:
    import signal

    for process in processes:
        if process.is_alive():
            os.kill(process.pid, signal.SIGUSR2)
    time.sleep(1.0)


def _rank_main(rank: int, world_size: int, folder: str, function: Callable[..., Any], args: tuple[Any, ...]) -> None:
    os.environ["OMP_NUM_THREADS"] = "1"
    import signal

    stack_file = (Path(folder) / f"stack-{rank}").open("w")
    faulthandler.register(signal.SIGUSR2, file=stack_file, all_threads=True)

    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    try:
        store = dist.FileStore(str(Path(folder) / "store"), world_size)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size, timeout=timedelta(seconds=120))
        result = function(*args)
        (Path(folder) / f"result-{rank}").write_bytes(pickle.dumps(result))
        dist.barrier()
        dist.destroy_process_group()
        sys.stdout.flush()
        os._exit(0)  # gloo's threads may outlive the interpreter's teardown and abort a process that has succeeded
    except BaseException:
        (Path(folder) / f"error-{rank}").write_text(traceback.format_exc())
        sys.stderr.flush()
        os._exit(1)  # no rank may wait for this one in a collective
