"""Writes several files at once in threads: reading, writing and hashing release the interpreter lock."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait

MOST_THREADS = 8
"""Maximum threads; more would only wait for the disk."""


def run_all(tasks: Sequence[Callable[[], object]], *, cancel: Callable[[], None]) -> None:
    """Run tasks in threads until all are done; the first error, or Ctrl-C, cancels the others and is raised."""
    threads = min(len(tasks), os.cpu_count() or 1, MOST_THREADS)
    with ThreadPoolExecutor(max(threads, 1)) as pool:
        futures = [pool.submit(task) for task in tasks]
        try:
            done, _ = wait(futures, return_when=FIRST_EXCEPTION)
            failed = next((future for future in futures if future in done and future.exception()), None)
            if failed is not None:
                failed.result()
        except BaseException:
            cancel()
            for future in futures:
                future.cancel()
            raise
