"""Counts the files below a folder that this process opens and asks the size of."""

from __future__ import annotations

import os
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass
class FileCounts:
    """How often each file was opened, and ``stat`` asked of it, by its path below the folder."""

    opened: Counter[str] = field(default_factory=Counter)
    asked: Counter[str] = field(default_factory=Counter)

    def shards(self) -> tuple[int, int]:
        """(opened, asked) of files of shards."""
        return tuple(sum(n for name, n in found.items() if "shard-" in name) for found in (self.opened, self.asked))

    def indexes(self) -> int:
        """How often an index was opened."""
        return sum(n for name, n in self.opened.items() if name.endswith("index.json"))


_watching: list[tuple[Path, FileCounts]] = []


def _hook(event: str, arguments: tuple[Any, ...]) -> None:
    if event == "open" and _watching and isinstance(arguments[0], str | bytes | os.PathLike):
        _count(arguments[0], "opened")


def _count(path: Any, what: str) -> None:
    text = os.fsdecode(path)
    for folder, counts in _watching:
        if text.startswith(f"{folder}/"):
            getattr(counts, what)[text.removeprefix(f"{folder}/")] += 1


@contextmanager
def counted_files(folder: Path) -> Iterator[FileCounts]:
    """Count while the block runs, in every thread of this process."""
    if not getattr(sys, "_megalm_counts_files", False):  # an audit hook stays for ever
        sys.addaudithook(_hook)
        sys._megalm_counts_files = True
    counts, stat = FileCounts(), os.stat

    def asked(path: Any, *args: Any, **kwargs: Any) -> os.stat_result:
        if isinstance(path, str | bytes | os.PathLike):
            _count(path, "asked")
        return stat(path, *args, **kwargs)

    _watching.append((folder, counts))
    os.stat = asked
    try:
        yield counts
    finally:
        os.stat = stat
        _watching.pop()
