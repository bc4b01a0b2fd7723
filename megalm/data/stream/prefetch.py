"""Runs an iterator in a background thread, a few items ahead."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator
from typing import Generic, TypeVar

Item = TypeVar("Item")


class Prefetcher(Generic[Item]):
    """Takes items from an iterator ahead of time; an exception of the iterator is raised by :meth:`take`.

    Args:
        items: an endless iterator; run in the thread alone.
        depth: items that are kept ready.
    """

    def __init__(self, items: Iterator[Item], depth: int) -> None:
        self._queue: queue.Queue[Item | BaseException] = queue.Queue(maxsize=depth)
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, args=(items,), name="megalm-data", daemon=True)
        self._thread.start()

    def take(self) -> Item:
        """The next item."""
        item = self._queue.get()
        if isinstance(item, BaseException):
            self._queue.put(item)  # so that later calls raise it too instead of waiting forever
            raise item
        return item

    def close(self) -> None:
        """End the thread."""
        self._stopped.set()
        while self._thread.is_alive():
            try:
                self._queue.get_nowait()
            except queue.Empty:
                self._thread.join(timeout=0.05)

    def _run(self, items: Iterator[Item]) -> None:
        try:
            for item in items:
                if not self._put(item):
                    return
        except BaseException as error:  # any exception must reach the trainer
            self._put(error)

    def _put(self, item: Item | BaseException) -> bool:
        while not self._stopped.is_set():
            try:
                self._queue.put(item, timeout=0.1)
            except queue.Full:
                continue
            return True
        return False
