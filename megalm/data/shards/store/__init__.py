"""Where the files of a prepared dataset lie: a folder, a web server, or whatever a command prints. No torch.

To add a kind of place, write a class with the methods of :class:`Store` and give it a prefix in :func:`open_store`.
"""

from __future__ import annotations

from pathlib import Path

from megalm.data.shards.store.base import Cache, MissingFile, OpenFile, RefusedFile, Store
from megalm.data.shards.store.local import LocalStore
from megalm.data.shards.store.pipe import PIPE, PipeStore

__all__ = ["Cache", "MissingFile", "OpenFile", "RefusedFile", "Store", "is_remote", "open_store"]


def open_store(location: str | Path, cache: Cache | None = None) -> Store:
    """The store that a location names: ``http(s)://…``, ``pipe:COMMAND {file}``, or else a folder.

    Args:
        location: as a user gives it.
        cache: where a ``pipe:`` keeps what it has fetched; None: the default.
    """
    text = str(location)
    if text.startswith(("http://", "https://")):
        from megalm.data.shards.store.http import HttpStore  # and with it an HTTP client that folders do not need

        return HttpStore(text)
    if text.startswith(PIPE):
        return PipeStore(text, cache or Cache())
    return LocalStore(Path(location))


def is_remote(location: str | Path) -> bool:
    """Whether a location is no folder."""
    return str(location).startswith(("http://", "https://", PIPE))
