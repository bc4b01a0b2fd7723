"""What a place for files can do."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from megalm.errors import DataError


class MissingFile(DataError):  # noqa: N818 - it tells a fact that callers decide about
    """A file that ought to be there is not."""


class RefusedFile(DataError):  # noqa: N818 - as above
    """A server does not let a file be read; some say so of files that do not exist."""


@dataclass(frozen=True)
class Cache:
    """Where whole files are kept that can only be fetched whole.

    Attributes:
        folder: None: ``megalm-<user id>`` in the system's folder for temporary files.
        max_gib: most that it holds; the files used longest ago go first.
    """

    folder: str | None = None
    max_gib: float = 50.0


class OpenFile(Protocol):
    """A file whose bytes can be had in any order."""

    def view(self, offset: int, length: int) -> NDArray[np.uint8]:
        """Some of its bytes, read-only: a view where the file is mapped, else a copy."""


class Store(Protocol):
    """A folder of files; names are relative and use ``/``."""

    @property
    def location(self) -> str:
        """As a user would give it."""

    @property
    def is_local(self) -> bool:
        """Whether files are mapped: bytes that were checked once stay checked, and asking for sizes is free."""

    def path_of(self, name: str) -> str:
        """A file as messages name it."""

    def below(self, name: str) -> Store:
        """The store of a folder in this one."""

    def read(self, name: str) -> bytes:
        """A whole small file.

        Raises:
            MissingFile: it is not there.
            DataError: it cannot be read.
        """

    def size(self, name: str) -> int | None:
        """Bytes of a file; None: nobody knows before it is read.

        Raises:
            MissingFile: it is not there.
        """

    def open(self, name: str, size: int) -> OpenFile:
        """A file of which the index says that it has ``size`` bytes.

        Raises:
            MissingFile: it is not there.
            DataError: it has another size, or cannot be read.
        """


def check_size(path: str, found: int, expected: int) -> None:
    """Raise DataError if a file has not the size that it was written with."""
    if found != expected:
        what = "cut short" if found < expected else "longer than it was written"
        raise DataError(f"{path}: {found} bytes, the index says {expected}: {what}; copy the file again")
