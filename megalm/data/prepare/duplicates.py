"""Which documents are like an earlier one: in memory that does not grow with the corpus. No torch."""

from __future__ import annotations

import sqlite3
from pathlib import Path
from types import TracebackType

_CACHE_KIB = 256 * 1024


class Duplicates:
    """Remembers hashes of the documents that stayed, on disk, with a cache of bounded size; a context manager.

    A document is a near duplicate if it shares a MinHash band with one that stayed (Broder 1997; Leskovec et al. 2014,
    section 3.4); it is not compared with those that were removed, so a chain of small changes does not remove all.

    Args:
        path: file to keep hashes in; replaced.
    """

    def __init__(self, path: Path) -> None:
        path.unlink(missing_ok=True)
        self._path = path
        self._database = sqlite3.connect(path, isolation_level=None)
        for statement in (
            "PRAGMA journal_mode=OFF",  # a killed preparation asks all questions again
            "PRAGMA synchronous=OFF",
            f"PRAGMA cache_size=-{_CACHE_KIB}",
            "CREATE TABLE texts (digest BLOB PRIMARY KEY) WITHOUT ROWID",
            "CREATE TABLE bands (band INTEGER, hash INTEGER, PRIMARY KEY (band, hash)) WITHOUT ROWID",
            "BEGIN",
        ):
            self._database.execute(statement)

    def __enter__(self) -> Duplicates:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._database.close()
        self._path.unlink(missing_ok=True)

    def rule(self, digest: bytes, bands: list[int]) -> str | None:
        """The rule that removes the next document: ``exact duplicate``, ``near duplicate``; None: it stays.

        Args:
            digest: hash of its text; empty: exact duplicates are not asked for.
            bands: hashes of its MinHash bands, unsigned; empty: near duplicates are not asked for.
        """
        if digest and not self._add("INSERT OR IGNORE INTO texts VALUES (?)", [(digest,)]):
            return "exact duplicate"
        keys = [(band, value - 2**63) for band, value in enumerate(bands)]  # SQLite's integers are signed
        seen = "SELECT 1 FROM bands WHERE band = ? AND hash = ?"
        if any(self._database.execute(seen, key).fetchone() for key in keys):
            return "near duplicate"
        if keys:
            self._database.executemany("INSERT OR IGNORE INTO bands VALUES (?, ?)", keys)
        return None

    def _add(self, statement: str, rows: list[tuple[bytes]]) -> bool:
        return self._database.executemany(statement, rows).rowcount == len(rows)
