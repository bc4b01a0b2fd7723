"""Stores that count what a rank asks of them: a real one, and one that stands for all other ranks of a large job."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from datetime import timedelta

from torch.distributed import HashStore, Store


class CountingStore(Store):
    """Passes everything on to another store, and counts calls by name. C++ may be given it, too."""

    def __init__(self, store: Store, calls: Counter[str]) -> None:
        super().__init__()
        self._store, self.calls = store, calls

    def set(self, key: str, value: str) -> None:
        self.calls["set"] += 1
        self._store.set(key, value)

    def get(self, key: str) -> bytes:
        self.calls["get"] += 1
        return self._store.get(key)

    def multi_get(self, keys: list[str]) -> list[bytes]:
        self.calls["multi_get"] += 1
        return self._store.multi_get(keys)

    def add(self, key: str, value: int) -> int:
        self.calls["add"] += 1
        return self._store.add(key, value)

    def check(self, keys: list[str]) -> bool:
        self.calls["check"] += 1
        return self._store.check(keys)

    def compare_set(self, key: str, expected: str, desired: str) -> bytes:
        self.calls["compare_set"] += 1
        return self._store.compare_set(key, expected, desired)

    def wait(self, keys: list[str], timeout: timedelta | None = None) -> None:
        self.calls["wait"] += 1
        if timeout is None:
            self._store.wait(keys)
        else:
            self._store.wait(keys, timeout)


class CrowdStore(HashStore):
    """What one rank of a large job finds in its store, all others having done their part: nothing is waited for.

    Args:
        values: that others have set.
        counts: that ``add`` gives, of counters to which all ranks add.
    """

    def __init__(self, values: Mapping[str, str], counts: Mapping[str, int]) -> None:
        super().__init__()
        self._counts = counts
        for key, value in values.items():
            super().set(key, value)

    def add(self, key: str, value: int) -> int:
        found = super().add(key, value)
        return self._counts.get(key, found)

    def wait(self, keys: list[str], timeout: timedelta | None = None) -> None:
        """Has come already."""
